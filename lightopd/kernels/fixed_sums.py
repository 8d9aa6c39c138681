"""Sums of the student's probabilities and logits against fixed vectors: closed forms around the walk.

An average A = sum_v s_v a_v has the gradient s_u (a_u - A) by a logit, the entropy E has -s_u (log s_u + E),
and a sum of logits sum_v c_v z_v has c_u. The walk adds them up over the tokens that were not requested;
those that were are added here.
"""

# N = positions, V = vocabulary, U = slots for the distinct ids requested at a position
# F = vectors averaged by the student, G = vectors that average its logits

from typing import NamedTuple

import torch
from torch import Tensor

from lightopd.kernels.tile_types import FLOOR, VectorGradient, Vectors, VocabularySums


class FixedSums(NamedTuple):
    """Sums against fixed vectors, in the dtype of the log-probabilities. Differentiable."""

    entropy_N: Tensor
    """Entropy of the full distribution; where there is a vector to average, with the gradient that
    `TokenLogprobs.entropy_N` lacks."""
    averages_NF: Tensor
    """sum_v s_v a_v over the whole vocabulary, by vector."""
    weighed_NG: Tensor
    """sum_v c_v z_v over the whole vocabulary, by vector; z as it is after softcap and temperature."""


class Slots(NamedTuple):
    """The requested tokens of each position, and the two numbers that turn tile sums into probabilities."""

    ids_NU: Tensor
    logprobs_NU: Tensor
    """Minus infinity in slots without a token."""
    top_logprob_N: Tensor
    """Log-probability at the largest logit of the others; far below any where there are none."""


def vectors_for(
    averaged_FV: Tensor | None, weighing_GV: Tensor | None, num_vocab: int, like: Tensor, dtype: torch.dtype
) -> Vectors | None:
    """Both kinds in the dtype of the walk, and on its device; None where there are none.

    Raises:
        ValueError: a vector has another vocabulary than the head.
    """
    if averaged_FV is None and weighing_GV is None:
        return None
    given = [like.new_empty(0, num_vocab) if each is None else each for each in (averaged_FV, weighing_GV)]
    for name, each in zip(("averaged", "weighing"), given, strict=True):
        if each.ndim != 2 or each.shape[1] != num_vocab:
            raise ValueError(
                f"{name} {tuple(each.shape)} must be [vectors, V] with V = {num_vocab}, the head's vocabulary"
            )
    return Vectors(*(each.detach().to(like.device, dtype).contiguous() for each in given))


def fixed_sums(sums: VocabularySums, slots: Slots, vectors: Vectors, entropy_N: Tensor) -> FixedSums:
    """The sums of the tiles, and of the tokens that were requested."""
    averages_NF = sums.averages_NF * slots.top_logprob_N.exp()[:, None]
    averages_NF = averages_NF + (slots.logprobs_NU.exp()[..., None] * _at(vectors.averaged_FV, slots)).sum(1)
    return FixedSums(entropy_N.clone(), averages_NF, sums.weighed_NG)


def add_gradient(
    given: FixedSums, values: FixedSums, slots: Slots, vectors: Vectors, scale_N: Tensor, requested_NU: Tensor
) -> VectorGradient:
    """Gradient by the logits of `given`, the gradient by the sums; adds to `scale_N` and `requested_NU`.

    With g by the entropy E and a_f by the averages A_f: s_u (sum_f a_f (v_fu - A_f) - g (log s_u + E)). At a
    token of a tile log s_u is z_u - max plus the log-probability at the maximum.
    """
    by_entropy_N, by_averages_NF, by_weighed_NG = given
    constant_N = -(by_averages_NF * values.averages_NF).sum(1) - by_entropy_N * values.entropy_N
    top_N = slots.top_logprob_N.exp()
    scale_N += top_N * (constant_N - by_entropy_N * slots.top_logprob_N)
    at_NUF = _at(vectors.averaged_FV, slots)
    slope_NU = constant_N[:, None] + (at_NUF * by_averages_NF[:, None]).sum(2)
    slope_NU -= by_entropy_N[:, None] * slots.logprobs_NU.clamp(min=FLOOR)
    requested_NU += slots.logprobs_NU.exp() * slope_NU
    return VectorGradient(-top_N * by_entropy_N, top_N[:, None] * by_averages_NF, by_weighed_NG)


def _at(vectors_FV: Tensor, slots: Slots) -> Tensor:
    """Entries at the ids requested, [N, U, F]; of some token in slots without one."""
    return vectors_FV.t()[slots.ids_NU.clamp(min=0)]
