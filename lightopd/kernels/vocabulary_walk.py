"""Walks [N, V] logits in tiles of [C, T], forward and backward, and never holds more than a few tiles.

The requested tokens of a position are kept apart from all others, and running sums cover the others only. The
mass outside a set of requested tokens is then a sum of positive terms and never `1 - sum`, so a tail of 1e-12
is as exact as one of 0.5. The vocabulary is the outer loop and the positions are the inner one: a tile of the
head is read and converted once per pass, and its gradient is complete, in float32, before the next begins.

What is done with one tile stands twice, in `plain_tiles` and, for a GPU, in `fused_tiles`.
"""

# N = positions, D = hidden size, V = vocabulary, K = own top-k
# U = slots for the distinct ids requested at a position (as many slots as ids requested)
# C = positions in one chunk, T = tokens in one tile

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightopd.kernels import plain_tiles
from lightopd.kernels.tile_types import (
    FLOOR,
    Gradients,
    Inputs,
    LogitGradient,
    Vectors,
    VocabularySums,
    Walk,
)

ROUNDED_AT_ONCE = 1 << 21
"""Sums that are rounded together."""

TileGradient = Callable[[Tensor, Tensor | None, slice, slice], Tensor]
"""From the products of a tile, the bias of its tokens, its rows and its tokens: the gradient [C, T]."""


def vocabulary_sums(
    inputs: Inputs, ids_NU: Tensor, walk: Walk, own_top_k: int, vectors: Vectors | None = None
) -> VocabularySums:
    """First pass: sums over all logits, and the logits of the tokens requested.

    Args:
        inputs: any float dtypes.
        ids_NU: int64, distinct within a row, -1 in slots without a token.
        walk: form of the logits and size of the pieces.
        own_top_k: how many of the largest logits to keep at each position, 0 for none.
        vectors: what else is summed against, where the walk is not fused; None for nothing.
    """
    ids_NU = ids_NU.contiguous()
    sums = _empty_statistics(inputs.hidden_ND, ids_NU, walk, own_top_k, vectors)
    buffer = _tile_buffer(inputs, walk)
    exp_buffer = None if walk.is_fused else _tile_buffer(inputs, walk)
    chunks = [
        (inputs.hidden_ND[rows], ids_NU[rows], VocabularySums(*(field[rows] for field in sums)))
        for rows in _slices(inputs.hidden_ND.shape[0], walk.chunk_tokens)
    ]
    with torch.cuda.device_of(inputs.hidden_ND):  # type: ignore[no-untyped-call]
        for tile in _slices(inputs.weight_VD.shape[0], walk.tile_vocab):
            weight_TD, bias_T = _tile_of_head(inputs, tile, walk)
            vectors_T = vectors and vectors.tile(tile)
            for hidden_CD, ids_CU, part in chunks:
                products_CT = _products(hidden_CD, weight_TD, walk, buffer)
                _absorb(part, products_CT, bias_T, ids_CU, tile.start, walk, exp_buffer, vectors_T)
    return sums


def propagate(
    inputs: Inputs,
    ids_NU: Tensor,
    walk: Walk,
    gradient: LogitGradient,
    wanted: tuple[bool, bool, bool],
    vectors: Vectors | None = None,
) -> Gradients:
    """Second pass: recompute each tile, turn it into its gradient, and multiply that into what needs one.

    Args:
        inputs: as in the first pass, like `ids_NU` and `walk`.
        ids_NU: int64, distinct within a row, -1 in slots without a token.
        walk: form of the logits and size of the pieces.
        gradient: by the logits as they are after softcap and temperature.
        wanted: whether hidden, weight and bias need a gradient.
        vectors: as in the first pass.

    Sums over positions and over the vocabulary are kept in `walk.dtype` and rounded once, at the end.
    """
    ids_NU = ids_NU.contiguous()

    def gradient_of(products_CT: Tensor, bias_T: Tensor | None, rows: slice, tile: slice) -> Tensor:
        part, vectors_T = gradient.rows(rows), vectors and vectors.tile(tile)
        return _gradient(products_CT, bias_T, part, ids_NU[rows], tile.start, walk, vectors_T)

    return propagate_tiles(inputs, walk, wanted, gradient_of)


