"""Kernels of Triton's over one tile of logits: each number is read once.

A tile is float32 and contiguous. Programs are compared with `plain_tiles` by Triton's interpreter, which runs
them on a CPU, and compiled for a GPU by a test that needs none.
"""

# T = tokens in one tile, U = slots for the distinct ids requested at a position

import triton
import triton.language as tl

SUNK_BELOW = tl.constexpr(-1e29)
"""No logit is less; what is, was sunk."""
SUNK = tl.constexpr(-1e30)
SMALL = tl.constexpr(0.3)
"""Below it tanh is a series, which keeps its digits; above it 1 - 2 / (exp(2x) + 1) does."""


@triton.jit
def tanh(x):
    """To 5e-7 relative. `libdevice` has one that the interpreter cannot run."""
    square = x * x
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(tl.abs(x) < SMALL, x * series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def finish(
    product,
    bias,
    column,
    is_token,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """The logit that a product becomes, and its derivative by the product."""
    slope = 1.0
    if HAS_BIAS:
        product += tl.load(bias + column, mask=is_token, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        bent = tanh(product / softcap)
        product = softcap * bent
        slope = 1 - bent * bent
    if HAS_TEMPERATURE:
        product = product / temperature
        slope = slope / temperature
    return product, slope


@triton.jit
def locate(ids, row, is_row, start, width, num_requested, BLOCK_U: tl.constexpr):
    """Where each id that was requested stands in the slots, its column, and whether that is in the tile."""
    slot = tl.arange(0, BLOCK_U)[None, :]
    place = row * num_requested + slot
    found = tl.load(ids + place, mask=is_row & (slot < num_requested), other=-1)
    return place, found - start, (found >= start) & (found - start < width)


@triton.jit
def absorb_rows(
    logits,
    ids,
    bias,
    running_max,
    running_sum,
    running_moment,
    requested,
    num_rows,
    start,
    width,
    num_requested,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Running maximum, sum and moment of rows, without the requested tokens, whose logits are kept."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    is_row = row < num_rows
    base = logits + row * width
    if BLOCK_U > 0:
        place, column, is_inside = locate(ids, row, is_row, start, width, num_requested, BLOCK_U)
        own = tl.load(base + column, mask=is_inside, other=0.0)
        # Threads may hold copies of one slot: all have read before any of them sinks it.
        tl.debug_barrier()
        tl.store(base + column, SUNK, mask=is_inside)
        own, _own_slope = finish(
            own, bias, column, is_inside, softcap, temperature, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE
        )
        tl.store(requested + place, own, mask=is_inside)
        tl.debug_barrier()
    peak = tl.load(running_max + row, mask=is_row, other=0.0)
    total = tl.load(running_sum + row, mask=is_row, other=0.0)
    moment = tl.load(running_moment + row, mask=is_row, other=0.0)
    for first in range(0, width, BLOCK_T):
        token = (first + tl.arange(0, BLOCK_T))[None, :]
        product = tl.load(base + token, mask=is_row & (token < width), other=SUNK)
        logit, _slope = finish(
            product, bias, token, token < width, softcap, temperature, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE
        )
        # A softcap would lift what was sunk.
        logit = tl.where(product < SUNK_BELOW, SUNK, logit)
        highest = tl.maximum(peak, tl.max(logit, 1, keep_dims=True))
        below = logit - highest
        share = tl.exp(below)
        shift = peak - highest
        scale = tl.exp(shift)
        moment = (moment + total * shift) * scale + tl.sum(share * below, 1, keep_dims=True)
        total = total * scale + tl.sum(share, 1, keep_dims=True)
        peak = highest
    tl.store(running_max + row, peak, mask=is_row)
    tl.store(running_sum + row, total, mask=is_row)
    tl.store(running_moment + row, moment, mask=is_row)


@triton.jit
def gradient_rows(
    logits,
    gradient,
    ids,
    bias,
    row_max,
    row_scale,
    requested,
    num_rows,
    start,
    width,
    gradient_stride,
    num_requested,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Gradient by the products of rows, written over them: in half precision into a row's front half.

    A block of half-precision numbers ends where the block of float32 ones that it was made from ends, or
    before, so that only numbers of blocks already read are overwritten.
    """
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    is_row = row < num_rows
    base = logits + row * width
    target = gradient + row * gradient_stride
    if BLOCK_U > 0:
        place, column, is_inside = locate(ids, row, is_row, start, width, num_requested, BLOCK_U)
        own = tl.load(base + column, mask=is_inside, other=0.0)
        own, own_slope = finish(
            own, bias, column, is_inside, softcap, temperature, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE
        )
        own = tl.load(requested + place, mask=is_inside, other=0.0) * own_slope
    peak = tl.load(row_max + row, mask=is_row, other=0.0)
    factor = tl.load(row_scale + row, mask=is_row, other=0.0)
    for first in range(0, width, BLOCK_T):
        token = (first + tl.arange(0, BLOCK_T))[None, :]
        is_token = is_row & (token < width)
        product = tl.load(base + token, mask=is_token, other=0.0)
        # Other threads' numbers lie where this one writes.
        tl.debug_barrier()
        logit, slope = finish(
            product, bias, token, token < width, softcap, temperature, HAS_BIAS, HAS_SOFTCAP, HAS_TEMPERATURE
        )
        value = factor * tl.exp(logit - peak) * slope
        tl.store(target + token, value.to(gradient.dtype.element_ty), mask=is_token)
    if BLOCK_U > 0:
        # The loop gave tokens requested the gradient of others, which may be infinite there.
        tl.debug_barrier()
        tl.store(target + column, own.to(gradient.dtype.element_ty), mask=is_inside)
