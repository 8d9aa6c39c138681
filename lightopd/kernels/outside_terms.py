"""Sums over the vocabulary, outside a few tokens, of terms of the student against one fixed distribution.

A divergence over the whole vocabulary is a sum over the tokens that the teacher kept, which are few, and over
all others, where the teacher is one fixed vector times a number of the position. This is the second sum, for
any term that is a function of the two log-probabilities, with its gradient, and without an [N, V] tensor.
"""

# N = positions, D = hidden size, V = vocabulary, K = tokens left out of the sum at a position
# C = positions in one chunk, T = tokens in one tile

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightopd.kernels.plain_tiles import finish_logits
from lightopd.kernels.selected_logprobs import plan_walk
from lightopd.kernels.tile_types import Inputs, Walk
from lightopd.kernels.vocabulary_walk import propagate_tiles, visit_tiles

Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the fixed side's log-probabilities and the student's, of one shape: a term for each token, and its
derivative by the student's. Both are fresh tensors, finite for finite log-probabilities."""


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
    terms: Terms,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    tile_vocab: int | None = None,
) -> Tensor:
    """Sum of terms(log T_v, log s_v) over the tokens outside `fixed.ids_NK`, [N]; differentiable.

    The logits are those of `selected_logprobs`, in the same formats. Both passes recompute them.

    Args:
        hidden_ND: last hidden states, after the final norm; any float dtype.
        head_VD: output projection; any float dtype.
        fixed: the other distribution; it gets no gradient.
        logsumexp_N: normaliser of the logits, from `selected_logprobs` with the same options. Its own
            dependence on the logits is part of the gradient here, so that it needs none.
        terms: what is summed; see `differentiated`.
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
    value_N = _OutsideTerms.apply(*inputs, walk, fixed, logsumexp_N.detach(), terms)  # type: ignore[no-untyped-call]
    return cast(Tensor, value_N)


def differentiated(function: Callable[[Tensor, Tensor], Tensor]) -> Terms:
    """The slopes by autograd, of a function that gives the terms alone."""

    def terms(fixed_CT: Tensor, logprobs_CT: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf_CT = logprobs_CT.detach().requires_grad_()
            terms_CT = function(fixed_CT, leaf_CT)
            (slope_CT,) = torch.autograd.grad(terms_CT.sum(), leaf_CT)
        return terms_CT.detach(), slope_CT

    return terms


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
        terms: Terms,
    ) -> Tensor:
        inputs = Inputs(hidden_ND, weight_VD, bias_V)
        value_N = torch.zeros(len(hidden_ND), dtype=walk.dtype, device=hidden_ND.device)
        slope_N = torch.zeros_like(value_N)

        def visit(logits_CT: Tensor, rows: slice, tile: slice) -> None:
            terms_CT, slope_CT = _terms_of(terms, logits_CT.sub_(logsumexp_N[rows, None]), fixed, rows, tile)
            value_N[rows] += terms_CT.sum(1)
            slope_N[rows] += slope_CT.sum(1)

        with torch.autocast(hidden_ND.device.type, enabled=False):
            visit_tiles(inputs, walk, visit)
        ctx.walk, ctx.terms = walk, terms
        ctx.save_for_backward(*inputs, *fixed, logsumexp_N, slope_N)
        return value_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, fixed, logsumexp_N, slope_N = Inputs(*saved[:3]), Fixed(*saved[3:6]), saved[6], saved[7]
        walk: Walk = ctx.walk

        def gradient_of(products_CT: Tensor, bias_T: Tensor | None, rows: slice, tile: slice) -> Tensor:
            finish_logits(products_CT, bias_T, walk)
            inner_CT = None
            if walk.softcap is not None:
                inner_CT = 1 - (products_CT * (walk.temperature / walk.softcap)).square_()
            logprobs_CT = products_CT.sub_(logsumexp_N[rows, None])
            _, slope_CT = _terms_of(ctx.terms, logprobs_CT, fixed, rows, tile)
            # d log s_v / d z_u is 1[u = v] - s_u: every slope is also taken off all logits, by the softmax.
            grad_CT = slope_CT.sub_(logprobs_CT.exp_().mul_(slope_N[rows, None])).mul_(grad_N[rows, None])
            if inner_CT is not None:
                grad_CT.mul_(inner_CT)
            return grad_CT if walk.temperature == 1.0 else grad_CT.div_(walk.temperature)

        with torch.autocast(grad_N.device.type, enabled=False):
            gradients = propagate_tiles(inputs, walk, ctx.needs_input_grad[:3], gradient_of)
        return (*gradients, None, None, None, None)


def _terms_of(
    terms: Terms, logprobs_CT: Tensor, fixed: Fixed, rows: slice, tile: slice
) -> tuple[Tensor, Tensor]:
    """Terms of a tile and their derivatives by log s, both 0 at the tokens that are left out."""
    fixed_CT = (fixed.shift_N[rows, None] + fixed.log_shape_V[tile]).to(logprobs_CT.dtype)
    keep_CT = _is_outside(fixed.ids_NK[rows], tile, logprobs_CT)
    terms_CT, slope_CT = terms(fixed_CT, logprobs_CT)
    return terms_CT.mul_(keep_CT), slope_CT.mul_(keep_CT)


def _is_outside(ids_CK: Tensor, tile: slice, like_CT: Tensor) -> Tensor:
    """1 at the tokens of a tile that are summed, 0 at those that are left out."""
    keep_CT = torch.ones_like(like_CT)
    is_here_CK = (ids_CK >= tile.start) & (ids_CK < tile.stop)
    # An id of another tile takes 0 from whatever column it is given.
    column_CK = (ids_CK - tile.start).clamp_(0, like_CT.shape[1] - 1)
    return keep_CT.scatter_add_(1, column_CK, -is_here_CK.to(keep_CT.dtype))