def visit_tiles(inputs: Inputs, walk: Walk, visit: Callable[[Tensor, slice, slice], None]) -> None:
    """Show each tile of finished logits [C, T], with its rows and its tokens; it may be overwritten."""
    buffer = _tile_buffer(inputs, walk)
    with torch.cuda.device_of(inputs.hidden_ND):  # type: ignore[no-untyped-call]
        for tile in _slices(inputs.weight_VD.shape[0], walk.tile_vocab):
            weight_TD, bias_T = _tile_of_head(inputs, tile, walk)
            for rows in _slices(inputs.hidden_ND.shape[0], walk.chunk_tokens):
                products_CT = _products(inputs.hidden_ND[rows], weight_TD, walk, buffer)
                plain_tiles.finish_logits(products_CT, bias_T, walk)
                visit(products_CT, rows, tile)


class LogitTiles:
    """Tiles of the logits of a head that is walked beside another one, on the other's division.

    Args:
        inputs: any float dtypes.
        walk: form of these logits; its pieces are at least as large as those that will be read.
    """

    def __init__(self, inputs: Inputs, walk: Walk) -> None:
        self._inputs, self._walk = inputs, walk
        self._buffer = _tile_buffer(inputs, walk)
        self._start = -1
        self._head: tuple[Tensor, Tensor | None]

    def read(self, rows: slice, tile: slice) -> Tensor:
        """Finished logits [C, T], good until the next reading; they may be overwritten."""
        if tile.start != self._start:
            self._head, self._start = _tile_of_head(self._inputs, tile, self._walk), tile.start
        weight_TD, bias_T = self._head
        products_CT = _products(self._inputs.hidden_ND[rows], weight_TD, self._walk, self._buffer)
        plain_tiles.finish_logits(products_CT, bias_T, self._walk)
        return products_CT


def propagate_tiles(
    inputs: Inputs, walk: Walk, wanted: tuple[bool, bool, bool], gradient_of: TileGradient
) -> Gradients:
    """`propagate` for any gradient by hidden @ weight.T + bias that is known tile by tile.

    Args:
        inputs: any float dtypes.
        walk: form of the logits and size of the pieces.
        wanted: whether hidden, weight and bias need a gradient.
        gradient_of: makes a tile's gradient [C, T] of its products, which may be overwritten.
    """
    totals = _empty_gradients(inputs, walk, wanted)
    buffer = _tile_buffer(inputs, walk)
    chunks = [
        (rows, inputs.hidden_ND[rows]) for rows in _slices(inputs.hidden_ND.shape[0], walk.chunk_tokens)
    ]
    with torch.cuda.device_of(inputs.hidden_ND):  # type: ignore[no-untyped-call]
        for tile in _slices(inputs.weight_VD.shape[0], walk.tile_vocab):
            weight_TD, bias_T = _tile_of_head(inputs, tile, walk)
            sums = _tile_sums(totals, tile, walk)
            for rows, hidden_CD in chunks:
                products_CT = _products(hidden_CD, weight_TD, walk, buffer)
                grad_CT = gradient_of(products_CT, bias_T, rows, tile)
                _add_products(sums, grad_CT, hidden_CD, weight_TD, rows, walk)
            _store_tile(totals, sums, tile)
            del sums  # before the next tile's are made
    if totals.hidden_ND is None:
        return totals
    return totals._replace(hidden_ND=_rounded(totals.hidden_ND, inputs.hidden_ND.dtype))


def _absorb(
    part: VocabularySums,
    products_CT: Tensor,
    bias_T: Tensor | None,
    ids_CU: Tensor,
    start: int,
    walk: Walk,
    exp_buffer: Tensor | None,
    vectors: Vectors | None,
) -> None:
    own_top_k = part.top_logits_NK.shape[1]
    if own_top_k or exp_buffer is not None:
        plain_tiles.finish_logits(products_CT, bias_T, walk)
        bias_T, walk = None, walk._replace(softcap=None, temperature=1.0)
    if own_top_k:
        plain_tiles.merge_top_k(part, products_CT, start)
    if exp_buffer is not None:
        plain_tiles.absorb(part, products_CT, ids_CU, start, exp_buffer, vectors)
        return
    from lightopd.kernels import fused_tiles

    fused_tiles.absorb(part, products_CT, bias_T, ids_CU, start, walk)


