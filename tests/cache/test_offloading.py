"""A cache whose layers leave their device computes what one whose layers stay does, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_int8_paged import PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.persistence.tensor_file import TensorFile
from tests.models import random_ids
from tests.persistence.histories import HISTORIES, HYBRIDS, assert_same, model_called, step

from .offloaded import WAYS, choose, offloaded


def assert_go_on_alike(model: PreTrainedModel, mine: PagedInt8Cache, other: PagedInt8Cache) -> None:
    batch = other._batch or 2
    for tokens in (1, 19, 1):
        assert torch.equal(step(model, mine, batch, tokens), step(model, other, batch, tokens))
    assert_same(mine, other)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_and_contents_are_those_of_a_cache_that_stays(name: str, way: str, history: str, backend: str) -> None:
    """Prompts, padding, windows that move on, beams, equal prompts, recorded pasts, and what follows them."""
    model = model_called(name)
    plain, cache = PagedInt8Cache(model.config, backend=backend), offloaded(model.config, way, backend=backend)
    for one in (plain, cache):
        HISTORIES[history](model, one)
    assert_same(cache, plain)
    assert_go_on_alike(model, cache, plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_that_hold_no_keys_are_passed_over(name: str, way: str) -> None:
    model = model_called(name)
    plain, cache = PagedInt8Cache(model.config), offloaded(model.config, way)
    for tokens in (25, 1):
        assert torch.equal(step(model, cache, 2, tokens), step(model, plain, 2, tokens))
    assert_go_on_alike(model, cache, plain)


@pytest.mark.parametrize("only_non_sliding", [False, True])
@pytest.mark.parametrize("resident_layers", [0, 1, 2, 9])
@pytest.mark.parametrize("way", WAYS)
def test_whichever_layers_stay(way: str, resident_layers: int, only_non_sliding: bool, backend: str) -> None:
    """Gemma 2 has four layers, every other one with a window."""
    model = model_called("gemma2")
    options: dict[str, Any] = {"resident_layers": resident_layers, "offload_only_non_sliding": only_non_sliding}
    plain, cache = (
        PagedInt8Cache(model.config, backend=backend),
        offloaded(model.config, way, backend=backend, **options),
    )
    for one in (plain, cache):
        HISTORIES["out_of_the_window"](model, one)
    leaving = [layer for layer in range(4) if not (only_non_sliding and cache.layers[layer].is_sliding)]
    assert cache.pool.offloaded is not None
    assert [layer for layer in range(4) if cache.pool.offloaded.leaves(layer)] == leaving[resident_layers:]
    assert_go_on_alike(model, cache, plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_copies_are_made_of_blocks_that_are_near(implementation: str, way: str) -> None:
    model = model_called("llama")
    model.set_attn_implementation(implementation)
    plain, cache = PagedInt8Cache(model.config), offloaded(model.config, way)
    for one in (plain, cache):
        HISTORIES["prompt"](model, one)
    assert_go_on_alike(model, cache, plain)


@pytest.mark.parametrize("way", WAYS)
def test_views_are_read_long_after_their_layer_has_left(way: str) -> None:
    model = model_called("llama")
    plain, cache = PagedInt8Cache(model.config), offloaded(model.config, way)
    for one in (plain, cache):
        HISTORIES["prompt"](model, one)
    views = [[layer.values for layer in one.layers] for one in (plain, cache)]
    for order in ([2, 0, 1], [1, 1, 0, 2]):
        for layer in order:
            assert torch.equal(views[1][layer] + 0, views[0][layer] + 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("search", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_generate(search: dict[str, Any], way: str) -> None:
    model: Any = model_called("gemma2")
    tokens = []
    for cache in (PagedInt8Cache(model.config), offloaded(model.config, way)):
        torch.manual_seed(0)
        given: dict[str, Any] = {CACHE_ARGUMENT: cache, "max_new_tokens": 40, **search}
        tokens.append(model.generate(random_ids(1, 20), **given))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("way", WAYS)
def test_forks_and_copies_go_on_by_themselves(way: str, backend: str) -> None:
    model = model_called("gemma2")
    plain, cache = PagedInt8Cache(model.config, backend=backend), offloaded(model.config, way, backend=backend)
    for one in (plain, cache):
        HISTORIES["prompt"](model, one)
    twins = [[one, one.fork(), copy.deepcopy(one)] for one in (plain, cache)]
    for turn in range(3):  # in turns, so that each finds the others' layers near
        for of_plain, of_cache in zip(*twins):
            assert torch.equal(step(model, of_cache, 2, 1 + turn), step(model, of_plain, 2, 1 + turn))
    for of_plain, of_cache in zip(*twins):
        assert_same(of_cache, of_plain)


@pytest.mark.parametrize("way", WAYS)
def test_an_assignment_stores_the_whole_layer_anew(way: str) -> None:
    model = model_called("llama")
    plain, cache = PagedInt8Cache(model.config), offloaded(model.config, way)
    for one in (plain, cache):
        HISTORIES["prompt"](model, one)
        for layer in one.layers:
            layer.keys = layer.keys * 2
    assert_same(cache, plain)
    assert_go_on_alike(model, cache, plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("history", ["out_of_the_window", "beams"])
def test_files_do_not_know_of_it(history: str, way: str, backend: str, tmp_path: Path) -> None:
    """An offloaded cache writes the file that another one writes; either loads into pools of both kinds."""
    model = model_called("gemma2")
    plain, cache = PagedInt8Cache(model.config, backend=backend), offloaded(model.config, way, backend=backend)
    paths = [tmp_path / "plain", tmp_path / "offloaded"]
    for one, path in zip((plain, cache), paths):
        HISTORIES[history](model, one)
        one.save(path)
    assert TensorFile(paths[0]).checksums == TensorFile(paths[1]).checksums
    assert_same(PagedInt8Cache.load(paths[1], model.config, backend=backend), plain)
    pool = choose(PagedInt8Pool(backend=backend, offloading=True, offload_only_non_sliding=False), way)
    loaded = PagedInt8Cache.load(paths[0], model.config, pool)
    assert loaded.offloading
    assert_same(loaded, plain)
    assert_go_on_alike(model, loaded, plain)


@pytest.mark.parametrize("way", WAYS)
def test_a_pool_that_two_caches_use_in_turns(way: str, backend: str) -> None:
    model = model_called("llama")
    pool = choose(PagedInt8Pool(backend=backend, offloading=True), way)
    plain_pool = PagedInt8Pool(backend=backend)
    mine, others = ([PagedInt8Cache(model.config, pool=x) for _ in range(2)] for x in (pool, plain_pool))
    for tokens in (37, 1, 1, 20, 1):
        for one, other in zip(mine, others):
            assert torch.equal(step(model, one, 2, tokens), step(model, other, 2, tokens))
    for one, other in zip(mine, others):
        one.reset()
        other.reset()
    for one, other in zip(mine, others):
        assert_go_on_alike(model, one, other)
