"""Divergences over a tile of the vocabulary: sums of terms, and slopes in closed form, without autograd.

They are those of `divergences`, term by term; p log(p/q) - p + q is summed as its three parts, whose rest is
of second order in the rounding of the two normalisers. A slope is the derivative of a term by log s. Each
function may overwrite log T and log s, and leaves s as it is.
"""

# C = positions, T = tokens of a tile

from collections.abc import Callable

import torch
from torch import Tensor

from lightopd.kernels.two_heads import Divergence
from lightopd.objectives.base.divergences import outcome_terms
from lightopd.objectives.base.part import Outcomes
from lightopd.schemas.objectives.targets import DivergenceTarget


def closed_form(config: DivergenceTarget) -> Divergence:
    """The config's divergence as what a walk over two heads sums; by autograd where elements are clipped."""
    if config.element_clip is not None:
        return _by_autograd(config)
    kind, parameter = limit_of(config.divergence, config.parameter)
    return _FORMS[kind](parameter)


def limit_of(kind: str, parameter: float | None) -> tuple[str, float]:
    """The kind and parameter, with the ends of jsd and skew as the plain divergences that they are."""
    if kind == "jsd":
        beta = 0.5 if parameter is None else parameter
        return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, kind), beta
    if kind in ("skew_forward_kl", "skew_reverse_kl"):
        share = 0.1 if parameter is None else parameter
        return (kind if share else kind.removeprefix("skew_")), share
    return kind, 0.5 if parameter is None else parameter


