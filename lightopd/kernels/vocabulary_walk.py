"""Walks [N, V] logits in tiles of [C, T], forward and backward, and never holds more than a few tiles.

The tokens requested at a position are kept apart from all others, and running sums cover the others only. The
mass outside a set of requested tokens is then a sum of positive terms and never `1 - sum`, so a tail of 1e-12
is as exact as one of 0.5. The vocabulary is the outer loop and the positions are the inner one: a tile of the
head is read and converted once per pass, and its gradient is complete, in float32, before the next tile
begins.
"""

# N = positions, D = hidden size, V = vocabulary, K = own top-k
# U = slots for the distinct ids requested at a position (as many slots as ids requested)
# C = positions in one chunk, T = tokens in one tile

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Stand-ins for minus infinity that stay finite, so that 0 * value is 0 and not NaN. Inside a tile the logits
# of requested tokens are sunk to SUNK; a running maximum starts at FLOOR, so exp(SUNK - maximum) is 0 even
# where every token was requested.
SUNK = -1e30
FLOOR = -1e20


class Inputs(NamedTuple):
    """What the logits are made of."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None


class Walk(NamedTuple):
    """How the logits are made, and in which pieces.

    logits = softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature, in `dtype`; the factors of
    each matrix product are held in `operand_dtype`.
    """

    softcap: float | None
    temperature: float
    chunk_tokens: int
    tile_vocab: int
    dtype: torch.dtype
    operand_dtype: torch.dtype


class VocabularySums(NamedTuple):
    """Sums over the tokens that were not requested, and the logits of those that were.

    sum_N adds up exp(z - max_N) and moment_N adds up exp(z - max_N) * (z - max_N). An empty sum leaves max_N
    at FLOOR. requested_NU is minus infinity in slots without a token.
    """

    max_N: Tensor
    sum_N: Tensor
    moment_N: Tensor
    requested_NU: Tensor
    top_ids_NK: Tensor
    top_logits_NK: Tensor


class LogitGradient(NamedTuple):
    """Gradient of the loss by every logit, in closed form.

    It is scale_N * exp(z - max_N) for a token that was not requested and requested_NU for one that was.
    """

    max_N: Tensor
    scale_N: Tensor
    requested_NU: Tensor


class Gradients(NamedTuple):
    """Gradients by the three inputs; None where nobody needs one."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


def vocabulary_sums(inputs: Inputs, ids_NU: Tensor, walk: Walk, own_top_k: int) -> VocabularySums:
    """First pass: sums over all logits, and the logits of the tokens requested.

    Args:
        inputs: any float dtypes.
        ids_NU: int64, distinct within a row, -1 in slots without a token.
        walk: form of the logits and size of the pieces.
        own_top_k: how many of the largest logits to keep at each position, 0 for none.
    """
    sums = _empty_sums(inputs.hidden_ND, ids_NU, walk, own_top_k)
    logits_buffer, exp_buffer = _tile_buffer(inputs, walk), _tile_buffer(inputs, walk)
    for tile in _slices(inputs.weight_VD.shape[0], walk.tile_vocab):
        weight_TD, bias_T = _tile_of_head(inputs, tile, walk)
        for rows in _slices(inputs.hidden_ND.shape[0], walk.chunk_tokens):
            logits_CT = _tile_logits(inputs.hidden_ND[rows], weight_TD, bias_T, walk, logits_buffer)
            part = VocabularySums(*(field[rows] for field in sums))
            if own_top_k:
                _merge_top_k(part, logits_CT, tile.start)
            column_CU, is_inside_CU = _locate(ids_NU[rows], tile)
            torch.where(
                is_inside_CU, logits_CT.gather(1, column_CU), part.requested_NU, out=part.requested_NU
            )
            _sink(logits_CT, column_CU, is_inside_CU)
            _absorb(part, logits_CT, exp_buffer)
    return sums


