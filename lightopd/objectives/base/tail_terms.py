"""What single tokens of the tail add to a divergence, and its derivative by the student's log-probability."""

# C = positions in one chunk, T = tokens in one tile; nats

import torch
from torch import Tensor

from lightopd.kernels.outside_terms import Terms, differentiated
from lightopd.objectives.base.divergences import outcome_terms
from lightopd.objectives.base.part import Outcomes
from lightopd.schemas.objectives.targets import DivergenceTarget

EVERYWHERE = torch.ones((), dtype=torch.bool)
"""The terms of a divergence read no mask."""


def terms_of(target: DivergenceTarget) -> Terms:
    """In closed form for JSD and the skew KLs, by autograd for all else.

    The closed forms are `outcome_terms` up to rounding of about 1e-7 of either probability.
    """
    closed = _CLOSED.get(target.divergence) if target.element_clip is None else None
    default = 0.5 if target.divergence == "jsd" else 0.1
    share = default if target.parameter is None else target.parameter
    if closed is None or not 0 < share < 1:
        return differentiated(lambda t, s: outcome_terms(target, Outcomes(t, s, EVERYWHERE)))
    return lambda teacher_CT, student_CT: closed(teacher_CT, student_CT, share)


def _jsd(teacher_CT: Tensor, student_CT: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta T log(T/m) + (1 - beta) s log(s/m), m = beta T + (1 - beta) s; slope (1 - beta) s log(s/m)."""
    exp_teacher_CT, exp_student_CT, log_mixed_CT = _mixed(teacher_CT, student_CT, beta)
    slope_CT = exp_student_CT.mul_(1 - beta).mul_(student_CT - log_mixed_CT)
    terms_CT = exp_teacher_CT.mul_(beta).mul_(log_mixed_CT.neg_().add_(teacher_CT)).add_(slope_CT)
    return terms_CT, slope_CT


def _skew_forward_kl(teacher_CT: Tensor, student_CT: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """T log(T/m) - T + m, m = share T + (1 - share) s; slope (1 - share) s (1 - T/m)."""
    exp_teacher_CT, exp_student_CT, log_mixed_CT = _mixed(teacher_CT, student_CT, share)
    gap_CT = teacher_CT - log_mixed_CT
    slope_CT = gap_CT.exp().neg_().add_(1).mul_(exp_student_CT).mul_(1 - share)
    terms_CT = gap_CT.mul_(exp_teacher_CT).add_(exp_student_CT.sub_(exp_teacher_CT), alpha=1 - share)
    return terms_CT, slope_CT


def _skew_reverse_kl(teacher_CT: Tensor, student_CT: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """s log(s/m) - s + m, m = share s + (1 - share) T; slope s (log(s/m) + share (1 - s/m))."""
    exp_teacher_CT, exp_student_CT, log_mixed_CT = _mixed(teacher_CT, student_CT, 1 - share)
    gap_CT = student_CT - log_mixed_CT
    slope_CT = gap_CT.exp().neg_().add_(1).mul_(share).add_(gap_CT).mul_(exp_student_CT)
    terms_CT = gap_CT.mul_(exp_student_CT).add_(exp_teacher_CT.sub_(exp_student_CT), alpha=1 - share)
    return terms_CT, slope_CT


def _mixed(teacher_CT: Tensor, student_CT: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """exp of both, and log(share exp(teacher) + (1 - share) exp(student)), finite where both vanish."""
    exp_teacher_CT, exp_student_CT = teacher_CT.exp(), student_CT.exp()
    mixed_CT = torch.mul(exp_teacher_CT, share).add_(exp_student_CT, alpha=1 - share)
    tiny = torch.finfo(mixed_CT.dtype).tiny
    return exp_teacher_CT, exp_student_CT, mixed_CT.clamp_(min=tiny).log_()


_CLOSED = {"jsd": _jsd, "skew_forward_kl": _skew_forward_kl, "skew_reverse_kl": _skew_reverse_kl}
