"""The kernels of one layer's launches, compiled for a GPU that is not here; arguments as a model's caches give them."""

from __future__ import annotations

from typing import Any

import torch
from _triton_offline import TARGETS, compiling_for

from hf_int8_paged.kernels import FirstTokens, KvCacheQuant, Scoring, Tokens
from hf_int8_paged.kernels.triton.append import launch_append
from hf_int8_paged.kernels.triton.decode import launch_decode
from hf_int8_paged.kernels.triton.extend import launch_extend
from hf_int8_paged.kernels.triton.tuning import Chip

KV_HEADS, BLOCKS, BATCH = 2, 64, 2
#: (name, kernel), in the order of the launches.
Compiled = list[tuple[str, Any]]


def layer(
    head_dim: int, block_size: int = 16, rotation: str | None = "hadamard", centered: bool = False
) -> KvCacheQuant:
    slots = (KV_HEADS, BLOCKS, block_size)
    k, v = (torch.empty(*slots, head_dim, dtype=torch.int8) for _ in range(2))
    scales = torch.empty(2, *slots, dtype=torch.float16)
    center = torch.zeros(KV_HEADS, head_dim) if centered else None
    return KvCacheQuant(k, v, scales[0], scales[1], "triton", "v_transposed", rotation, center)


def sequences(head_dim: int, dtype: torch.dtype) -> tuple[Tokens, FirstTokens]:
    """Two sequences, with one first token each, as caches have by default."""
    lens = torch.empty(BATCH, dtype=torch.int32)
    row = torch.empty(BATCH, KV_HEADS, 1, head_dim, dtype=dtype)
    tokens = Tokens.at(torch.empty(BATCH, BLOCKS, dtype=torch.int32), lens)
    return tokens, FirstTokens(row, row, lens, lens, lens, limit=1)


def decode(
    chip: str,
    head_dim: int,
    group: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float16,
    rotation: str | None = "hadamard",
    integer: bool = True,
) -> Compiled:
    """One query row per sequence."""
    storage, (tokens, first_tokens) = layer(head_dim, block_size, rotation), sequences(head_dim, dtype)
    q = torch.empty(BATCH, KV_HEADS * group, 1, head_dim, dtype=dtype)
    with compiling_for(TARGETS[chip]) as compiled:
        launch_decode(
            torch.empty_like(q), q, storage, tokens, Scoring(head_dim**-0.5), first_tokens,
            chip=Chip(chip, 132), integer=integer,
        )  # fmt: skip
    return compiled


def append(chip: str, head_dim: int, new_tokens: int, dtype: torch.dtype = torch.float16) -> Compiled:
    """New rows of K and V, with centred keys."""
    new = torch.empty(BATCH, KV_HEADS, new_tokens, head_dim, dtype=dtype)
    with compiling_for(TARGETS[chip]) as compiled:
        launch_append(new, new.clone(), layer(head_dim, centered=True), sequences(head_dim, dtype)[0])
    return compiled


def extend(chip: str, head_dim: int, chunk: int, group: int = 4, dtype: torch.dtype = torch.float16) -> Compiled:
    """A chunk of query rows over a past, with centred keys."""
    tokens, first_tokens = sequences(head_dim, dtype)
    q, new = (torch.empty(BATCH, heads, chunk, head_dim, dtype=dtype) for heads in (KV_HEADS * group, KV_HEADS))
    storage, scoring = layer(head_dim, centered=True), Scoring(head_dim**-0.5)
    with compiling_for(TARGETS[chip]) as compiled:
        launch_extend(torch.empty_like(q), q, storage, tokens, scoring, (new, new.clone()), first_tokens)
    return compiled
