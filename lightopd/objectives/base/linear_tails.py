"""Forward and reverse KL outside a support, from sums that the student's own pass over the vocabulary makes.

Where the teacher is one shape times a number of the position, KL(T || s) needs the mean of the student's
logits under the shape, and KL(s || T) the mean of the shape's logarithm under the student, and its entropy.
Both sums are over the whole vocabulary; the support is taken off again.
"""

# N = tokens, K = support, V = vocabulary; nats
# F = vectors averaged by the student, G = vectors that average its logits

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightopd.objectives.base.closed_forms import limit_of
from lightopd.objectives.base.part import Outcomes
from lightopd.schemas.objectives.targets import DivergenceTarget

Linear = Literal["forward_kl", "reverse_kl"]


class Vectors(NamedTuple):
    """What the student's pass sums against."""

    averaged_FV: Tensor | None
    weighing_GV: Tensor | None


class LinearSums(NamedTuple):
    """What a tail reads of the student, [N]; all differentiable."""

    logsumexp_N: Tensor
    entropy_N: Tensor | None
    """None for forward KL."""
    sum_N: Tensor
    """Reverse KL: mean of the shape's logarithm under the student; forward KL: mean logit under the shape."""


def linear_kind(target: DivergenceTarget) -> Linear | None:
    """Which of the two a divergence is, at the ends of its parameter too; None for all others."""
    if target.element_clip is not None:
        return None
    kind, _ = limit_of(target.divergence, target.parameter)
    if kind == "forward_kl":
        return "forward_kl"
    return "reverse_kl" if kind == "reverse_kl" else None


def stack_vectors(log_shapes: Sequence[tuple[Linear | None, Tensor]]) -> Vectors:
    """The vectors of all tails that are linear, in their order."""
    averaged = [log_shape_V for kind, log_shape_V in log_shapes if kind == "reverse_kl"]
    weighing = [log_shape_V.exp() for kind, log_shape_V in log_shapes if kind == "forward_kl"]
    return Vectors(torch.stack(averaged) if averaged else None, torch.stack(weighing) if weighing else None)


def forward_kl_outside(
    log_shape_V: Tensor, ids_NK: Tensor, outcomes: Outcomes, shift_N: Tensor, sums: LinearSums
) -> Tensor:
    """Sum over v outside K of T_v log(T_v / s_v) - T_v + s_v, T_v = c_v exp(shift), [N]."""
    shape_V, student_NK = log_shape_V.exp(), outcomes.student_NM[:, :-1]
    inside_NK = at_ids(shape_V, ids_NK)
    student_mean_N = sums.sum_N - sums.logsumexp_N - (inside_NK * student_NK).sum(1)
    own_mean_N = (shape_V * log_shape_V).sum() - (inside_NK * at_ids(log_shape_V, ids_NK)).sum(1)
    tail_N = outcomes.teacher_NM[:, -1].exp()
    entropies_N = tail_N * shift_N + shift_N.exp() * (own_mean_N - student_mean_N)
    return entropies_N - tail_N + outcomes.student_NM[:, -1].exp()


def reverse_kl_outside(
    log_shape_V: Tensor, ids_NK: Tensor, outcomes: Outcomes, shift_N: Tensor, sums: LinearSums
) -> Tensor:
    """Sum over v outside K of s_v log(s_v / T_v) - s_v + T_v, T_v = c_v exp(shift), [N]."""
    assert sums.entropy_N is not None, "the student's entropy comes with a vector to average"
    student_NK, tail_N = outcomes.student_NM[:, :-1], outcomes.student_NM[:, -1].exp()
    # The student's log-probability is 0 at padding, and so is the shape's: nothing is taken off there.
    inside_N = (student_NK.exp() * (student_NK - at_ids(log_shape_V, ids_NK))).sum(1)
    relative_N = -sums.entropy_N - sums.sum_N - inside_N
    return relative_N - tail_N * (1 + shift_N) + outcomes.teacher_NM[:, -1].exp()


def at_ids(values_V: Tensor, ids_NK: Tensor) -> Tensor:
    """A vector's values at ids, 0 at padding."""
    return values_V[ids_NK.clamp(min=0)] * (ids_NK >= 0)
