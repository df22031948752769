"""A query tile on its way to the matrix unit: loaded, rotated, split into int8 terms, in the order of `tiles`."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .primitives import butterflies, round_half_even
from .tiles import PART, STEPS, TINY, float16_term, int8_term


@triton.jit
def butterflies_between_threads(x, ROWS: tl.constexpr, DIMS: tl.constexpr, DISTANCE: tl.constexpr):
    """`primitives.butterflies` of elements in two threads, up to a rounding: both get the sum, by one shuffle, and the
    second thread the difference from it, ``a - b = (a + b) - 2 * b``."""
    pairs = tl.reshape(x, (ROWS, DIMS // (2 * DISTANCE), 2, DISTANCE))
    sums = tl.sum(pairs, axis=2, keep_dims=True)
    factor = tl.where(tl.arange(0, 2) == 0, 0.0, -2.0)[None, None, :, None]
    return tl.reshape(sums + factor * pairs, (ROWS, DIMS))


@triton.jit
def rotate_query(q, ROWS: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr, IN_THREAD: tl.constexpr):
    """`primitives.hadamard` of float32 ``[ROWS, DIMS]`` without a barrier; a thread holds IN_THREAD neighbours."""
    for step in tl.static_range(8):
        if (1 << step) < BLOCK:
            if (1 << step) < IN_THREAD:
                q = butterflies(q, ROWS, DIMS, 1 << step)
            else:
                q = butterflies_between_threads(q, ROWS, DIMS, 1 << step)
    return q * (BLOCK**-0.5)


@triton.jit
def split_query(q, ROWS: tl.constexpr, DIMS: tl.constexpr, THIRD_TERM: tl.constexpr, INTEGER: tl.constexpr):
    """Float32 ``[ROWS, DIMS]`` -> an operand ``[2 * ROWS, DIMS]``, what it leaves, and the rows' units.

    The operand holds the high over the low terms of q; what it leaves, whole numbers in float32 ``[ROWS, DIMS]``, is
    in 1/256 of the low terms' step. A fault in a row makes its unit NaN, and with it every score.
    """
    largest = tl.max(tl.abs(q), axis=1)
    is_high = (tl.arange(0, 2) == 0)[:, None, None]
    left = q
    if INTEGER:
        in_steps = q * tl.where(largest > TINY, STEPS / largest, 0.0)[:, None]
        steps = round_half_even(in_steps)
        terms = int8_term(steps.to(tl.int32)[None], is_high)
        unit = largest / STEPS
        if THIRD_TERM:
            left = tl.minimum(round_half_even((in_steps - steps) * 256.0), 127.0)
            unit *= 1.0 / 256.0
    else:
        terms = float16_term((q * tl.where(largest > TINY, 1.0 / largest, 0.0)[:, None])[None], is_high)
        unit = largest
    return tl.reshape(terms, (2 * ROWS, DIMS)), left, unit + tl.sum(q * 0.0, axis=1)


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first and the second half of the columns of ``[ROWS, COLUMNS]``."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def query_part(terms, STREAMS: tl.constexpr, ROWS: tl.constexpr):
    """``[2 * ROWS, PART]`` for every stream, in the order of `load_key_part`."""
    ordered = tl.permute(tl.reshape(terms, (2 * ROWS, 4, 2, 2, 4)), (0, 2, 3, 1, 4))
    ordered = tl.reshape(ordered, (1, 2 * ROWS, PART))
    return tl.broadcast_to(ordered, (STREAMS, 2 * ROWS, PART))


@triton.jit
def query_parts(terms, STREAMS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """PART columns each of ``[2 * ROWS, DIMS]``, as many as there are, 1 to 4."""
    if DIMS == PART:
        return (query_part(terms, STREAMS, ROWS),)
    else:
        first, second = halves(terms, 2 * ROWS, DIMS)
        if DIMS == 2 * PART:
            return query_part(first, STREAMS, ROWS), query_part(second, STREAMS, ROWS)
        else:
            a, b = halves(first, 2 * ROWS, DIMS // 2)
            c, d = halves(second, 2 * ROWS, DIMS // 2)
            return (
                query_part(a, STREAMS, ROWS),
                query_part(b, STREAMS, ROWS),
                query_part(c, STREAMS, ROWS),
                query_part(d, STREAMS, ROWS),
            )


@triton.jit
def parts_of_rest(left, STREAMS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr):
    """Operands for what `split_query` leaves, float32 ``[ROWS, DIMS]``, as `tiles.key_scores` takes them."""
    if DIMS == PART:
        rows = tl.reshape(tl.broadcast_to(left.to(tl.int8)[None], (2, ROWS, DIMS)), (2 * ROWS, DIMS))
        return (query_part(rows, STREAMS, ROWS),)
    elif DIMS == 2 * PART:
        rows = tl.permute(tl.reshape(left.to(tl.int8), (ROWS, 2, PART)), (1, 0, 2))
        return (query_part(tl.reshape(rows, (2 * ROWS, PART)), STREAMS, ROWS),)
    else:
        # From sm_90 on, zeros that the compiler does not know: known ones do not stay in registers, but are put beside
        # the others in registers of their own, product by product, which spills. sm_80 has none then either way, and
        # fewer trips with known ones.
        is_high = (tl.arange(0, 2) == 0)[:, None, None]
        zeros = left * 0.0 if cuda_capability_geq(9) else tl.zeros_like(left)
        rows = tl.where(is_high, zeros[None], left[None]).to(tl.int8)
        return query_parts(tl.reshape(rows, (2 * ROWS, DIMS)), STREAMS, ROWS, DIMS)
