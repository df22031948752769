"""Rows of new keys and values on their way into the blocks: loaded, rotated and quantized.

While it is computed, a tile of rows is ``[runs, rows, RUN]``: element ``RUN * i + j`` of row r stands at ``[i, r, j]``.
The first steps of the rotation join elements of a run, which one thread loads; the others join whole runs, which in
that shape Triton lays into one thread. So in half precision the elements change hands once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import ROUNDING

#: Consecutive elements of a row that a thread loads at once: 16 bytes in half precision.
RUN = tl.constexpr(8)
#: Adding and subtracting 1.5 * 2**22 rounds a float32 of magnitude below 2**21 to the nearest half.
HALVES = tl.constexpr(6291456.0)
#: Mask of a float32's sign, exponent and first bits.
TWELVE_BITS = tl.constexpr(-4096)
FLOAT16_MAX = tl.constexpr(65504.0)
#: Bits of a float32's infinity; those of a NaN are more.
INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def elements(RUNS: tl.constexpr):
    """The elements of a row, ``[1, RUNS, RUN]``."""
    return tl.arange(0, RUNS)[None, :, None] * RUN + tl.arange(0, RUN)[None, None, :]


@triton.jit
def load_rows(ptr, tokens, new, token_stride, dim_stride, DIM: tl.constexpr, RUNS: tl.constexpr):
    """Rows of one head, float32 ``[rows, RUNS, RUN]``, 0 where there is no new token and past DIM."""
    dims = elements(RUNS)
    ptrs = ptr + tokens.to(tl.int64)[:, None, None] * token_stride + dims * dim_stride
    return tl.load(ptrs, mask=new[:, None, None] & (dims < DIM), other=0.0).to(tl.float32)


@triton.jit
def butterflies(x, ROWS: tl.constexpr, RUNS: tl.constexpr, DISTANCE: tl.constexpr):
    """``(a + b, a - b)`` of all elements a, b of a row that lie DISTANCE apart."""
    if DISTANCE < RUN:
        pairs = tl.reshape(x, (RUNS, ROWS, RUN // (2 * DISTANCE), 2, DISTANCE))
        a, b = tl.split(tl.permute(pairs, (0, 1, 2, 4, 3)))
        x = tl.permute(tl.join(a + b, a - b), (0, 1, 2, 4, 3))
    else:
        pairs = tl.reshape(x, (RUNS * RUN // (2 * DISTANCE), 2, DISTANCE // RUN, ROWS, RUN))
        a, b = tl.split(tl.permute(pairs, (0, 2, 3, 4, 1)))
        x = tl.permute(tl.join(a + b, a - b), (0, 4, 1, 2, 3))
    return tl.reshape(x, (RUNS, ROWS, RUN))


@triton.jit
def rotated(x, ROWS: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a tile times the orthonormal Hadamard matrix with blocks of BLOCK, up to 256.

    The operations of `conditioning.hadamard` in their order, so the bits are the same.
    """
    for step in tl.static_range(8):
        if (1 << step) < BLOCK:
            x = butterflies(x, ROWS, RUNS, 1 << step)
    return x * (BLOCK**-0.5)


@triton.jit
def conditioned(rows, ROWS: tl.constexpr, RUNS: tl.constexpr, ROTATED: tl.constexpr):
    """Float32 rows ``[rows, RUNS, RUN]`` -> rotated and quantized int8 of that shape, and float16 scales ``[rows]``."""
    x = tl.permute(rows, (1, 0, 2))
    if ROTATED > 1:
        x = rotated(x, ROWS, RUNS, ROTATED)
    values, scales = quantized(x)
    return tl.permute(values, (1, 0, 2)), scales


@triton.jit
def quantized(x):
    """A float32 tile -> an int8 tile and float16 scales ``[rows]``: the bits of `formats.Int8`.

    The format divides in float32, by 127 and by the scale, which has at most 11 bits, and an IEEE division takes three
    times as many operations. Here each quotient is first found to so few bits that its product with the divisor is
    exact, and what is left of the dividend corrects it. That yields the float32 quotient by 127, and every element's
    side of the halves: no quotient of a float32 by so short a number is rounded to a half unless it is one.
    """
    largest = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0), axis=1)
    finite = largest < INFINITY
    largest = tl.minimum(largest.to(tl.float32, bitcast=True), 127.0 * FLOAT16_MAX)
    near = ((largest * (1.0 / 127.0)).to(tl.int32, bitcast=True) & TWELVE_BITS).to(tl.float32, bitcast=True)
    scales = (near + (largest - 127.0 * near) * (1.0 / 127.0)).to(tl.float16)
    usable = finite & (scales > 0)
    step = tl.where(usable, scales.to(tl.float32), 1.0)
    most = tl.where(usable, 127.0 * step, 0.0)[None, :, None]
    inverse = tl.broadcast_to((1.0 / step)[None, :, None], x.shape)
    x = tl.minimum(tl.maximum(x, -most), most)
    halves = tl.fma(x, inverse, HALVES) - HALVES
    rest = tl.fma(-halves, tl.broadcast_to(step[None, :, None], x.shape), x)
    quotient = tl.fma(rest, inverse, halves) + ROUNDING
    # The last byte of such a sum is the integer that it was rounded to.
    return quotient.to(tl.int32, bitcast=True).to(tl.int8), tl.where(finite, scales, float("nan"))
