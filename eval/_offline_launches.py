"""The kernels of one layer's launches, compiled for a GPU that is not here; arguments as a model's caches give them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from _triton_offline import TARGETS, Launch, compiling_for

from hf_int8_paged.kernels import FirstTokens, KvCacheQuant, Scoring, Tokens
from hf_int8_paged.kernels.triton.append import launch_append
from hf_int8_paged.kernels.triton.decode import launch_decode
from hf_int8_paged.kernels.triton.extend import launch_extend
from hf_int8_paged.kernels.triton.tuning import Chip


class Sizes(NamedTuple):
    """Of a layer, and of the GPU it is on."""

    batch: int = 2
    kv_heads: int = 2
    blocks: int = 64  # of a sequence
    processors: int = 132


DEFAULT = Sizes()
#: (name, kernel), in the order of the launches.
Compiled = list[tuple[str, Any]]


def layer(
    head_dim: int,
    block_size: int = 16,
    rotation: str | None = "hadamard",
    centered: bool = False,
    sizes: Sizes = DEFAULT,
) -> KvCacheQuant:
    slots = (sizes.kv_heads, sizes.batch * sizes.blocks, block_size)
    k, v = (torch.empty(*slots, head_dim, dtype=torch.int8) for _ in range(2))
    scales = torch.empty(2, *slots, dtype=torch.float16)
    center = torch.zeros(sizes.kv_heads, head_dim) if centered else None
    return KvCacheQuant(k, v, scales[0], scales[1], "triton", "v_transposed", rotation, center)


def sequences(head_dim: int, dtype: torch.dtype, sizes: Sizes = DEFAULT) -> tuple[Tokens, FirstTokens]:
    """Sequences with one first token each, as caches have by default."""
    lens = torch.empty(sizes.batch, dtype=torch.int32)
    row = torch.empty(sizes.batch, sizes.kv_heads, 1, head_dim, dtype=dtype)
    tokens = Tokens.at(torch.empty(sizes.batch, sizes.blocks, dtype=torch.int32), lens)
    return tokens, FirstTokens(row, row, lens, lens, lens, limit=1)


def decode(
    chip: str,
    head_dim: int,
    group: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float16,
    rotation: str | None = "hadamard",
    integer: bool = True,
    *,
    sizes: Sizes = DEFAULT,
    launches: list[Launch] | None = None,
) -> Compiled:
    """One query row per sequence."""
    storage = layer(head_dim, block_size, rotation, sizes=sizes)
    tokens, first_tokens = sequences(head_dim, dtype, sizes)
    q = torch.empty(sizes.batch, sizes.kv_heads * group, 1, head_dim, dtype=dtype)
    with compiling_for(TARGETS[chip], launches) as compiled:
        launch_decode(
            torch.empty_like(q), q, storage, tokens, Scoring(head_dim**-0.5), first_tokens,
            chip=Chip(chip, sizes.processors), integer=integer,
        )  # fmt: skip
    return compiled


def append(chip: str, head_dim: int, new_tokens: int, dtype: torch.dtype = torch.float16) -> Compiled:
    """New rows of K and V, with centred keys."""
    new = torch.empty(DEFAULT.batch, DEFAULT.kv_heads, new_tokens, head_dim, dtype=dtype)
    with compiling_for(TARGETS[chip]) as compiled:
        launch_append(new, new.clone(), layer(head_dim, centered=True), sequences(head_dim, dtype)[0])
    return compiled


def extend(chip: str, head_dim: int, chunk: int, group: int = 4, dtype: torch.dtype = torch.float16) -> Compiled:
    """A chunk of query rows over a past, with centred keys."""
    tokens, first_tokens = sequences(head_dim, dtype)
    batch, kv_heads = DEFAULT[:2]
    q, new = (torch.empty(batch, heads, chunk, head_dim, dtype=dtype) for heads in (kv_heads * group, kv_heads))
    storage, scoring = layer(head_dim, centered=True), Scoring(head_dim**-0.5)
    with compiling_for(TARGETS[chip]) as compiled:
        launch_extend(torch.empty_like(q), q, storage, tokens, scoring, (new, new.clone()), first_tokens)
    return compiled
