"""Calls that an exception ends: what the next one finds. ``tests/drill`` throws exceptions everywhere; these are the
cases that it does not reach, and those that a reader should know."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen3NextConfig, Qwen3NextForCausalLM

from hf_int8_paged import CacheFullError, PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.block_allocator import BlockAllocator
from hf_int8_paged.seam.attention import int8_paged_attention
from tests.models import random_ids

LAYERS = 2
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2
}  # fmt: skip
CONFIG = LlamaConfig(**SIZES)
KINDS: dict[str, Any] = {"growing": {}, "preallocated": {"max_batch_size": 2, "max_cache_len": 64}}


def rows(tokens: int, seed: int = 0, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def step(cache: PagedInt8Cache, tokens: int, batch: int = 2) -> None:
    for layer in range(LAYERS):
        cache.update(rows(tokens, tokens, batch), rows(tokens, tokens + 1, batch), layer)


def held(cache: PagedInt8Cache) -> list[torch.Tensor]:
    lengths = [int(cache.get_seq_length(layer)) for layer in range(LAYERS)]
    return [
        x.clone()[:, :, :length] for layer, length in zip(cache.layers, lengths) for x in (layer.keys, layer.values)
    ]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def interrupting(original: Callable) -> Callable:
    """Does what ``original`` does, and then what a user does who presses Ctrl-C."""

    def call(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        raise KeyboardInterrupt

    return call


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, does: Any, call: Callable) -> None:
    """Run ``call`` while ``owner.name`` is ``does``, which ends it."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, does)
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_was_interrupted_in_its_last_layer_can_be_repeated(kind: str, monkeypatch) -> None:
    cache, undisturbed = (PagedInt8Cache(CONFIG, **KINDS[kind]) for _ in range(2))
    for each in (cache, undisturbed):
        step(each, 20)
    cache.update(rows(1, 1), rows(1, 2), 0)
    layer = cache.layers[1]
    interrupt(
        monkeypatch, layer, "_append", interrupting(layer._append), lambda: cache.update(rows(1, 1), rows(1, 2), 1)
    )
    assert [int(cache.get_seq_length(layer)) for layer in range(LAYERS)] == [20, 20]
    for each in (cache, undisturbed):
        step(each, 1)
    assert same(held(cache), held(undisturbed))


def test_a_preallocated_cache_that_was_reordered_by_half_says_so(monkeypatch) -> None:
    cache = PagedInt8Cache(CONFIG, **KINDS["preallocated"])
    step(cache, 20)
    before = held(cache)
    layer = cache.layers[0]
    swap = torch.tensor([1, 0])
    interrupt(monkeypatch, layer.room, "select", interrupting(layer.room.select), lambda: cache.reorder_cache(swap))
    for operation in (lambda: step(cache, 1), lambda: cache.crop(-1), cache.fork):
        with pytest.raises(RuntimeError, match=r"reorder_cache of this cache was interrupted.*reset\(\)"):
            operation()
    cache.reset()
    step(cache, 20)
    assert same(held(cache), before)