def propagate(
    inputs: Inputs, ids_NU: Tensor, walk: Walk, gradient: LogitGradient, wanted: tuple[bool, bool, bool]
) -> Gradients:
    """Second pass: recompute each tile, turn it into its gradient, and multiply that into what needs one.

    Args:
        inputs: as in the first pass, like `ids_NU` and `walk`.
        ids_NU: int64, distinct within a row, -1 in slots without a token.
        walk: form of the logits and size of the pieces.
        gradient: by the logits as they are after softcap and temperature.
        wanted: whether hidden, weight and bias need a gradient.

    Sums over positions and over the vocabulary are kept in `walk.dtype` and rounded once, at the end.
    """
    totals = _empty_gradients(inputs, walk, wanted)
    buffer = _tile_buffer(inputs, walk)
    for tile in _slices(inputs.weight_VD.shape[0], walk.tile_vocab):
        weight_TD, bias_T = _tile_of_head(inputs, tile, walk)
        sums = _tile_sums(totals, tile, walk)
        for rows in _slices(inputs.hidden_ND.shape[0], walk.chunk_tokens):
            hidden_CD = inputs.hidden_ND[rows]
            grad_CT = _tile_logits(hidden_CD, weight_TD, bias_T, walk, buffer)
            part = LogitGradient(*(field[rows] for field in gradient))
            _turn_into_gradient(grad_CT, part, walk, *_locate(ids_NU[rows], tile))
            _add_products(sums, grad_CT, hidden_CD, weight_TD, rows, walk)
        _store_tile(totals, sums, tile)
    if totals.hidden_ND is None:
        return totals
    return totals._replace(hidden_ND=totals.hidden_ND.to(inputs.hidden_ND.dtype))


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _tile_buffer(inputs: Inputs, walk: Walk) -> Tensor:
    """Room for the largest tile; reused, because fresh pages cost as much as the arithmetic on them."""
    num_rows = min(walk.chunk_tokens, inputs.hidden_ND.shape[0])
    num_columns = min(walk.tile_vocab, inputs.weight_VD.shape[0])
    return inputs.hidden_ND.new_empty(num_rows * num_columns, dtype=walk.dtype)


def _view_of(buffer: Tensor, num_rows: int, num_columns: int) -> Tensor:
    return buffer[: num_rows * num_columns].view(num_rows, num_columns)


def _empty_sums(hidden_ND: Tensor, ids_NU: Tensor, walk: Walk, own_top_k: int) -> VocabularySums:
    num_positions = hidden_ND.shape[0]

    def filled(value: float, *shape: int) -> Tensor:
        return hidden_ND.new_full((num_positions, *shape), value, dtype=walk.dtype)

    return VocabularySums(
        max_N=filled(FLOOR),
        sum_N=filled(0.0),
        moment_N=filled(0.0),
        requested_NU=filled(-torch.inf, ids_NU.shape[1]),
        top_ids_NK=ids_NU.new_full((num_positions, own_top_k), -1),
        top_logits_NK=filled(-torch.inf, own_top_k),
    )


def _tile_of_head(inputs: Inputs, tile: slice, walk: Walk) -> tuple[Tensor, Tensor | None]:
    bias_T = None if inputs.bias_V is None else inputs.bias_V[tile]
    return inputs.weight_VD[tile].to(walk.operand_dtype), bias_T


def _tile_logits(
    hidden_CD: Tensor, weight_TD: Tensor, bias_T: Tensor | None, walk: Walk, buffer: Tensor
) -> Tensor:
    logits_CT = _view_of(buffer, hidden_CD.shape[0], weight_TD.shape[0])
    if walk.operand_dtype == walk.dtype:
        torch.mm(hidden_CD.to(walk.dtype), weight_TD.t(), out=logits_CT)
    else:
        logits_CT.copy_(torch.mm(hidden_CD, weight_TD.t(), out_dtype=walk.dtype))
    if bias_T is not None:
        logits_CT.add_(bias_T)
    if walk.softcap is not None:
        logits_CT.div_(walk.softcap).tanh_().mul_(walk.softcap)
    if walk.temperature != 1.0:
        logits_CT.div_(walk.temperature)
    return logits_CT


def _add_product(sums: Tensor, left: Tensor, right: Tensor, walk: Walk) -> None:
    """Add left @ right, whose factors may be rounded to `operand_dtype` while the product is not."""
    left, right = left.to(walk.operand_dtype), right.to(walk.operand_dtype)
    if walk.operand_dtype == walk.dtype:
        sums.addmm_(left, right)
    else:
        sums.add_(torch.mm(left, right, out_dtype=walk.dtype))


