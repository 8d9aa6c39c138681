"""Sums over the vocabulary, outside a few tokens, of terms of the student against one fixed distribution.

A divergence over the whole vocabulary is a sum over the tokens that the teacher kept, which are few, and over
all others, where the teacher is one fixed vector times a number of the position. This is the second sum, for
any term that is a function of the two log-probabilities, with its gradient, and without an [N, V] tensor.
"""

# N = positions, D = hidden size, V = vocabulary, K = tokens left out of the sum at a position
# C = positions in one chunk, T = tokens in one tile

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightopd.kernels.plain_tiles import finish_with_slope, through_logits
from lightopd.kernels.selected_logprobs import plan_walk
from lightopd.kernels.tile_types import SUNK, Inputs, Walk
from lightopd.kernels.two_heads import Divergence
from lightopd.kernels.vocabulary_walk import propagate_tiles, visit_tiles


class Fixed(NamedTuple):
    """The distribution that the student is compared with: exp(shift_N + log_shape_V) outside the ids."""

    ids_NK: Tensor
    """int64, tokens left out of the sum, no id twice at a position, -1 at padding."""
    shift_N: Tensor
    """Log of the position's factor, finite."""
    log_shape_V: Tensor
    """Log of the vector that all positions share, finite."""


def outside_terms(
    hidden_ND: Tensor,
    head_VD: Tensor,
    fixed: Fixed,
    logsumexp_N: Tensor,
    divergence: Divergence,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    tile_vocab: int | None = None,
) -> Tensor:
    """Sum of a divergence's terms over the tokens outside `fixed.ids_NK`, [N]; differentiable.

    The logits are those of `selected_logprobs`, in the same formats. Both passes recompute them.

    Args:
        hidden_ND: last hidden states, after the final norm; any float dtype.
        head_VD: output projection; any float dtype.
        fixed: the other distribution; it gets no gradient.
        logsumexp_N: normaliser of the logits, from `selected_logprobs` with the same options. Its own
            dependence on the logits is part of the gradient here, so that it needs none.
        divergence: what is summed; a token whose two log-probabilities both vanish must add nothing.
        bias_V: added before the softcap.
        softcap: c in c * tanh(z / c); None for none.
        temperature: divides the logits after the softcap.
        chunk_tokens: positions per tile; changes speed and memory, not results.
        tile_vocab: vocabulary entries per tile; changes speed and memory, not results.

    Raises:
        ValueError: the shape has another vocabulary than the head, or a number is out of range.
    """
    if fixed.log_shape_V.shape != head_VD.shape[:1]:
        raise ValueError(
            f"the shape has {len(fixed.log_shape_V)} entries, the head has {len(head_VD)} vocabulary entries"
        )
    inputs = Inputs(hidden_ND, head_VD, bias_V)
    walk = plan_walk(inputs, softcap, temperature, chunk_tokens, tile_vocab, False)
    value_N = _OutsideTerms.apply(*inputs, walk, fixed, logsumexp_N.detach(), divergence)  # type: ignore[no-untyped-call]
    return cast(Tensor, value_N)


class _OutsideTerms(torch.autograd.Function):
    """Two walks: the sums of terms and of their slopes, then the gradient by every logit."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        walk: Walk,
        fixed: Fixed,
        logsumexp_N: Tensor,
        divergence: Divergence,
    ) -> Tensor:
        inputs = Inputs(hidden_ND, weight_VD, bias_V)
        value_N = torch.zeros(len(hidden_ND), dtype=walk.dtype, device=hidden_ND.device)
        slope_N = torch.zeros_like(value_N)

        def visit(logits_CT: Tensor, rows: slice, tile: slice) -> None:
            logprobs_CT = logits_CT.sub_(logsumexp_N[rows, None])
            fixed_CT = _sink_ids(logprobs_CT, fixed, rows, tile)
            terms_C, slope_C = divergence.sums(fixed_CT, logprobs_CT, logprobs_CT.exp())
            value_N[rows] += terms_C
            slope_N[rows] += slope_C

        with torch.autocast(hidden_ND.device.type, enabled=False):
            visit_tiles(inputs, walk, visit)
        ctx.walk, ctx.slopes = walk, divergence.slopes
        ctx.save_for_backward(*inputs, *fixed, logsumexp_N, slope_N)
        return value_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, fixed, logsumexp_N, slope_N = Inputs(*saved[:3]), Fixed(*saved[3:6]), saved[6], saved[7]
        walk: Walk = ctx.walk

        def gradient_of(products_CT: Tensor, bias_T: Tensor | None, rows: slice, tile: slice) -> Tensor:
            inner_CT = finish_with_slope(products_CT, bias_T, walk)
            logprobs_CT = products_CT.sub_(logsumexp_N[rows, None])
            student_CT = logprobs_CT.exp()
            fixed_CT = _sink_ids(logprobs_CT, fixed, rows, tile)
            slope_CT = ctx.slopes(fixed_CT, logprobs_CT, student_CT.where(logprobs_CT > SUNK / 2, 0.0))
            # d log s_v / d z_u is 1[u = v] - s_u: every slope is also taken off all logits, by the softmax.
            grad_CT: Tensor = slope_CT.sub_(student_CT.mul_(slope_N[rows, None])).mul_(grad_N[rows, None])
            return through_logits(grad_CT, inner_CT, walk)

        with torch.autocast(grad_N.device.type, enabled=False):
            gradients = propagate_tiles(inputs, walk, ctx.needs_input_grad[:3], gradient_of)
        return (*gradients, None, None, None, None)


def _sink_ids(logprobs_CT: Tensor, fixed: Fixed, rows: slice, tile: slice) -> Tensor:
    """The fixed side's log-probabilities of a tile; tokens left out vanish from them and the student's."""
    fixed_CT = torch.add(fixed.shift_N[rows, None], fixed.log_shape_V[tile]).to(logprobs_CT.dtype)
    ids_CK = fixed.ids_NK[rows]
    is_here_CK = (ids_CK >= tile.start) & (ids_CK < tile.stop)
    # An id of another tile adds 0 to whatever column it is given.
    column_CK = (ids_CK - tile.start).clamp_(0, logprobs_CT.shape[1] - 1)
    for side_CT in (fixed_CT, logprobs_CT):
        side_CT.scatter_add_(1, column_CK, is_here_CK.to(side_CT.dtype) * SUNK)
    return fixed_CT