class Meddling:
    """Stands for a layer of another kind, whose crop lets another cache take blocks before it fails."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.meanwhile = meanwhile

    def crop(self, tokens: int) -> None:
        self.meanwhile()
        raise KeyboardInterrupt


@pytest.mark.parametrize("others_come", [False, True], ids=["alone", "while another cache takes blocks"])
def test_a_crop_is_undone_unless_its_blocks_may_be_taken(others_come: bool, monkeypatch) -> None:
    pool = PagedInt8Pool()
    cache, other = (PagedInt8Cache(CONFIG, pool=pool) for _ in range(2))
    step(cache, 40)
    before = held(cache)
    meddling = [Meddling(functools.partial(step, other, 20) if others_come else list)]
    interrupt(monkeypatch, cache, "_require", lambda operation: meddling, functools.partial(cache.crop, -30))
    others = held(other) if others_come else []
    if others_come:
        with pytest.raises(RuntimeError, match=r"crop of this cache was interrupted.*reset\(\)"):
            cache.crop(-1)
        cache.reset()
        step(cache, 40)
        assert same(held(other), others)
    else:
        assert same(held(cache), before)
    step(cache, 1)
    meddling.clear()
    del cache, other
    assert all(allocator.num_used == 0 for allocator in pool.allocators.values())


def test_what_was_recorded_of_a_window_outlives_an_interrupted_step(monkeypatch) -> None:
    cache = PagedInt8Cache(MistralConfig(sliding_window=20, **SIZES))
    cache.activate_past_recording()
    step(cache, 60)
    cache.update(rows(1, 1), rows(1, 2), 0)
    layer = cache.layers[1]
    interrupt(
        monkeypatch, layer, "_append", interrupting(layer._append), lambda: cache.update(rows(1, 1), rows(1, 2), 1)
    )
    cache.crop(-30)
    assert cache.get_seq_length() == 30


def test_a_thread_that_died_inside_a_cache_keeps_nobody_out() -> None:
    cache = PagedInt8Cache(CONFIG)
    step(cache, 20)
    before = held(cache)

    def die() -> None:
        cache._sequences.guard.enter()
        cache._sequences.guard.inside["start"] = 20

    thread = threading.Thread(target=die)
    thread.start()
    thread.join()
    assert same(held(cache), before)
    step(cache, 1)
    assert cache.get_seq_length() == 21


@pytest.mark.parametrize("num_blocks", [0, 1, 7, 8, 23])
def test_counting_anew_finds_what_was_counted(num_blocks: int) -> None:
    allocator = BlockAllocator(num_blocks)
    first = allocator.allocate(num_blocks // 2)
    second = allocator.allocate(num_blocks // 3)
    allocator.retain(second)
    counts = [allocator.ref_count(block) for block in range(num_blocks)]
    free = allocator.num_free
    for _ in range(2):
        tables = [first, second, second]
        allocator.count_anew([np.array(blocks, dtype=np.int32) for blocks in tables])
        assert [allocator.ref_count(block) for block in range(num_blocks)] == counts
        assert allocator.num_free == free
        rest = allocator.allocate(free)
        assert sorted({*first, *second, *rest}) == list(range(num_blocks))
        assert allocator.num_free == 0


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("tokens", [1, 20], ids=["from_the_blocks", "long_chunk"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_in_the_attention_function_takes_the_step_back(kind: str, tokens: int, layer: int) -> None:
    """In the last layer too, behind whose update a step would count as done, and be appended twice when repeated."""
    cache = PagedInt8Cache(CONFIG, **KINDS[kind])
    step(cache, 20)
    before = held(cache)
    for index in range(layer + 1):
        views = cache.update(rows(tokens, 1), rows(tokens, 2), index)
    wrong_heads = torch.randn(2, 3, tokens, 16)
    module: Any = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
    with pytest.raises((ValueError, RuntimeError)):
        int8_paged_attention(module, wrong_heads, *views, None)
    assert [int(cache.get_seq_length(index)) for index in range(LAYERS)] == [20] * LAYERS
    assert same(held(cache), before)
    step(cache, 1)


def test_an_exception_over_older_views_leaves_the_newer_step_alone() -> None:
    cache = PagedInt8Cache(CONFIG)
    step(cache, 20)
    older = cache.update(rows(1, 1), rows(1, 2), 0)
    cache.update(rows(1, 1), rows(1, 2), 1)
    step(cache, 2)
    with pytest.raises((ValueError, RuntimeError)):
        int8_paged_attention(torch.nn.Identity(), torch.randn(2, 3, 1, 16), *older, None)
    assert cache.get_seq_length() == 23


def test_a_recurrent_state_that_has_moved_on_is_not_repeated_on() -> None:
    """Linear layers before the one that failed have taken the step's tokens in, and cannot give them back."""
    linear: dict[str, Any] = {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "vocab_size": 64, "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, **linear)).eval()
    model.set_attn_implementation("int8_paged")
    cache = PagedInt8Cache(model.config, max_tokens=32)
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds.index("PagedInt8Layer") > 0
    with torch.no_grad():
        with pytest.raises(CacheFullError):  # of a first prompt nothing is left, anywhere
            model(random_ids(1, 40) % 64, past_key_values=cache)
        first = model(random_ids(1, 30) % 64, past_key_values=cache).logits
        with pytest.raises(CacheFullError):
            model(random_ids(1, 5) % 64, past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"a step of this cache was interrupted.*reset\(\)"):
            model(random_ids(1, 1) % 64, past_key_values=cache)
        cache.reset()
        assert torch.equal(model(random_ids(1, 30) % 64, past_key_values=cache).logits, first)
        unlimited = PagedInt8Cache(model.config)
        model(random_ids(1, 30) % 64, past_key_values=unlimited)
        for each in (unlimited.fork(), unlimited):
            views = each.update(rows(1, 1, 1), rows(1, 2, 1), 1)
            with pytest.raises((ValueError, RuntimeError)):
                int8_paged_attention(torch.nn.Identity(), torch.randn(1, 3, 1, 16), *views, None)
            with pytest.raises(RuntimeError, match=r"a step of this cache was interrupted.*reset\(\)"):
                model(random_ids(1, 1) % 64, past_key_values=each)


def test_an_assignment_that_was_interrupted_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedInt8Cache(CONFIG)
    step(cache, 20)
    layer = cache.layers[0]

    def assign() -> None:
        layer.keys = rows(20, 9)

    interrupt(monkeypatch, layer, "_append", interrupting(layer._append), assign)
    for operation in (lambda: step(cache, 1), lambda: cache.crop(-1), assign):
        with pytest.raises(RuntimeError, match=r"an assignment of keys.*interrupted.*reset\(\)"):
            operation()
    cache.reset()
    step(cache, 20)
