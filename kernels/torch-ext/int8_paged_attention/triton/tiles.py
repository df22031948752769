"""Int8 tiles on the matrix unit: how K and V get from memory to a product without being converted or moved.

* A query row is split into two int8 terms, ``q ~ step * (256 * high + low)``. The high terms of a tile's rows and their
  low terms are two halves of one matrix operand, so one int8 product serves both. Where no rotation has spread a
  query's outliers, a third term follows in a second product. The softmax weights, times the scales of V, are split
  against the tile's maximum.
* The axis that a product sums over may be in any order, as long as both operands agree. The order is chosen such that
  the 16 consecutive bytes that a thread loads from memory are the bytes that ``mma.m16n8k32`` wants in its registers:
  neither K nor V passes through shared memory, and the weights stay in the threads that computed them.
* Each warp is a stream of its own: it reads its own tokens and keeps its own softmax.

Lane ``4 * c + t`` of a warp loads 16 elements of key rows ``16 * (c // 2) + c % 2 + 2 * i``, and the tokens
``16 * t`` to ``16 * t + 15`` of the value elements ``c + 8 * j``, for all i and j: column ``8 * i + 2 * t + e`` of the
scores is token ``16 * t + 2 * i + e`` of the stream's 64.

Where the matrix unit knows no int8, or does little of it, ``INTEGER=False`` multiplies in float16: K and V are brought
to it exactly (`dequantize`), and the two terms of queries and weights are float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dequantize import bytes_to_half
from .primitives import block_ids

#: Tokens that one warp reads per iteration: four groups of 16, the runs of V that a thread loads at once.
TOKENS = tl.constexpr(64)
#: Elements of K rows or V rows that one product takes.
PART = tl.constexpr(64)
#: 256 * 127 + 127: the largest number that two int8 terms make.
STEPS = tl.constexpr(32639.0)
#: Below this a divisor counts as 0, so that no quotient overflows.
TINY = tl.constexpr(1e-30)


@triton.jit
def int8_term(steps, is_high):
    """One term of int32 ``steps = 256 * high + low``: the low one is the low byte with its sign."""
    return tl.where(is_high, (steps + 128) >> 8, steps).to(tl.int8)


@triton.jit
def float16_term(x, is_high):
    high = x.to(tl.float16)
    return tl.where(is_high, high, (x - high.to(tl.float32)).to(tl.float16))


@triton.jit
def load_key_part(k_base, part: tl.constexpr, STREAMS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Elements ``PART * part`` and on of 64 key rows per stream, int8 ``[STREAMS, PART, TOKENS]``.

    ``k_base`` points at a lane's first key row, ``[STREAMS, 8]``.
    """
    dim = tl.arange(0, PART)[None, None, None, :]
    row = tl.arange(0, 8)[:, None, None, None] * (2 * HEAD_DIM) + PART * part
    ptrs = (k_base[None, :, :, None] + dim) + row  # [i, STREAMS, c, PART]
    if PART * (part + 1) <= HEAD_DIM:
        k = tl.load(ptrs)
    else:
        k = tl.load(ptrs, mask=tl.broadcast_to(dim < HEAD_DIM - PART * part, ptrs.shape), other=0)
    k = tl.reshape(k, (8, STREAMS, 8, 4, 2, 2, 4))  # [i, stream, c, t, pair, half, byte]
    return tl.reshape(tl.permute(k, (1, 4, 5, 3, 6, 0, 2)), (STREAMS, PART, TOKENS))


