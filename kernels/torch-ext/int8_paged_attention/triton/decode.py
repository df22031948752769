"""Decode attention in Triton: read in even shares (`split`), then joined (`join`)."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
import triton

from ..calls import Scoring, Tokens
from ..checks import clamp_mask_start, clamp_window
from ..conditioning import hadamard_block
from ..first_tokens import FirstTokens
from ..layouts import check_attend
from ..storage import KvCacheQuant
from .join import Cut, launch_join
from .launch import launch
from .layouts import NOTE, Rows, first_layout, in_32_bits, layer_of, tokens_of
from .schedule import CHUNK, STREAMS
from .split import decode_kernel
from .tiles import PART
from .tuning import Chip, Config, config_for


@functools.lru_cache(maxsize=1024)
def decode_constants(
    kind: Rows, group: int, q_len: int, integer: bool, chip: Chip, config: Config | None
) -> tuple[int, int, dict[str, Any]]:
    """Row tiles, programs that the chip should have, and constants and options, worked out once per kind of call."""
    rows = 8 if group * q_len <= 8 else 16
    if config is None:
        measure = partial(time_decode, chip, kind, group, integer)
        config = config_for(chip, kind.head_dim, integer and not kind.rotated, kind.block_size, group, measure)
    constants = dict(
        GROUP=group,
        HEAD_DIM=kind.head_dim,
        V_DIM=kind.v_dim,
        DIMS=max(PART.value, triton.next_power_of_2(kind.head_dim)),
        V_PART=max(16, min(PART.value, triton.next_power_of_2(kind.v_dim))),
        V_FIRST=max(kind.head_dim, kind.v_dim) <= 128 and not chip.name.startswith("gfx"),
        ROTATED=hadamard_block(kind.head_dim) if kind.rotated else 1,
        BLOCK_SIZE=kind.block_size,
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
    tokens: Tokens,
    scoring: Scoring,
    first_tokens: FirstTokens | None = None,
    *,
    chip: Chip,
    integer: bool = True,
    config: Config | None = None,
) -> None:
    """`reference.attend` from the blocks on a GPU: two launches, whose grids depend on shapes alone.

    Args:
        chip: its multiprocessors decide how many programs share the work.
        integer: multiply int8 with int8; False multiplies in float16, for chips whose matrix unit knows no int8.
        config: instead of the chip's own.
    """
    layout, kind, _ = storage.notes.get(NOTE) or layer_of(storage)
    held = tokens.notes.get(NOTE) or tokens_of(tokens)
    key_mask, sink_logits = check_attend(layout, held, out, q, scoring, first_layout(first_tokens))
    scale, softcap, _, _, key_mask_start = scoring
    # At most 16 rows, so that a copy costs nothing.
    q = in_32_bits(q, axes=2)
    batch, num_q_heads, q_len, _ = q.shape
    _, kv_heads, num_blocks, block_size, _, v_dim = layout
    table_width, window, kv_start = held.max_blocks, tokens.window, tokens.kv_start
    if window is not None:
        window = clamp_window(window, table_width * block_size)
    key_mask_start = 0 if key_mask is None else clamp_mask_start(key_mask_start, key_mask, table_width * block_size)
    blocks_start = kv_start
    if first_tokens is not None:
        blocks_start = first_tokens.stop if kv_start is None else torch.maximum(first_tokens.stop, kv_start)
    row_tiles, wanted, constants = decode_constants(kind, num_q_heads // kv_heads, q_len, integer, chip, config)
    units = batch * kv_heads * row_tiles
    programs = min(wanted, units * (-(-table_width * block_size // CHUNK.value)))
    sequences = 1 if batch == 1 else max(32, triton.next_power_of_2(batch))
    cut = Cut(programs, constants["ROWS"], sequences, blocks_start)
    rows_kept = min(num_q_heads // kv_heads * q_len, cut.rows)
    sums = torch.empty((programs + units - 1) * rows_kept * (v_dim + 2), dtype=torch.float32, device=q.device)
    # Without softcap and sink logits the keys' centre moves all scores of a row alike, and softmax does not see it.
    absolute = softcap is not None or sink_logits is not None
    arguments = (
        sums,
        q,
        storage.k,
        storage.v,
        storage.k_scales,
        storage.v_scales,
        storage.key_center if absolute else None,
        tokens.block_table,
        tokens.context_lens,
        blocks_start,
        key_mask,
        float(scale),
        float(softcap or 0.0),
        batch,
        kv_heads,
        q_len,
        num_blocks,
        table_width,
        key_mask_start,
        0 if key_mask is None else key_mask.shape[1],
        window or 0,
        *q.stride(),
        held.table_stride,
        0 if key_mask is None else key_mask.stride()[0],
    )
    special = dict(SEQUENCES=cut.sequences, HAS_WINDOW=window is not None, HAS_SOFTCAP=softcap is not None)
    launch(decode_kernel, (programs,), arguments, **special, **constants)
    if first_tokens is not None or sink_logits is not None:
        scoring = Scoring(scale, softcap, sink_logits, key_mask, key_mask_start)
    launch_join(out, sums, q, storage, tokens, scoring, first_tokens, cut)


def time_decode(
    chip: Chip,
    kind: Rows,
    group: int,
    integer: bool,
    config: Config,
    device: str = "cuda",
    sizes: tuple[int, int, int] = (8, 8, 4096),
) -> float:
    """Milliseconds of decode attention with ``config``, for this many sequences, KV heads and tokens of each."""
    batch, kv_heads, length = sizes
    width = length // kind.block_size
    slots = (kv_heads, batch * width, kind.block_size)
    k, v = (torch.zeros(*slots, dim, dtype=torch.int8, device=device) for dim in kind[:2])
    scales = torch.ones(slots, dtype=torch.float16, device=device)
    rotation = "hadamard" if kind.rotated else None
    storage = KvCacheQuant(k, v, scales, scales.clone(), "triton", "v_transposed", rotation)
    table = torch.arange(batch * width, dtype=torch.int32, device=device).view(batch, width)
    tokens = Tokens.at(table, torch.full((batch,), length, dtype=torch.int32, device=device))
    q = torch.ones(batch, kv_heads * group, 1, kind.head_dim, dtype=torch.float16, device=device)
    call = partial(
        launch_decode, q.new_empty(*q.shape[:3], kind.v_dim), q, storage, tokens, Scoring(kind.head_dim**-0.5),
        chip=chip, integer=integer, config=config,
    )  # fmt: skip
    return triton.testing.do_bench(call, return_mode="median")
