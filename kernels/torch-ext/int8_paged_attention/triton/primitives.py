"""Jitted building blocks that the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

#: Adding and subtracting 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to the nearest integer, ties to even.
ROUNDING = tl.constexpr(12582912.0)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def round_half_even(x):
    """Nearest integer of float32 ``x``, as float32; ``|x|`` must be below 2**22."""
    return (x + ROUNDING) - ROUNDING


@triton.jit
def butterflies(x, ROWS: tl.constexpr, DIMS: tl.constexpr, DISTANCE: tl.constexpr):
    """``(a + b, a - b)`` of all elements a, b of a row that lie DISTANCE apart."""
    pairs = tl.permute(tl.reshape(x, (ROWS, DIMS // (2 * DISTANCE), 2, DISTANCE)), (0, 1, 3, 2))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, DIMS))


@triton.jit
def hadamard(x, ROWS: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of ``x``, float32 ``[ROWS, DIMS]``, times the orthonormal Hadamard matrix with blocks of BLOCK, up to 256.

    The operations of `conditioning.hadamard` in their order, so the bits are the same.
    """
    for step in tl.static_range(8):
        if (1 << step) < BLOCK:
            x = butterflies(x, ROWS, DIMS, 1 << step)
    return x * (BLOCK**-0.5)


@triton.jit
def block_ids(table_row_ptr, logical, covered, num_blocks, first_block=0):
    """Physical blocks of logical ones, int64, counted from ``-first_block``, and which of them exist. A hole's id is no
    block's and reads as block 0."""
    ids = tl.load(table_row_ptr + logical, mask=covered, other=-1)
    there = (ids >= 0) & (ids < num_blocks)
    return (tl.where(there, ids, 0) + first_block).to(tl.uint32).to(tl.int64), there


@triton.jit
def first_positions(
    sequence,
    first_ptr,
    stop_ptr,
    kv_start_ptr,
    key_mask_ptr,
    key_mask_start,
    key_mask_width,
    key_mask_stride,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Positions ``[TILE]`` of a sequence's COUNT first tokens; which exist and are admitted for all rows."""
    tokens = tl.load(first_ptr + sequence) + tl.arange(0, TILE)
    seen = (tl.arange(0, TILE) < COUNT) & (tokens < tl.load(stop_ptr + sequence))
    if kv_start_ptr is not None:
        seen &= tokens >= tl.load(kv_start_ptr + sequence)
    if key_mask_ptr is not None:
        columns = tokens - key_mask_start
        known = (columns >= 0) & (columns < key_mask_width)
        seen &= tl.load(key_mask_ptr + sequence * key_mask_stride + columns, mask=known, other=0) != 0
    return tokens, seen


@triton.jit
def exponent_shift(highest):
    """What to subtract from base-2 scores before exponentiation: their maximum, or 0 where nothing was seen."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def tanh(x):
    """Hyperbolic tangent with an absolute error of a few float32 steps."""
    return 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2_E)) + 1.0)