def _forward_kl(_: float) -> Divergence:
    def sums(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> tuple[Tensor, Tensor]:
        gap_CT = torch.sub(teacher_CT, logprobs_CT, out=logprobs_CT)
        mass_C, teacher_CT = student_CT.sum(1), teacher_CT.exp_()
        excess_C = mass_C - teacher_CT.sum(1)
        return gap_CT.mul_(teacher_CT).sum(1) + excess_C, excess_C

    def slopes(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> Tensor:
        return torch.sub(student_CT, teacher_CT.exp_(), out=logprobs_CT)

    return Divergence(sums, slopes)


def _reverse_kl(_: float) -> Divergence:
    def slopes(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> Tensor:
        return logprobs_CT.sub_(teacher_CT).mul_(student_CT)

    def sums(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> tuple[Tensor, Tensor]:
        slope_C = slopes(teacher_CT, logprobs_CT, student_CT).sum(1)
        return slope_C - student_CT.sum(1) + teacher_CT.exp_().sum(1), slope_C

    return Divergence(sums, slopes)


def _jsd(beta: float) -> Divergence:
    def slopes(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> Tensor:
        log_mixed_CT = _log_mixed(teacher_CT.exp_(), student_CT, beta)
        return logprobs_CT.sub_(log_mixed_CT).mul_(student_CT).mul_(1 - beta)

    def sums(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> tuple[Tensor, Tensor]:
        probs_CT = teacher_CT.exp()
        log_mixed_CT = _log_mixed(probs_CT, student_CT, beta)
        slope_C = logprobs_CT.sub_(log_mixed_CT).mul_(student_CT).sum(1).mul_(1 - beta)
        return slope_C + teacher_CT.sub_(log_mixed_CT).mul_(probs_CT).sum(1).mul_(beta), slope_C

    return Divergence(sums, slopes)


def _skew_forward_kl(share: float) -> Divergence:
    def slopes(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> Tensor:
        mixed_CT = _mixed(teacher_CT.exp_(), student_CT, share)
        return (1 - teacher_CT.div_(mixed_CT)).mul_(student_CT).mul_(1 - share)

    def sums(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> tuple[Tensor, Tensor]:
        probs_CT = teacher_CT.exp()
        mixed_CT = _mixed(probs_CT, student_CT, share)
        terms_C = teacher_CT.sub_(mixed_CT.log()).mul_(probs_CT).sum(1) - probs_CT.sum(1) + mixed_CT.sum(1)
        slope_CT = (1 - probs_CT.div_(mixed_CT)).mul_(student_CT)
        return terms_C, slope_CT.sum(1).mul_(1 - share)

    return Divergence(sums, slopes)


def _skew_reverse_kl(share: float) -> Divergence:
    def parts(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s log(s / m), s, m."""
        mixed_CT = _mixed(student_CT, teacher_CT.exp_(), share)
        return logprobs_CT.sub_(mixed_CT.log()).mul_(student_CT), student_CT, mixed_CT

    def slopes_of(terms_CT: Tensor, student_CT: Tensor, mixed_CT: Tensor) -> Tensor:
        return terms_CT.add_((1 - student_CT / mixed_CT).mul_(student_CT), alpha=share)

    def slopes(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> Tensor:
        return slopes_of(*parts(teacher_CT, logprobs_CT, student_CT))

    def sums(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> tuple[Tensor, Tensor]:
        terms_CT, student_CT, mixed_CT = parts(teacher_CT, logprobs_CT, student_CT)
        value_C = terms_CT.sum(1) - student_CT.sum(1) + mixed_CT.sum(1)
        return value_C, slopes_of(terms_CT, student_CT, mixed_CT).sum(1)

    return Divergence(sums, slopes)


def _total_variation(_: float) -> Divergence:
    def slopes(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> Tensor:
        return logprobs_CT.sub_(teacher_CT).sign_().mul_(student_CT).mul_(0.5)

    def sums(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> tuple[Tensor, Tensor]:
        value_C = (teacher_CT.exp() - student_CT).abs_().sum(1).mul_(0.5)
        return value_C, slopes(teacher_CT, logprobs_CT, student_CT).sum(1)

    return Divergence(sums, slopes)


def _alpha(alpha: float) -> Divergence:
    """With g = log T - log s, terms s (expm1(a g) - a expm1(g)) / (a (a - 1)) and slopes -s expm1(a g) / a.

    Far from 0 the exponential of a g alone may overflow where s times it does not, so it is one exponential.
    """

    def risen(gap_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> Tensor:
        """s expm1(a g)."""
        near_CT = gap_CT.clamp(-1.0, 1.0).mul_(alpha).expm1_().mul_(student_CT)
        far_CT = (logprobs_CT + alpha * gap_CT).exp_() - student_CT
        return torch.where(gap_CT.abs() < 1, near_CT, far_CT)

    def slopes(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> Tensor:
        return risen(teacher_CT.sub_(logprobs_CT), logprobs_CT, student_CT).div_(-alpha)

    def sums(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> tuple[Tensor, Tensor]:
        far_CT = teacher_CT.exp() - student_CT
        gap_CT = teacher_CT.sub_(logprobs_CT)
        near_CT = gap_CT.clamp(-1.0, 1.0).expm1_().mul_(student_CT)
        linear_CT = torch.where(gap_CT.abs() < 1, near_CT, far_CT)
        risen_CT = risen(gap_CT, logprobs_CT, student_CT)
        value_C = (risen_CT - alpha * linear_CT).sum(1) / (alpha * (alpha - 1))
        return value_C, risen_CT.sum(1).div_(-alpha)

    return Divergence(sums, slopes)


def _mixed(one_CT: Tensor, other_CT: Tensor, share: float) -> Tensor:
    """share one + (1 - share) other, never 0: where both are lost to underflow their terms are 0 as well."""
    return torch.lerp(other_CT, one_CT, share).clamp_(min=torch.finfo(one_CT.dtype).tiny)


def _log_mixed(one_CT: Tensor, other_CT: Tensor, share: float) -> Tensor:
    return _mixed(one_CT, other_CT, share).log_()


def _by_autograd(config: DivergenceTarget) -> Divergence:
    def both(teacher_CT: Tensor, logprobs_CT: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf_CT = logprobs_CT.detach().requires_grad_()
            terms_CT = outcome_terms(config, Outcomes(teacher_CT, leaf_CT, _EVERYWHERE))
            (slope_CT,) = torch.autograd.grad(terms_CT.sum(), leaf_CT)
        return terms_CT.detach(), slope_CT

    def sums(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> tuple[Tensor, Tensor]:
        terms_CT, slope_CT = both(teacher_CT, logprobs_CT)
        return terms_CT.sum(1), slope_CT.sum(1)

    def slopes(teacher_CT: Tensor, logprobs_CT: Tensor, student_CT: Tensor) -> Tensor:
        return both(teacher_CT, logprobs_CT)[1]

    return Divergence(sums, slopes)


_EVERYWHERE = torch.ones((), dtype=torch.bool)
"""The terms of a divergence read no mask."""

_FORMS: dict[str, Callable[[float], Divergence]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tv": _total_variation,
    "alpha": _alpha,
}
