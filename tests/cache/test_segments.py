"""A cache whose layers grew by segments is, bit for bit, one whose layers were copied to larger memory."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels.cpu import backend as cpu
from tests.models import random_ids, tiny_model


def every_operation(architecture: str, **options) -> tuple[list[torch.Tensor], int]:
    """Logits after each operation on a cache that grows meanwhile, and the most segments that a layer had."""
    model = tiny_model(architecture)
    model.set_attn_implementation("int8_paged")
    cache, logits, segments = PagedInt8Cache(model.config, **options), [], 1
    seeds = iter(range(1000))

    def step(cache: PagedInt8Cache, batch: int, tokens: int) -> None:
        nonlocal segments
        with torch.no_grad():
            out = model(random_ids(batch, tokens, seed=next(seeds)), past_key_values=cache)
        logits.append(out.logits)
        segments = max(segments, *(len(layer.storage.segments) for layer in cache.layers))

    cache.activate_past_recording()
    step(cache, 2, 50)
    for _ in range(3):
        for tokens in (1, 3, 40):
            step(cache, 2, tokens)
    cache.crop(-37)
    step(cache, 2, 90)
    cache.reorder_cache(torch.tensor([1, 1]))
    step(cache, 2, 5)
    cache.batch_repeat_interleave(2)
    step(cache, 4, 33)
    cache.batch_select_indices(torch.tensor([3, 0, 2]))
    twin, other = cache.fork(), copy.deepcopy(cache)
    for one in (cache, twin, other):
        step(one, 3, 70)
    twin.crop(-100)
    for one in (cache, twin, other):
        step(one, 3, 1)
    return logits, segments


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral"])
@pytest.mark.parametrize(
    "options", [{}, {"block_size": 32, "rotation": None, "sink_tokens": 0}], ids=["default", "plain"]
)
def test_every_operation_over_the_boundaries_of_segments(monkeypatch, architecture: str, options: dict) -> None:
    got, segments = every_operation(architecture, **options)
    assert segments > 3
    monkeypatch.setattr(cpu, "SEGMENTS", False)
    want, one = every_operation(architecture, **options)
    assert one == 1
    assert all(map(torch.equal, got, want))


def test_growing_copies_no_block() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("int8_paged")
    cache = PagedInt8Cache(model.config)
    places: list[list[int]] = []
    with torch.no_grad():
        for _ in range(12):
            model(random_ids(1, 60), past_key_values=cache)
            places.append([s.k.data_ptr() for layer in cache.layers for s in layer.storage.segments[:1]])
    assert all(len(layer.storage.segments) > 3 for layer in cache.layers)
    assert all(place == places[0] for place in places)
