"""A divergence over the whole vocabulary between a live head and a frozen one, walked side by side.

Both sides are hidden states and a head, of unequal sizes and one vocabulary. The frozen side's logits are
made again wherever they are read, as the live side's are, so that no [N, V] tensor exists and memory does not
grow with positions times vocabulary.
"""

# N = positions, D = hidden size of the live side, E = of the frozen side, V = vocabulary
# C = positions in one chunk, T = tokens in one tile

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightopd.kernels.plain_tiles import finish_with_slope, through_logits
from lightopd.kernels.selected_logprobs import plan_walk
from lightopd.kernels.tile_types import Inputs, Walk
from lightopd.kernels.vocabulary_walk import LogitTiles, propagate_tiles, visit_tiles

TileSums = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From log T, log s and s of a tile, [C, T] each: its sums of terms and of their slopes, [C] each."""

TileSlopes = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the same three: the derivative of every term by its log s, [C, T]."""


class Divergence(NamedTuple):
    """A sum over the vocabulary of a term of log T and log s; both functions may overwrite these two."""

    sums: TileSums
    slopes: TileSlopes


class Frozen(NamedTuple):
    """The side that the live one is compared with; nothing here gets a gradient."""

    hidden_NE: Tensor
    """Any float dtype."""
    head_VE: Tensor
    """Any float dtype."""
    logsumexp_N: Tensor
    """Normaliser of its logits, from `selected_logprobs` with the same options."""
    bias_V: Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0


def divergence_of_heads(
    hidden_ND: Tensor,
    head_VD: Tensor,
    logsumexp_N: Tensor,
    frozen: Frozen,
    divergence: Divergence,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    tile_vocab: int | None = None,
) -> Tensor:
    """Sum of the divergence's terms over the whole vocabulary, [N]; differentiable by the live side.

    The logits are those of `selected_logprobs`, in the same formats. Both passes recompute them.

    Args:
        hidden_ND: last hidden states, after the final norm; any float dtype.
        head_VD: output projection; any float dtype.
        logsumexp_N: normaliser of the logits, from `selected_logprobs` with the same options. Its own
            dependence on the logits is part of the gradient here, so that it needs none.
        frozen: the other side.
        divergence: what is summed.
        bias_V: added before the softcap.
        softcap: c in c * tanh(z / c); None for none.
        temperature: divides the logits after the softcap.
        chunk_tokens: positions per tile; changes speed and memory, not results.
        tile_vocab: vocabulary entries per tile; changes speed and memory, not results.

    Raises:
        ValueError: the heads have different vocabularies, the sides different positions, or a number is out
            of range.
    """
    if len(frozen.head_VE) != len(head_VD) or len(frozen.hidden_NE) != len(hidden_ND):
        raise ValueError(
            f"the frozen side has {len(frozen.hidden_NE)} positions and {len(frozen.head_VE)} vocabulary "
            f"entries, the live side {len(hidden_ND)} and {len(head_VD)}"
        )
    if frozen.hidden_NE.shape[1] != frozen.head_VE.shape[1]:
        raise ValueError(
            f"hidden {tuple(frozen.hidden_NE.shape)} and head {tuple(frozen.head_VE.shape)} of the frozen "
            "side must be [N, E] and [V, E]"
        )
    inputs = Inputs(hidden_ND, head_VD, bias_V)
    walk = plan_walk(inputs, softcap, temperature, chunk_tokens, tile_vocab, False)
    value_N = _TwoHeads.apply(  # type: ignore[no-untyped-call]
        *inputs, walk, logsumexp_N.detach(), frozen, divergence
    )
    return cast(Tensor, value_N)


class _TwoHeads(torch.autograd.Function):
    """Two walks: the sums of terms and of their slopes, then the gradient by every logit."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        walk: Walk,
        logsumexp_N: Tensor,
        frozen: Frozen,
        divergence: Divergence,
    ) -> Tensor:
        inputs = Inputs(hidden_ND, weight_VD, bias_V)
        value_N = torch.zeros(len(hidden_ND), dtype=walk.dtype, device=hidden_ND.device)
        slope_N = torch.zeros_like(value_N)
        frozen_tiles = _FrozenTiles(frozen, walk)

        def visit(logits_CT: Tensor, rows: slice, tile: slice) -> None:
            logprobs_CT = logits_CT.sub_(logsumexp_N[rows, None])
            frozen_CT = frozen_tiles.logprobs(rows, tile)
            terms_C, slopes_C = divergence.sums(frozen_CT, logprobs_CT, logprobs_CT.exp())
            value_N[rows] += terms_C
            slope_N[rows] += slopes_C

        with torch.autocast(hidden_ND.device.type, enabled=False):
            visit_tiles(inputs, walk, visit)
        ctx.walk, ctx.slopes = walk, divergence.slopes
        ctx.form = (frozen.softcap, frozen.temperature)
        ctx.save_for_backward(*inputs, *frozen[:4], logsumexp_N, slope_N)
        return value_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        inputs, frozen = Inputs(*saved[:3]), Frozen(*saved[3:7], *ctx.form)
        logsumexp_N, slope_N = saved[7:]
        walk: Walk = ctx.walk
        frozen_tiles = _FrozenTiles(frozen, walk)

        def gradient_of(products_CT: Tensor, bias_T: Tensor | None, rows: slice, tile: slice) -> Tensor:
            inner_CT = finish_with_slope(products_CT, bias_T, walk)
            logprobs_CT = products_CT.sub_(logsumexp_N[rows, None])
            student_CT = logprobs_CT.exp()
            slope_CT = ctx.slopes(frozen_tiles.logprobs(rows, tile), logprobs_CT, student_CT)
            # d log s_v / d z_u is 1[u = v] - s_u: every slope is also taken off all logits, by the softmax.
            grad_CT: Tensor = slope_CT.sub_(student_CT.mul_(slope_N[rows, None])).mul_(grad_N[rows, None])
            return through_logits(grad_CT, inner_CT, walk)

        with torch.autocast(grad_N.device.type, enabled=False):
            gradients = propagate_tiles(inputs, walk, ctx.needs_input_grad[:3], gradient_of)
        return (*gradients, None, None, None, None)


class _FrozenTiles:
    """Log-probabilities of the frozen side, on the division of the live side's walk."""

    def __init__(self, frozen: Frozen, walk: Walk) -> None:
        inputs = Inputs(frozen.hidden_NE, frozen.head_VE, frozen.bias_V)
        sizes = (walk.chunk_tokens, walk.tile_vocab)
        own = plan_walk(inputs, frozen.softcap, frozen.temperature, *sizes, False)
        self._tiles, self._logsumexp_N, self._dtype = LogitTiles(inputs, own), frozen.logsumexp_N, walk.dtype

    def logprobs(self, rows: slice, tile: slice) -> Tensor:
        """log T of a tile, [C, T], in the live side's dtype."""
        logprobs_CT = self._tiles.read(rows, tile).sub_(self._logsumexp_N[rows, None])
        return logprobs_CT.to(self._dtype)
