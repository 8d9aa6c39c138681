"""Divergences between teacher and student over K + 1 outcomes, or over K renormalised ones.

Every divergence is a sum of terms that are each zero where the two agree and never negative: KL is
summed as p log(p/q) - p + q, which adds zero in total and makes value and gradient vanish exactly at
p = q, in float32 too. N = tokens, K = support, M = outcomes; nats.
"""

from collections.abc import Callable
from math import log

import torch
from torch import Tensor

from lightopd.objectives.base.part import Outcomes
from lightopd.schemas.objectives.targets import DivergenceTarget

FLOOR = -87.0
"""exp(FLOOR) is the smallest normal float32; a cached log-probability of -inf is read as this, so that
KL(s || T) stays finite where float32 has lost what little the teacher leaves."""

_Kl = Callable[[Tensor, Tensor], Tensor]


def token_divergence(config: DivergenceTarget, outcomes: Outcomes) -> Tensor:
    """D of each token, [N], by the config's support rule.

    Source: arXiv 2604.00626 (family), 2605.11182 (support rules), 2606.00147 (temperature).
    """
    if config.support == "stop_gradient":
        return _stop_gradient_reverse_kl(config, outcomes)
    if config.support == "renormalised":
        outcomes = renormalised(outcomes, config.temperature)
    else:
        outcomes = normalised_teacher(outcomes)
    return outcome_terms(config, outcomes).sum(-1) * config.temperature**2


def support_divergence(config: DivergenceTarget, outcomes: Outcomes) -> Tensor:
    """The part of D that lies on the support, [N]; what lies outside is compared token by token."""
    return outcome_terms(config, normalised_teacher(outcomes))[:, :-1].sum(-1)


def outcome_terms(config: DivergenceTarget, outcomes: Outcomes) -> Tensor:
    """What each outcome adds to D, in the shape of the outcomes; their mask is not read."""
    kl = _kl_terms if config.element_clip is None else _plain_kl_terms
    terms_NM = _DIVERGENCES[config.divergence](kl, outcomes, config.parameter)
    return terms_NM if config.element_clip is None else terms_NM.clamp(0, config.element_clip)


def finite(logprobs: Tensor) -> Tensor:
    """Log-probabilities with -inf read as `FLOOR`; NaN stays NaN."""
    return logprobs.nan_to_num(nan=float("nan"), neginf=FLOOR)


def normalised_teacher(outcomes: Outcomes) -> Outcomes:
    """The teacher scaled to sum to one over the outcomes; mends float16 rounding and extrapolation."""
    teacher_NM = _log_softmax(outcomes.teacher_NM, outcomes.is_real_NM)
    return Outcomes(teacher_NM, outcomes.student_NM, outcomes.is_real_NM)


def renormalised(outcomes: Outcomes, temperature: float = 1.0) -> Outcomes:
    """Both sides tempered and scaled to sum to one on the support, the tail left out."""
    is_real_NK = outcomes.is_real_NM[:, :-1]
    return Outcomes(
        _log_softmax(outcomes.teacher_NM[:, :-1] / temperature, is_real_NK),
        _log_softmax(outcomes.student_NM[:, :-1] / temperature, is_real_NK),
        is_real_NK,
    )


def support_weights(outcomes: Outcomes) -> Tensor:
    """Student renormalised on the support, [N, K], detached; all zero where there is no support."""
    is_real_NK = outcomes.is_real_NM[:, :-1]
    student_NK = _log_softmax(outcomes.student_NM[:, :-1].detach(), is_real_NK)
    return student_NK.exp() * is_real_NK


def reverse_kl(outcomes: Outcomes) -> Tensor:
    """KL(s || T) over the outcomes with the tail, [N]."""
    outcomes = normalised_teacher(outcomes)
    return _kl_terms(outcomes.student_NM, outcomes.teacher_NM).sum(-1)


def _log_softmax(logprobs_NM: Tensor, is_real_NM: Tensor) -> Tensor:
    """Log-softmax over the real outcomes, 0 elsewhere; a row without any stays finite."""
    has_any_N1 = is_real_NM.any(-1, keepdim=True)
    sunk_NM = logprobs_NM.masked_fill(~is_real_NM & has_any_N1, float("-inf"))
    return sunk_NM.log_softmax(-1).masked_fill(~is_real_NM, 0.0)


