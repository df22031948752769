"""Decode attention in Triton: split over the context (`triton_split`), then joined (`triton_join`)."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
import triton

from .checks import clamp_mask_start, clamp_window
from .conditioning import hadamard_block
from .first_tokens import FirstTokens
from .layouts import check_decode
from .storage import KvCacheQuant
from .triton_join import launch_join
from .triton_layouts import first_layout, in_32_bits, layer_of
from .triton_split import CHUNK, STREAMS, decode_kernel
from .triton_tiles import PART
from .triton_tuning import Chip, Config, config_for


@functools.lru_cache(maxsize=1024)
def decode_constants(
    group: int,
    q_len: int,
    head_dim: int,
    v_dim: int,
    block_size: int,
    rotated: bool,
    integer: bool,
    chip: Chip,
    config: Config | None,
) -> tuple[int, int, dict[str, Any]]:
    """Row tiles, programs that the chip should have, and constants and options, worked out once per kind of call."""
    rows = 8 if group * q_len <= 8 else 16
    if config is None:
        measure = partial(time_decode, chip, head_dim, v_dim, group, block_size, rotated, integer)
        config = config_for(chip, head_dim, group, integer and not rotated, measure)
    constants = dict(
        GROUP=group,
        HEAD_DIM=head_dim,
        V_DIM=v_dim,
        DIMS=max(PART.value, triton.next_power_of_2(head_dim)),
        V_PART=max(16, min(PART.value, triton.next_power_of_2(v_dim))),
        ROTATED=hadamard_block(head_dim) if rotated else 1,
        BLOCK_SIZE=block_size,
        ROWS=rows,
        STREAMS=STREAMS,
        INTEGER=integer,
        num_warps=STREAMS,
        num_stages=1,
        enable_fp_fusion=True,
    )
    if config.max_registers is not None:
        constants["maxnreg"] = config.max_registers
    return -(-group * q_len // rows), config.programs_per_processor * chip.num_processors, constants


def launch_decode(
    out: torch.Tensor,
    q: torch.Tensor,
    storage: KvCacheQuant,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    kv_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    key_mask_start: int,
    window: int | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    first_tokens: FirstTokens | None = None,
    *,
    chip: Chip,
    integer: bool = True,
    config: Config | None = None,
) -> None:
    """`reference.decode` on a GPU: two launches, whose grids depend on shapes alone.

    Args:
        chip: its multiprocessors decide into how many splits the context falls.
        integer: multiply int8 with int8; False multiplies in float16, for chips whose matrix unit knows no int8.
        config: instead of the chip's own.
    """
    layout, head_strides = layer_of(storage)
    block_table, context_lens, kv_start, key_mask, sink_logits = check_decode(
        layout, out, q, block_table, context_lens, kv_start, key_mask, softcap, sink_logits, first_layout(first_tokens)
    )
    # At most 16 rows, so that a copy costs nothing.
    q = in_32_bits(q, axes=2)
    batch, num_q_heads, q_len, head_dim = q.shape
    _, kv_heads, num_blocks, block_size, _, v_dim = layout
    table_width = block_table.shape[1]
    if window is not None:
        window = clamp_window(window, table_width * block_size)
    key_mask_start = 0 if key_mask is None else clamp_mask_start(key_mask_start, key_mask, table_width * block_size)
    rotated = storage.rotation is not None
    blocks_start = kv_start
    if first_tokens is not None:
        blocks_start = first_tokens.stop if kv_start is None else torch.maximum(first_tokens.stop, kv_start)
    row_tiles, wanted, constants = decode_constants(
        num_q_heads // kv_heads, q_len, head_dim, v_dim, block_size, rotated, integer, chip, config
    )
    chunks = -(-table_width * block_size // CHUNK)
    splits = max(1, min(chunks, -(-wanted // (batch * kv_heads * row_tiles))))
    sums = torch.empty(batch * num_q_heads * q_len * splits * (v_dim + 2), dtype=torch.float32, device=q.device)
    # Without softcap and sink_logits the keys' centre moves all scores of a row alike, and softmax does not see it.
    absolute = softcap is not None or sink_logits is not None
    decode_kernel[(splits, kv_heads * row_tiles, batch)](
        sums,
        q,
        storage.k,
        storage.v,
        storage.k_scales,
        storage.v_scales,
        storage.key_center if absolute else None,
        block_table,
        context_lens,
        blocks_start,
        key_mask,
        float(scale),
        float(softcap or 0.0),
        q_len,
        num_blocks,
        table_width,
        key_mask_start,
        0 if key_mask is None else key_mask.shape[1],
        window or 0,
        *q.stride(),
        *head_strides,
        block_table.stride()[0],
        0 if key_mask is None else key_mask.stride()[0],
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        **constants,
    )
    launch_join(
        out, sums, q, storage, context_lens, scale, kv_start, key_mask, key_mask_start, window, softcap, sink_logits,
        first_tokens, splits,
    )  # fmt: skip


def time_decode(
    chip: Chip,
    head_dim: int,
    v_dim: int,
    group: int,
    block_size: int,
    rotated: bool,
    integer: bool,
    config: Config,
    device: str = "cuda",
    sizes: tuple[int, int, int] = (8, 8, 4096),
) -> float:
    """Milliseconds of decode attention with ``config``, for this many sequences, KV heads and tokens of each."""
    batch, kv_heads, tokens = sizes
    width = tokens // block_size
    slots = (kv_heads, batch * width, block_size)
    k, v = (torch.zeros(*slots, dim, dtype=torch.int8, device=device) for dim in (head_dim, v_dim))
    scales = torch.ones(slots, dtype=torch.float16, device=device)
    storage = KvCacheQuant(k, v, scales, scales.clone(), "triton", "v_transposed", "hadamard" if rotated else None)
    table = torch.arange(batch * width, dtype=torch.int32, device=device).view(batch, width)
    lens = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    q = torch.ones(batch, kv_heads * group, 1, head_dim, dtype=torch.float16, device=device)
    options = (head_dim**-0.5, None, None, 0, None, None, None)
    call = partial(
        launch_decode, q.new_empty(*q.shape[:3], v_dim), q, storage, table, lens, *options,
        chip=chip, integer=integer, config=config,
    )  # fmt: skip
    return triton.testing.do_bench(call, return_mode="median")
