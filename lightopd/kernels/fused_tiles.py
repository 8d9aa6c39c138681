"""What is done with one tile of logits, in one pass over it: the path of a GPU; results as `plain_tiles`."""

# C = positions in one chunk, T = tokens in one tile
# U = slots for the distinct ids requested at a position

from typing import Any

from torch import Tensor

from lightopd.kernels import triton_tiles
from lightopd.kernels.tile_types import LogitGradient, VocabularySums, Walk

BLOCK_TOKENS = 4096
"""Tokens that a program holds at a time: 16 numbers for each of its threads."""
NUM_WARPS = 8
INTERPRETED_ROWS = 64
"""Positions of one program on a CPU, where the interpreter takes as long for one as for many; a GPU: 1."""


def absorb(
    part: VocabularySums, products_CT: Tensor, bias_T: Tensor | None, ids_CU: Tensor, start: int, walk: Walk
) -> None:
    """Add a tile that begins at token `start` to the running sums of its rows; the tile is spent afterwards.

    Args:
        part: the chunk's rows, changed in place.
        products_CT: hidden @ weight.T in float32, contiguous.
        bias_T: added first, any float dtype.
        ids_CU: int64, distinct within a row, -1 in slots without a token.
        start: first token of the tile.
        walk: softcap and temperature.
    """
    triton_tiles.absorb_rows[_grid(products_CT)](
        products_CT,
        ids_CU,
        products_CT if bias_T is None else bias_T,
        part.max_N,
        part.sum_N,
        part.moment_N,
        part.requested_NU,
        len(products_CT),
        start,
        products_CT.shape[1],
        ids_CU.shape[1],
        **_options(bias_T, ids_CU, products_CT, walk),
    )


def turn_into_gradient(
    products_CT: Tensor, bias_T: Tensor | None, part: LogitGradient, ids_CU: Tensor, start: int, walk: Walk
) -> Tensor:
    """The loss gradient by hidden @ weight.T + bias, in `operand_dtype` and in the same memory.

    Returns:
        [C, T] in `walk.operand_dtype`; where that is half precision, rows are 2 T numbers apart.
    """
    width = products_CT.shape[1]
    grad_CT = products_CT.view(walk.operand_dtype)[:, :width]
    triton_tiles.gradient_rows[_grid(products_CT)](
        products_CT,
        grad_CT,
        ids_CU,
        products_CT if bias_T is None else bias_T,
        part.max_N,
        part.scale_N,
        part.requested_NU,
        len(products_CT),
        start,
        width,
        grad_CT.stride(0),
        ids_CU.shape[1],
        **_options(bias_T, ids_CU, products_CT, walk),
    )
    return grad_CT


def _rows(products_CT: Tensor) -> int:
    return INTERPRETED_ROWS if products_CT.device.type == "cpu" else 1


def _grid(products_CT: Tensor) -> tuple[int]:
    return (-(-len(products_CT) // _rows(products_CT)),)


def _options(bias_T: Tensor | None, ids_CU: Tensor, products_CT: Tensor, walk: Walk) -> dict[str, Any]:
    num_requested = ids_CU.shape[1]
    return {
        "softcap": 1.0 if walk.softcap is None else walk.softcap,
        "temperature": walk.temperature,
        "HAS_BIAS": bias_T is not None,
        "HAS_SOFTCAP": walk.softcap is not None,
        "HAS_TEMPERATURE": walk.temperature != 1.0,
        "ROWS": _rows(products_CT),
        "BLOCK_T": min(BLOCK_TOKENS, _power_of_two(products_CT.shape[1])),
        "BLOCK_U": _power_of_two(num_requested) if num_requested else 0,
        "num_warps": NUM_WARPS,
    }


def _power_of_two(number: int) -> int:
    """The smallest that is no less; at least 16, which spares compiling for every short tile."""
    return max(16, 1 << (number - 1).bit_length())