@triton.jit
def load_value_part(
    v_base,
    part: tl.constexpr,
    STREAMS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PART: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Elements ``V_PART * part`` and on of 64 values per stream, int8 ``[STREAMS, TOKENS, V_PART]``.

    ``v_base`` points at a lane's 16 tokens of value element 0, ``[STREAMS, 4]``.
    """
    c = tl.arange(0, 8)[None, None, :, None, None]
    token = tl.arange(0, 16)[None, None, None, None, :]
    dim = tl.arange(0, V_PART // 8)[:, None, None, None, None] * 8 + V_PART * part
    ptrs = (v_base[None, :, None, :, None] + (c * BLOCK_SIZE + token)) + dim * BLOCK_SIZE
    if V_PART * (part + 1) <= V_DIM:
        v = tl.load(ptrs)
    else:
        v = tl.load(ptrs, mask=tl.broadcast_to(dim + c < V_DIM, ptrs.shape), other=0)
    v = tl.reshape(v, (V_PART // 8, STREAMS, 8, 4, 2, 2, 4))  # [j, stream, c, t, product, half, byte]
    return tl.reshape(tl.permute(v, (1, 4, 5, 3, 6, 0, 2)), (STREAMS, TOKENS, V_PART))


@triton.jit
def load_scales(head_ptr, offsets, there, STREAMS: tl.constexpr, ROWS: tl.constexpr):
    """Float32 scales ``[STREAMS, ROWS, TOKENS]`` in the order of the scores, equal for all rows; 0 in holes.

    A thread loads the 16 scales of its token group, at ``offsets`` ``[STREAMS, 4]``, eight at a time.
    """
    part = tl.arange(0, 2)[:, None, None, None, None] * 8
    lane = tl.zeros((2, STREAMS, 8, 4, 8), tl.int32) + tl.arange(0, 8)[None, None, None, None, :]
    mask = tl.broadcast_to(there[None, :, None, :, None], lane.shape)
    scales = tl.load(((head_ptr + offsets)[None, :, None, :, None] + lane) + part, mask=mask, other=0.0)
    scales = tl.reshape(scales, (2, STREAMS, 8, 4, 4, 2))  # [part, stream, row, t, pair, byte]
    scales = tl.reshape(tl.permute(scales, (1, 2, 0, 4, 3, 5)), (STREAMS, 1, 8, TOKENS))
    scales = tl.broadcast_to(scales, (STREAMS, ROWS // 8, 8, TOKENS))
    return tl.reshape(scales, (STREAMS, ROWS, TOKENS)).to(tl.float32)


@triton.jit
def tokens_of_columns():
    """Which of a stream's 64 tokens each column of the scores is."""
    n = tl.arange(0, TOKENS)
    return n // 2 % 4 * 16 + n // 8 * 2 + n % 2


@triton.jit
def groups_to_columns(x, STREAMS: tl.constexpr):
    """Spread ``[STREAMS, 4]``, one element per group of 16 tokens, over the scores' columns ``[STREAMS, TOKENS]``."""
    return tl.reshape(tl.broadcast_to(x[:, None, :, None], (STREAMS, 8, 4, 2)), (STREAMS, TOKENS))


@triton.jit
def join_terms(product, STREAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HIGH: tl.constexpr):
    """``HIGH * high + low`` of a product ``[STREAMS, 2 * ROWS, COLUMNS]``, in its dtype."""
    terms = tl.reshape(product, (STREAMS, 2, ROWS, COLUMNS))
    is_high = (tl.arange(0, 2) == 0)[None, :, None, None]
    return tl.sum(terms * tl.where(is_high, HIGH, 1).to(product.dtype), axis=1)


@triton.jit
def half_of_rows(product, which: tl.constexpr, STREAMS: tl.constexpr, ROWS: tl.constexpr):
    """The first or the second half of the rows of an int32 product ``[STREAMS, 2 * ROWS, TOKENS]``."""
    wanted = (tl.arange(0, 2) == which)[None, :, None, None]
    return tl.sum(tl.reshape(product, (STREAMS, 2, ROWS, TOKENS)) * wanted.to(tl.int32), axis=1)


@triton.jit
def key_scores(
    q_parts,
    left_parts,
    k_base,
    STREAMS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    THIRD_TERM: tl.constexpr,
    INTEGER: tl.constexpr,
):
    """Products of the queries with 64 keys per stream, in the queries' units: float32 ``[STREAMS, ROWS, TOKENS]``."""
    if not INTEGER:
        product = tl.zeros((STREAMS, 2 * ROWS, TOKENS), tl.float32)
        for part in tl.static_range(PARTS):
            k = load_key_part(k_base, part, STREAMS, HEAD_DIM)
            product = tl.dot(q_parts[part], bytes_to_half(k), product)
        scores = join_terms(product, STREAMS, ROWS, TOKENS, 1)
    elif not THIRD_TERM:
        product = tl.zeros((STREAMS, 2 * ROWS, TOKENS), tl.int32)
        for part in tl.static_range(PARTS):
            k = load_key_part(k_base, part, STREAMS, HEAD_DIM)
            product = tl.dot(q_parts[part], k, product, out_dtype=tl.int32)
        scores = join_terms(product, STREAMS, ROWS, TOKENS, 256).to(tl.float32)
    elif PARTS <= 2:
        # One operand holds what is left of both parts, so a product's other half is in vain. Sums stay below 2**31.
        high = tl.zeros((STREAMS, ROWS, TOKENS), tl.int32)
        low = tl.zeros((STREAMS, ROWS, TOKENS), tl.int32)
        for part in tl.static_range(PARTS):
            k = load_key_part(k_base, part, STREAMS, HEAD_DIM)
            product = tl.dot(q_parts[part], k, out_dtype=tl.int32)
            left = tl.dot(left_parts[0], k, out_dtype=tl.int32)
            high += half_of_rows(product, 0, STREAMS, ROWS)
            low += half_of_rows(product, 1, STREAMS, ROWS) * 256 + half_of_rows(left, part, STREAMS, ROWS)
        scores = high.to(tl.float32) * 65536.0 + low.to(tl.float32)
    else:
        scores = tl.zeros((STREAMS, ROWS, TOKENS), tl.float32)
        for part in tl.static_range(PARTS):
            k = load_key_part(k_base, part, STREAMS, HEAD_DIM)
            product = tl.dot(q_parts[part], k, out_dtype=tl.int32)
            # The third term's product is added to 256 times the second's, which takes no accumulator of its own.
            product *= tl.where(tl.arange(0, 2 * ROWS) < ROWS, 1, 256)[None, :, None]
            product = tl.dot(left_parts[part], k, product, out_dtype=tl.int32)
            scores += join_terms(product.to(tl.float32), STREAMS, ROWS, TOKENS, 65536)
    return scores


@triton.jit
def split_weights(weights, STREAMS: tl.constexpr, ROWS: tl.constexpr, INTEGER: tl.constexpr):
    """Softmax weights times scales of V, ``[STREAMS, ROWS, TOKENS]`` -> operand ``[STREAMS, 2 * ROWS, TOKENS]`` in the
    order of `load_value_part`, and the unit of each row."""
    largest = tl.max(weights, axis=2)
    is_high = tl.arange(0, 2)[None, :, None, None] == 0
    if INTEGER:
        unit = largest / STEPS
        steps = (weights * tl.where(largest > TINY, STEPS / largest, 0.0)[:, :, None] + 0.5).to(tl.int32)
    else:
        unit = largest
        steps = weights * tl.where(largest > TINY, 1.0 / largest, 0.0)[:, :, None]
    steps = tl.reshape(steps, (STREAMS, ROWS, 2, 2, 2, 4, 2))  # [.., product, half, pair, t, byte]
    steps = tl.reshape(tl.permute(steps, (0, 1, 2, 3, 5, 4, 6)), (STREAMS, 1, ROWS, TOKENS))
    terms = int8_term(steps, is_high) if INTEGER else float16_term(steps, is_high)
    return tl.reshape(terms, (STREAMS, 2 * ROWS, TOKENS)), unit


@triton.jit
def weighted_values(terms, v, STREAMS: tl.constexpr, ROWS: tl.constexpr, V_PART: tl.constexpr, INTEGER: tl.constexpr):
    """Sums of 64 values per stream in the weights' units, float32 ``[STREAMS, ROWS, V_PART]``."""
    if INTEGER:
        sums = join_terms(tl.dot(terms, v, out_dtype=tl.int32), STREAMS, ROWS, V_PART, 256).to(tl.float32)
    else:
        sums = join_terms(tl.dot(terms, bytes_to_half(v)), STREAMS, ROWS, V_PART, 1)
    return sums


@triton.jit
def scales_of_groups(k_scales_ptr, v_scales_ptr, places, there, STREAMS: tl.constexpr, ROWS: tl.constexpr):
    """Scales of K and V of each stream's four groups of 16 tokens."""
    offsets = places.to(tl.int64) * 16
    k_scales = load_scales(k_scales_ptr, offsets, there, STREAMS, ROWS)
    return k_scales, load_scales(v_scales_ptr, offsets, there, STREAMS, ROWS)


@triton.jit
def find_groups(table_row_ptr, groups, table_width, num_blocks, first_block, BLOCK_SIZE: tl.constexpr):
    """Places of groups of 16 tokens of a sequence among all groups of the pool, uint32, and which of them exist.

    A place is one register, where block and slot would be two or three during the whole product with K."""
    groups_per_block: tl.constexpr = BLOCK_SIZE // 16
    ids, there = block_ids(
        table_row_ptr, groups // groups_per_block, groups < table_width * groups_per_block, num_blocks, first_block
    )
    return ids.to(tl.uint32) * groups_per_block + (groups % groups_per_block).to(tl.uint32), there


@triton.jit
def value_base(v_ptr, places, V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where the values of groups of 16 tokens begin."""
    groups_per_block: tl.constexpr = BLOCK_SIZE // 16
    blocks = (places // groups_per_block).to(tl.int64)
    return v_ptr + blocks * (BLOCK_SIZE * V_DIM) + places % groups_per_block * 16


@triton.jit
def sum_of_streams(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``[4, ROWS, COLUMNS]`` -> ``[ROWS, COLUMNS]``. Splits bring the streams into one thread, through shared memory
    once, where a reduction over warps goes there four times."""
    x = tl.permute(tl.reshape(x, (2, 2, ROWS, COLUMNS)), (2, 3, 0, 1))
    a, b = tl.split(x)
    a, b = tl.split(a + b)
    return a + b