def _locate(ids_CU: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Column of each id within the tile, or some valid column with False where it lies elsewhere."""
    is_inside_CU = (ids_CU >= tile.start) & (ids_CU < tile.stop)
    return (ids_CU - tile.start).clamp_(0, tile.stop - tile.start - 1), is_inside_CU


def _sink(logits_CT: Tensor, column_CU: Tensor, is_inside_CU: Tensor) -> None:
    """Take requested tokens out of the tile; ids of other tiles add 0 to whatever column they were given."""
    logits_CT.scatter_add_(1, column_CU, is_inside_CU.to(logits_CT.dtype) * SUNK)


def _absorb(part: VocabularySums, logits_CT: Tensor, exp_buffer: Tensor) -> None:
    """Add a tile to the running sums of its rows; the tile is spent afterwards."""
    max_C = torch.maximum(part.max_N, logits_CT.amax(1))
    logits_CT.sub_(max_C[:, None])
    exp_CT = torch.exp(logits_CT, out=_view_of(exp_buffer, *logits_CT.shape))
    shift_C = part.max_N - max_C
    scale_C = shift_C.exp()
    part.moment_N.addcmul_(part.sum_N, shift_C).mul_(scale_C).add_(torch.linalg.vecdot(exp_CT, logits_CT))
    part.sum_N.mul_(scale_C).add_(exp_CT.sum(1))
    part.max_N.copy_(max_C)


def _merge_top_k(part: VocabularySums, logits_CT: Tensor, start: int) -> None:
    own_top_k = part.top_logits_NK.shape[1]
    logits_CK, column_CK = logits_CT.topk(min(own_top_k, logits_CT.shape[1]))
    candidates = torch.cat([part.top_logits_NK, logits_CK], dim=1)
    candidate_ids = torch.cat([part.top_ids_NK, column_CK + start], dim=1)
    best, place = candidates.topk(own_top_k)
    part.top_logits_NK.copy_(best)
    part.top_ids_NK.copy_(candidate_ids.gather(1, place))


def _turn_into_gradient(
    logits_CT: Tensor, part: LogitGradient, walk: Walk, column_CU: Tensor, is_inside_CU: Tensor
) -> None:
    """Overwrite a tile's logits with the loss gradient by hidden @ weight.T + bias."""
    slope_CT = None
    if walk.softcap is not None:
        slope_CT = 1 - (logits_CT * (walk.temperature / walk.softcap)).square_()
    _sink(logits_CT, column_CU, is_inside_CU)
    logits_CT.sub_(part.max_N[:, None]).exp_().mul_(part.scale_N[:, None])
    logits_CT.scatter_add_(1, column_CU, torch.where(is_inside_CU, part.requested_NU, 0.0))
    if slope_CT is not None:
        logits_CT.mul_(slope_CT)
    if walk.temperature != 1.0:
        logits_CT.div_(walk.temperature)


def _empty_gradients(inputs: Inputs, walk: Walk, wanted: tuple[bool, bool, bool]) -> Gradients:
    """Sums for hidden, which grow with every tile; uninitialised room for the others, stored tile by tile."""
    hidden_ND, weight_VD, bias_V = inputs
    return Gradients(
        hidden_ND=torch.zeros_like(hidden_ND, dtype=walk.dtype) if wanted[0] else None,
        weight_VD=torch.empty_like(weight_VD) if wanted[1] else None,
        bias_V=torch.empty_like(bias_V) if wanted[2] and bias_V is not None else None,
    )


def _tile_sums(totals: Gradients, tile: slice, walk: Walk) -> Gradients:
    """The totals of hidden, and zeros in the dtype of sums for one tile of the others."""

    def zeros(total: Tensor | None) -> Tensor | None:
        if total is None:
            return None
        if total.dtype == walk.dtype:
            return total[tile].zero_()
        return torch.zeros_like(total[tile], dtype=walk.dtype)

    return totals._replace(weight_VD=zeros(totals.weight_VD), bias_V=zeros(totals.bias_V))


def _add_products(
    sums: Gradients, grad_CT: Tensor, hidden_CD: Tensor, weight_TD: Tensor, rows: slice, walk: Walk
) -> None:
    if sums.hidden_ND is not None:
        _add_product(sums.hidden_ND[rows], grad_CT, weight_TD, walk)
    if sums.weight_VD is not None:
        _add_product(sums.weight_VD, grad_CT.t(), hidden_CD, walk)
    if sums.bias_V is not None:
        sums.bias_V.add_(grad_CT.sum(0))


def _store_tile(totals: Gradients, sums: Gradients, tile: slice) -> None:
    """Round the sums of a tile to the dtype of its input; sums in that dtype are already in place."""
    for total, part in ((totals.weight_VD, sums.weight_VD), (totals.bias_V, sums.bias_V)):
        if total is not None and part is not None and total.dtype != part.dtype:
            total[tile] = part
