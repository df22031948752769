"""Jitted building blocks that the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

#: Adding and subtracting 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to the nearest integer, ties to even.
ROUNDING = tl.constexpr(12582912.0)
LOG2_E = tl.constexpr(1.4426950408889634)
FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
def round_half_even(x):
    """Nearest integer of float32 ``x``, as float32; ``|x|`` must be below 2**22."""
    return (x + ROUNDING) - ROUNDING


@triton.jit
def quantize_rows(x):
    """Float32 ``[rows, dim]`` -> integral float32 ``[rows, dim]`` and float16 scales ``[rows]``.

    The bits of `reference.quantize_rows`. The maximum ignores NaN on every target, so faults are found by a product
    with zero, which only finite numbers survive.
    """
    largest = tl.max(tl.abs(x), axis=1)
    finite = tl.sum(x * 0.0, axis=1) == 0.0
    scales = tl.minimum(tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)), FLOAT16_MAX).to(tl.float16)
    usable = finite & (scales > 0)
    divisor = tl.where(usable, scales.to(tl.float32), 1.0)
    kept = tl.where(usable[:, None], x, 0.0)
    quotient = tl.div_rn(kept, tl.broadcast_to(divisor[:, None], kept.shape))
    quantized = round_half_even(tl.minimum(tl.maximum(quotient, -127.0), 127.0))
    return quantized, tl.where(finite, scales, float("nan"))


@triton.jit
def block_ids(table_row_ptr, logical, covered, num_blocks):
    """Physical blocks of logical ones, and which of them exist: a hole's id is no block's."""
    ids = tl.load(table_row_ptr + logical, mask=covered, other=-1)
    return ids, (ids >= 0) & (ids < num_blocks)


@triton.jit
def exponent_shift(highest):
    """What to subtract from base-2 scores before exponentiation: their maximum, or 0 where nothing was seen."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def tanh(x):
    """Hyperbolic tangent with an absolute error of a few float32 steps."""
    return 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2_E)) + 1.0)