def _gradient(
    products_CT: Tensor,
    bias_T: Tensor | None,
    part: LogitGradient,
    ids_CU: Tensor,
    start: int,
    walk: Walk,
    vectors: Vectors | None,
) -> Tensor:
    if not walk.is_fused:
        plain_tiles.finish_logits(products_CT, bias_T, walk)
        return plain_tiles.turn_into_gradient(products_CT, part, ids_CU, start, walk, vectors)
    from lightopd.kernels import fused_tiles

    return fused_tiles.turn_into_gradient(products_CT, bias_T, part, ids_CU, start, walk)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _tile_buffer(inputs: Inputs, walk: Walk) -> Tensor:
    """Room for the largest tile; reused, because fresh pages cost as much as the arithmetic on them."""
    num_rows = min(walk.chunk_tokens, inputs.hidden_ND.shape[0])
    num_columns = min(walk.tile_vocab, inputs.weight_VD.shape[0])
    return inputs.hidden_ND.new_empty(num_rows * num_columns, dtype=walk.dtype)


def _empty_statistics(
    hidden_ND: Tensor, ids_NU: Tensor, walk: Walk, own_top_k: int, vectors: Vectors | None
) -> VocabularySums:
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
        averages_NF=filled(0.0, 0 if vectors is None else len(vectors.averaged_FV)),
        weighed_NG=filled(0.0, 0 if vectors is None else len(vectors.weighing_GV)),
    )


def _tile_of_head(inputs: Inputs, tile: slice, walk: Walk) -> tuple[Tensor, Tensor | None]:
    bias_T = None if inputs.bias_V is None else inputs.bias_V[tile].contiguous()
    return inputs.weight_VD[tile].to(walk.operand_dtype), bias_T


def _products(hidden_CD: Tensor, weight_TD: Tensor, walk: Walk, buffer: Tensor) -> Tensor:
    """hidden @ weight.T in `walk.dtype`, in the buffer."""
    shape = (hidden_CD.shape[0], weight_TD.shape[0])
    products_CT = buffer[: shape[0] * shape[1]].view(shape)
    if walk.operand_dtype == walk.dtype:
        torch.mm(hidden_CD.to(walk.dtype), weight_TD.t(), out=products_CT)
    else:
        torch.mm(hidden_CD, weight_TD.t(), out_dtype=walk.dtype, out=products_CT)
    return products_CT


def _add_product(sums: Tensor, left: Tensor, right: Tensor, walk: Walk) -> None:
    """Add left @ right, whose factors may be rounded to `operand_dtype` while the product is not."""
    left, right = left.to(walk.operand_dtype), right.to(walk.operand_dtype)
    if walk.operand_dtype == walk.dtype:
        sums.addmm_(left, right)
    else:
        torch.addmm(sums, left, right, out_dtype=walk.dtype, out=sums)


def _empty_gradients(inputs: Inputs, walk: Walk, wanted: tuple[bool, bool, bool]) -> Gradients:
    """Sums for hidden, which grow with every tile; uninitialised room for the others, stored tile by tile."""
    hidden_ND, weight_VD, bias_V = inputs
    return Gradients(
        hidden_ND=torch.zeros(hidden_ND.shape, dtype=walk.dtype, device=hidden_ND.device)
        if wanted[0]
        else None,
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
        sums.bias_V.add_(grad_CT.sum(0, dtype=walk.dtype))


def _store_tile(totals: Gradients, sums: Gradients, tile: slice) -> None:
    """Round the sums of a tile to the dtype of its input; sums in that dtype are already in place."""
    for total, part in ((totals.weight_VD, sums.weight_VD), (totals.bias_V, sums.bias_V)):
        if total is not None and part is not None and total.dtype != part.dtype:
            total[tile] = part


def _rounded(sums_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums in a narrower dtype, in the front of their own memory: a second tensor would be the peak."""
    if sums_ND.dtype == dtype:
        return sums_ND
    wide = sums_ND.view(-1)
    narrow = wide.view(dtype)[: len(wide)]
    for piece in _slices(len(wide), ROUNDED_AT_ONCE):
        narrow[piece] = wide[piece].to(dtype)
    return narrow.view(sums_ND.shape)
