"""Caches without a model, and steps of them: which token lies where, and which row sees what."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ContinuousBatchingConfig, LlamaConfig
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.requests import RequestState

from hf_int8_paged.batching import PagedInt8AttentionCache
from hf_int8_paged.batching.cache import Int8Options
from hf_int8_paged.kernels import Scoring

FULL, SLIDING = "full_attention", "sliding_attention"
_KINDS = {"f": FULL, "s": SLIDING}
#: Width of keys and values: tokens of a test are numbers below it.
WIDTH = 64


def bare_cache(layers: str | None, window: int | None = None, *, count: int = 1, **options: Any) -> Any:
    """A cache with one KV head, no rotation, no centre and no first tokens in full precision.

    Args:
        layers: a letter for each, f: full, s: sliding window; None: the config does not say.
        window: of the sliding layers.
        count: layers if ``layers`` is None.
        options: of the engine, where they differ from 16 blocks of 16 tokens.

    Returns:
        The cache; not typed, as the engine's allocators have attributes that their base class does not know.
    """
    config = LlamaConfig(
        num_hidden_layers=count if layers is None else len(layers),
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=WIDTH,
        hidden_size=WIDTH,
        vocab_size=128,
    )
    config.sliding_window = window
    if layers is not None:
        config.layer_types = [_KINDS[letter] for letter in layers]
    sizes = {"page_size": 16, "num_blocks": 16, "max_batch_tokens": 64, "max_requests_per_batch": 8}
    engine = ContinuousBatchingConfig(**sizes | {"max_memory_percent": 0.5} | options)
    engine.use_async_batching = False
    return PagedInt8AttentionCache(
        options=Int8Options({}, rotation=None, sink_tokens=0),
        config=config,
        continuous_batching_config=engine,
        device=torch.device("cpu"),
        distributed_helper=DistributedHelper(None, None),
        dtype=torch.float32,
    )


def request(name: str, tokens: int = 1) -> RequestState:
    return RequestState(name, list(range(tokens)))


def seen_by_rows(cache: Any, parts: list[tuple[str, int, int]], layer: int) -> list[list[int]]:
    """Store the step's tokens in a layer, and say which of all tokens of its request every row sees.

    Equal keys give every visible token the same weight, and the value of token i is 1 in place i.

    Args:
        cache: with blocks for all tokens.
        parts: of each request its name, tokens that it had before, and new ones.
        layer: index.
    """
    write: list[list[int]] = [[] for _ in cache.cache_allocators]
    for name, past, rows in parts:
        cache.extend_read_and_write_indices(name, past, rows, None, write)
    values = torch.cat([torch.eye(WIDTH)[past : past + rows] for _, past, rows in parts])[None, None]
    zeros = torch.zeros_like(values)
    out = cache.attend(layer, zeros, zeros, values, Scoring(1.0, None, None))[0, :, 0]
    return [torch.nonzero(row > 0.5 / WIDTH).flatten().tolist() for row in out]


def written_slots(cache: Any, layer: int) -> dict[tuple[int, int], int]:
    """Which value each written slot of a layer's storage holds, by (block of the kernels, slot in it).

    Values are told by their scales: that of a row is its largest element divided by 127.
    """
    scales = cache.layer_to_allocator[layer].storages[layer].segments[0].v_scales[0].float() * 127
    places = torch.nonzero(scales).tolist()
    return {(block, slot): round(float(scales[block, slot])) for block, slot in places}


def store_numbers(cache: Any, name: str, past: int, rows: int) -> None:
    """One step of one request: in every layer the value of token p is p + 1."""
    write: list[list[int]] = [[] for _ in cache.cache_allocators]
    cache.extend_read_and_write_indices(name, past, rows, None, write)
    numbers = torch.arange(past, past + rows, dtype=torch.float32) + 1
    values = numbers[None, None, :, None].expand(1, 1, rows, WIDTH)
    zeros = torch.zeros_like(values)
    for layer in sorted(cache.layer_to_allocator):
        cache.attend(layer, zeros, zeros, values, Scoring(1.0, None, None))


def free_blocks(cache: Any, kind: str) -> int:
    """Blocks of a kind that a request could get, counting those of free sectors."""
    pages = cache.cache_allocators[kind]
    return cache.pool.count_free_blocks(pages.index) + cache.pool.num_free_sectors * pages.blocks_per_sector
