"""The past of a long chunk as dense float tiles, slice by slice, for the matrix unit's float kernels.

The kernel of `extend_kernel` turns int8 into floats again for every 64 rows. A chunk of some hundred rows pays for that
more often than it takes to do it once: here a slice of the past is dequantized into scratch memory, PyTorch's flash
attention reads it, and the slices' answers are joined by their logsumexp. What else a row sees, its chunk, first tokens
and a sink logit, the kernel of `extend_kernel` adds, as it does after a past that it has read itself.

Keys and values stay rotated and centred, so that no row of the past is rotated: a query is, once, and the kernel undoes
the rest. They are divided by the largest scale of their sequence and head, and queries multiplied by it: what fits int8
with any scale fits float16. The order of keys makes no difference to a row that sees all of them, so blocks
stand one after the other: holes, padding and what first tokens replace are not read. Lengths stay on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..calls import Scoring, Tokens
from ..conditioning import condition_query
from ..first_tokens import FirstTokens
from ..storage import KvCacheQuant
from .device import INTERPRETED
from .launch import launch
from .slice_attention import attend_slice, flash_attention_serves

#: Chunks of at most so many rows are left to the kernel that reads int8.
MOST_ROWS_FROM_INT8 = 256
#: Bytes of keys and values of a slice of the past, all sequences and heads.
SCRATCH_BYTES = 64 << 20
#: Positions of a group, whose values stand together in a tile. Slices hold whole groups.
GROUP = 16
FLOAT16_MAX = 65504.0


class PackedPast(NamedTuple):
    """What the rows of a chunk see of the past: the sequences' blocks one after the other, without holes.

    Attributes:
        table: int32 ``[batch, width]`` physical blocks, -1 behind the last one.
        first: int32 ``[batch]`` place of the first token that is seen, in the first block.
        stop: int32 ``[batch]`` place after the last one.
        k_units: float32 ``[batch, num_kv_heads]`` largest scale of the keys, 1 where there is none.
        v_units: the same of the values.
    """

    table: torch.Tensor
    first: torch.Tensor
    stop: torch.Tensor
    k_units: torch.Tensor
    v_units: torch.Tensor


def serves(q: torch.Tensor, storage: KvCacheQuant, tokens: Tokens, scoring: Scoring) -> bool:
    """Whether the past of such a chunk is better read as floats, and PyTorch has a kernel for it here.

    A window keeps the past of a row short; flash attention knows neither softcap nor masks.
    """
    dim = storage.head_dim
    return (
        q.shape[2] > MOST_ROWS_FROM_INT8
        and tokens.window is None
        and scoring.softcap is None
        and scoring.key_mask is None
        and dim == storage.v_head_dim
        and dim % 8 == 0
        and (INTERPRETED or (q.dtype != torch.float32 and flash_attention_serves(q.device)))
    )


def attend_past(
    q: torch.Tensor, storage: KvCacheQuant, tokens: Tokens, scoring: Scoring, first_tokens: FirstTokens | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a chunk's rows over all of the past that its blocks hold, but for first tokens.

    Needs memory for two slices' answers, ``q``'s shape in float32, beside `SCRATCH_BYTES`.

    Args:
        q: ``[batch, num_q_heads, chunk, head_dim]``, float32, float16 or bfloat16.
        storage: the layer's.
        tokens: those before the chunk are ``context_lens_before``.
        scoring: ``scale`` counts, the rest is the caller's.
        first_tokens: whose places in the blocks are not read.

    Returns:
        Weighted means of values as they are stored, not rotated back, float32 ``[batch, chunk, group, num_kv_heads,
        head_dim]``, and the logarithm of the weights' sum, float32 ``[batch, chunk, group, num_kv_heads]``, -inf where
        nothing is seen. Scores are those over centred keys.
    """
    batch, num_q_heads, chunk, dim = q.shape
    heads = storage.num_kv_heads
    group = num_q_heads // heads
    compute = torch.float32 if q.dtype == torch.float32 else torch.float16
    capacity = tokens.block_table.shape[1] * storage.block_size
    slice_tokens = SCRATCH_BYTES // (2 * compute.itemsize * batch * heads * dim) // GROUP * GROUP
    slice_tokens = max(GROUP, min(slice_tokens, capacity))
    past = packed_past(storage, tokens, first_tokens, -(-slice_tokens // storage.block_size))
    rows = q.unflatten(1, (heads, group)).permute(0, 3, 2, 1, 4).to(torch.float32)
    rows = condition_query(rows, storage) * (past.k_units.view(batch, 1, 1, heads, 1) * scoring.scale)
    if compute == torch.float16:
        rows = rows.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    rows = rows.to(compute).reshape(batch, chunk * group, heads, dim)

    keys, values = (torch.empty(batch, slice_tokens, heads, dim, dtype=compute, device=q.device) for _ in range(2))
    means = torch.zeros(rows.shape, dtype=torch.float32, device=q.device)
    logs = torch.full(rows.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    for start in range(0, capacity, slice_tokens):
        arguments = (
            keys,
            values,
            storage.k,
            storage.v,
            storage.k_scales,
            storage.v_scales,
            past.table,
            past.k_units,
            past.v_units,
            past.first,
            past.stop,
            start // GROUP,
            storage.num_blocks,
            past.table.shape[1],
        )
        launch(
            dequantize_kernel,
            (slice_tokens // GROUP, heads, batch),
            arguments,
            HEAD_DIM=dim,
            DIMS=triton.next_power_of_2(dim),
            BLOCK_SIZE=storage.block_size,
            num_warps=4,
        )
        first, stop = ((place - start).clamp(0, slice_tokens) for place in (past.first, past.stop))
        new_means, new_logs = attend_slice(rows, keys, values, first, stop)
        total = torch.logaddexp(logs, new_logs)
        # Where neither has seen anything -inf - -inf would be NaN.
        shift = total.masked_fill(total == -torch.inf, 0.0)
        means *= torch.exp(logs - shift).unsqueeze(-1)
        means.addcmul_(new_means.to(torch.float32), torch.exp(new_logs - shift).unsqueeze(-1))
        logs = total
    means *= past.v_units.view(batch, 1, heads, 1)
    shape = (batch, chunk, group, heads)
    return means.view(*shape, dim), logs.view(shape)


def packed_past(storage: KvCacheQuant, tokens: Tokens, first_tokens: FirstTokens | None, columns: int) -> PackedPast:
    """Where the past of a chunk stands, found out without waiting for the device.

    Scales of ``columns`` columns of the table are copied at once.
    """
    table, size, past = tokens.block_table, storage.block_size, tokens.context_lens_before.unsqueeze(1)
    first = torch.zeros_like(past)
    if tokens.kv_start is not None:
        first = torch.maximum(first, tokens.kv_start.unsqueeze(1))
    if first_tokens is not None:
        first = torch.maximum(first, first_tokens.stop.unsqueeze(1))
    begin = torch.arange(0, table.shape[1] * size, size, dtype=torch.int32, device=table.device)
    seen = (torch.minimum(past, begin + size) - torch.maximum(first, begin)).clamp(min=0)
    seen = torch.where((table >= 0) & (table < storage.num_blocks), seen, 0)
    order = torch.argsort((seen == 0).to(torch.int8), dim=1, stable=True)
    packed = torch.where(seen > 0, table, -1).gather(1, order)
    # Only the block of the first token can begin with others; where it is a hole, so can none.
    head = order.narrow(1, 0, 1)
    skipped = (first - begin.expand_as(table).gather(1, head)).clamp(0, size - 1).squeeze(1)
    stop = skipped + seen.sum(1, dtype=torch.int32)
    units = [torch.zeros(len(table), storage.num_kv_heads, dtype=torch.float32, device=table.device) for _ in range(2)]
    begin_of_part = 0
    for part in packed.split(columns, 1):
        place = torch.arange(begin_of_part, begin_of_part + part.shape[1] * size, device=table.device)
        there = (place >= skipped.unsqueeze(1)) & (place < stop.unsqueeze(1))
        ids = part.clamp(min=0).flatten()
        for unit, scales in zip(units, (storage.k_scales, storage.v_scales), strict=True):
            own = scales.index_select(1, ids).view(-1, *there.shape).transpose(0, 1)  # [batch, heads, places]
            own = torch.where(there.unsqueeze(1), own, 0.0).nan_to_num_(0.0)
            torch.maximum(unit, own.amax(2), out=unit)
        begin_of_part += part.shape[1] * size
    return PackedPast(packed, skipped, stop, *(torch.where(unit > 0, unit, 1.0) for unit in units))


@triton.jit(do_not_specialize=("first_group", "num_blocks", "table_width"))
def dequantize_kernel(
    keys_ptr,  # [batch, places, kv_heads, HEAD_DIM]
    values_ptr,
    k_ptr,  # [kv_heads, num_blocks, BLOCK_SIZE, HEAD_DIM]
    v_ptr,  # [kv_heads, num_blocks, HEAD_DIM, BLOCK_SIZE]
    k_scales_ptr,  # [kv_heads, num_blocks, BLOCK_SIZE]
    v_scales_ptr,
    table_ptr,  # [batch, table_width]
    k_units_ptr,  # [batch, kv_heads]
    v_units_ptr,
    first_ptr,  # [batch]
    stop_ptr,
    first_group,
    num_blocks,
    table_width,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # HEAD_DIM, rounded up to a power of two
    BLOCK_SIZE: tl.constexpr,
):
    """One program restores 16 tokens of one head, in units of their sequence's largest scale; 0 where none is seen."""
    group, head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    place = (first_group + group) * 16
    logical = place // BLOCK_SIZE
    block = tl.load(table_ptr + sequence * table_width + logical, mask=logical < table_width, other=-1)
    tile = head * num_blocks + tl.where((block >= 0) & (block < num_blocks), block, 0)
    tile_place = place % BLOCK_SIZE
    slots, dims = tl.arange(0, 16), tl.arange(0, DIMS)
    seen = (place + slots >= tl.load(first_ptr + sequence)) & (place + slots < tl.load(stop_ptr + sequence))
    in_row = (dims < HEAD_DIM)[None, :]
    unit = sequence * tl.num_programs(1) + head
    tokens = (sequence * tl.num_programs(0) + group) * 16 + slots
    offsets = (tokens * tl.num_programs(1) + head)[:, None] * HEAD_DIM + dims[None, :]
    scale_at = tile * BLOCK_SIZE + tile_place + slots

    scales = tl.load(k_scales_ptr + scale_at).to(tl.float32) / tl.load(k_units_ptr + unit)
    k_ptrs = k_ptr + (tile * BLOCK_SIZE + tile_place) * HEAD_DIM + slots[:, None] * HEAD_DIM + dims[None, :]
    k = tl.load(k_ptrs, mask=in_row, other=0).to(tl.float32) * scales[:, None]
    tl.store(keys_ptr + offsets, tl.where(seen[:, None], k, 0.0).to(keys_ptr.dtype.element_ty), mask=in_row)

    scales = tl.load(v_scales_ptr + scale_at).to(tl.float32) / tl.load(v_units_ptr + unit)
    v_ptrs = v_ptr + tile * (BLOCK_SIZE * HEAD_DIM) + tile_place + slots[:, None] + dims[None, :] * BLOCK_SIZE
    v = tl.load(v_ptrs, mask=in_row, other=0).to(tl.float32) * scales[:, None]
    tl.store(values_ptr + offsets, tl.where(seen[:, None], v, 0.0).to(values_ptr.dtype.element_ty), mask=in_row)