def _kl_terms(p_NM: Tensor, q_NM: Tensor) -> Tensor:
    """p log(p/q) - p + q of log-probabilities p and q, term by term, never negative.

    Near p = q it is p (e^g - 1 - g) with g = log q - log p: expm1(g) - g keeps the second-order rest that
    q - p (1 + g) would lose to rounding. The near branch sees a clamped g, since torch.where differentiates
    both branches and an overflow in the one not taken turns its zero gradient into NaN.
    """
    gap_NM = q_NM - p_NM
    near_NM = gap_NM.clamp(-1.0, 1.0)
    near_NM = p_NM.exp() * (near_NM.expm1() - near_NM)
    far_NM = q_NM.exp() - p_NM.exp() * (1 + gap_NM)
    return torch.where(gap_NM.abs() < 1, near_NM, far_NM)


def _plain_kl_terms(p_NM: Tensor, q_NM: Tensor) -> Tensor:
    """p log(p/q); what the papers clip, and of either sign."""
    return p_NM.exp() * (p_NM - q_NM)


def _mixture(p_NM: Tensor, q_NM: Tensor, share: float) -> Tensor:
    """log(share exp(p) + (1 - share) exp(q)); 0 < share < 1."""
    return torch.logaddexp(p_NM + log(share), q_NM + log(1 - share))


def _forward_kl(kl: _Kl, both: Outcomes, parameter: float | None) -> Tensor:
    return kl(both.teacher_NM, both.student_NM)


def _reverse_kl(kl: _Kl, both: Outcomes, parameter: float | None) -> Tensor:
    return kl(both.student_NM, both.teacher_NM)


def _jsd(kl: _Kl, both: Outcomes, parameter: float | None) -> Tensor:
    """beta KL(T || m) + (1 - beta) KL(s || m), m = beta T + (1 - beta) s; the ends are FKL and RKL.

    The ends are the limits of JSD / beta and JSD / (1 - beta), as in the code of arXiv 2601.18734.
    """
    beta = 0.5 if parameter is None else parameter
    if beta in (0.0, 1.0):
        return (_reverse_kl if beta else _forward_kl)(kl, both, None)
    mixed_NM = _mixture(both.teacher_NM, both.student_NM, beta)
    return beta * kl(both.teacher_NM, mixed_NM) + (1 - beta) * kl(both.student_NM, mixed_NM)


def _skew_forward_kl(kl: _Kl, both: Outcomes, parameter: float | None) -> Tensor:
    """KL(T || a T + (1 - a) s)."""
    share = 0.1 if parameter is None else parameter
    return kl(
        both.teacher_NM, _mixture(both.teacher_NM, both.student_NM, share) if share else both.student_NM
    )


def _skew_reverse_kl(kl: _Kl, both: Outcomes, parameter: float | None) -> Tensor:
    """KL(s || a s + (1 - a) T)."""
    share = 0.1 if parameter is None else parameter
    return kl(
        both.student_NM, _mixture(both.student_NM, both.teacher_NM, share) if share else both.teacher_NM
    )


def _total_variation(kl: _Kl, both: Outcomes, parameter: float | None) -> Tensor:
    return (both.teacher_NM.exp() - both.student_NM.exp()).abs() / 2


def _alpha(kl: _Kl, both: Outcomes, parameter: float | None) -> Tensor:
    """(T^a s^(1-a) - a T - (1 - a) s) / (a (a - 1)); FKL as a -> 1, RKL as a -> 0.

    Where the two are close the difference would be rounding, so its series in log(s/T) is summed instead.
    """
    alpha = 0.5 if parameter is None else parameter
    mixed_NM = (alpha * both.teacher_NM + (1 - alpha) * both.student_NM).exp()
    linear_NM = alpha * both.teacher_NM.exp() + (1 - alpha) * both.student_NM.exp()
    gap_NM = both.student_NM - both.teacher_NM
    near_NM = gap_NM.clamp(-0.01, 0.01)
    series_NM = 0.5 + near_NM * ((2 - alpha) / 6 + near_NM * (3 - 3 * alpha + alpha**2) / 24)
    close_NM = both.teacher_NM.exp() * near_NM.square() * series_NM
    return torch.where(gap_NM.abs() < 0.01, close_NM, (mixed_NM - linear_NM) / (alpha * (alpha - 1)))


def _stop_gradient_reverse_kl(config: DivergenceTarget, outcomes: Outcomes) -> Tensor:
    """sum over the support of s sg[log s - log T]; no tail (arXiv 2605.11182)."""
    student_NK, teacher_NK = outcomes.student_NM[:, :-1], outcomes.teacher_NM[:, :-1]
    terms_NK = student_NK.exp() * (student_NK - teacher_NK).detach() * outcomes.is_real_NM[:, :-1]
    if config.element_clip is not None:
        terms_NK = terms_NK.clamp(0, config.element_clip)
    return terms_NK.sum(-1)


_DIVERGENCES: dict[str, Callable[[_Kl, Outcomes, float | None], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tv": _total_variation,
    "alpha": _alpha,
}
