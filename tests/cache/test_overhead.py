"""What a decode step costs beside the kernels: Python from ``update`` to the attention output."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.attention import int8_paged_attention
from hf_int8_paged.kernels import alloc_paged_int8_layer, load_backend, why_unavailable

LAYERS, TOKENS = 30, 16
#: Microseconds per layer on top of the kernels.
ALLOWED = 30.0


class Attention(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 3


def fastest(call: Callable[[], None], rounds: int = 200) -> float:
    """Microseconds per layer of the fastest of many rounds: other work on the machine only ever adds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best / LAYERS * 1e6


@pytest.mark.skipif(
    why_unavailable("cpu", torch.device("cpu")) is not None, reason="needs the native CPU backend (a C compiler)"
)
@torch.no_grad()
def test_a_step_costs_at_most_30_microseconds_per_layer_on_top_of_the_kernels(benchmark):
    config = LlamaConfig(num_hidden_layers=LAYERS, hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
    cache, module = PagedInt8Cache(config), Attention()
    prompt = torch.randn(1, 3, TOKENS, 64)
    for layer in range(LAYERS):
        cache.update(prompt, -prompt, layer)
    row, query = torch.randn(1, 3, 1, 64), torch.randn(1, 9, 1, 64)

    def step() -> None:
        for layer in range(LAYERS):
            keys, values = cache.update(row, row, layer)
            int8_paged_attention(module, query, keys, values, None, scaling=0.125)
        cache.crop(-1)

    backend = load_backend("cpu")
    table = torch.arange(2, dtype=torch.int32)[None]
    before, after = (torch.tensor([n], dtype=torch.int32) for n in (TOKENS, TOKENS + 1))
    out = torch.empty(1, 9, 1, 64)
    step()  # the pool has grown to what it needs
    storages = [layer.storage for layer in cache.layers]

    def kernels_alone() -> None:
        for storage in storages:
            backend.append(row, row, storage, table, before)
            backend.decode(out, query, storage, table, after, 0.125, None, None, 0, None, None, None)

    whole, kernels = fastest(step), fastest(kernels_alone)
    benchmark.extra_info["microseconds per layer: whole step, kernels alone"] = (whole, kernels)
    benchmark(step)
    assert whole - kernels <= ALLOWED


@pytest.mark.skipif(
    why_unavailable("cpu", torch.device("cpu")) is not None, reason="needs the native CPU backend (a C compiler)"
)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(3, 3, 64), (8, 4, 128), (1, 4, 256)])
def test_rotation_and_centring_cost_at_most_5_microseconds_per_layer(kv_heads, group, head_dim):
    """An append and a decode of one token over 500, with both and with neither."""
    backend = load_backend("cpu")
    table, before = torch.arange(32, dtype=torch.int32)[None], torch.tensor([500], dtype=torch.int32)
    prompt = torch.randn(1, kv_heads, 500, head_dim)
    row, query = torch.randn(1, kv_heads, 1, head_dim), torch.randn(1, kv_heads * group, 1, head_dim)
    out, after = torch.empty_like(query), before + 1
    best = {}
    for rotation in (None, "hadamard"):
        storage = alloc_paged_int8_layer(
            32, 16, kv_heads, head_dim, backend="cpu", rotation=rotation, center_keys=rotation is not None
        )
        backend.append(prompt, prompt, storage, table, torch.zeros(1, dtype=torch.int32))

        def step(storage=storage) -> None:
            for _ in range(LAYERS):
                backend.append(row, row, storage, table, before)
                backend.decode(out, query, storage, table, after, 0.1, None, None, 0, None, None, None)

        best[rotation] = fastest(step)
    assert best["hadamard"] - best[None] <= 5.0
