"""A pool or a cache with ``max_bytes`` that was full takes what a new one takes, as soon as its tokens are gone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_int8_paged import CacheFullError, PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.block_allocator import BlockAllocator
from tests.models import random_ids
from tests.persistence.histories import assert_same

from .offloaded import WAYS, choose
from .test_max_bytes import model_called, refusal_of, step

LIMIT = 100 << 10


def filled(model: Any, cache: PagedInt8Cache, prompt: int) -> PagedInt8Cache:
    """The cache with one sequence of as many tokens as its pool takes."""
    step(model, cache, 1, prompt)
    for tokens in (60, 7, 1):
        while refusal_of(model, cache, 1, tokens) is None:
            pass
    return cache


def pool_of(way: str, **options: Any) -> PagedInt8Pool:
    if way == "near":
        return PagedInt8Pool(**options)
    return choose(PagedInt8Pool(offloading=True, offload_only_non_sliding=False, **options), way)


@pytest.mark.parametrize("way", ["near", *WAYS])
@pytest.mark.parametrize("prompt", [16, 150])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_what_was_full_takes_what_a_new_cache_takes(name: str, prompt: int, way: str, backend: str) -> None:
    model = model_called(name)
    limit = {"llama": LIMIT, "gemma2": 600_000}[name] * (3 if way == "copied" else 1)
    taken = 0
    for batch, tokens in ((2, 16), (16, 16), (40, 1), (4, 10), (1, 220)):
        pools = [pool_of(way, max_bytes=limit, backend=backend) for _ in range(2)]
        old, new = (PagedInt8Cache(model.config, pool=pool) for pool in pools)
        filled(model, old, prompt)
        old.reset()
        said = [refusal_of(model, cache, batch, tokens) for cache in (old, new)]
        assert (said[0] is None) == (said[1] is None)
        taken += said[0] is None
        for cache in (old, new):
            assert cache.nbytes_allocated <= limit
    assert taken >= 3


def test_first_tokens_of_sequences_that_are_gone_make_room(backend: str) -> None:
    """Those of one step stay until the next prompt, also where a block for each sequence leaves no room for both."""
    model = model_called("llama")
    fits = PagedInt8Cache(model.config, sink_tokens=16, backend=backend)
    step(model, fits, 8, 16)
    cache = PagedInt8Cache(model.config, sink_tokens=16, backend=backend, max_bytes=fits.nbytes_allocated)
    for _ in range(3):
        step(model, cache, 8, 16)
        assert cache.nbytes_allocated == fits.nbytes_allocated
        cache.reset()


def test_blocks_of_one_group_make_room_for_the_other(backend: str) -> None:
    model = model_called("gemma2")
    cache, new = (PagedInt8Cache(model.config, max_bytes=600_000, backend=backend) for _ in range(2))
    for batch in range(10, 200, 10):  # short ones, whose windows take as many blocks as the rest
        if refusal_of(model, cache, batch, 15) is not None:
            break
        cache.reset()
    assert not cache.get_seq_length()
    step(model, new, 1, 224)
    step(model, cache, 1, 224)
    assert cache.nbytes_allocated <= 600_000


def test_blocks_behind_the_last_one_make_room_while_others_have_tokens(backend: str) -> None:
    model = model_called("llama")
    pool, new = (PagedInt8Pool(max_bytes=LIMIT, backend=backend) for _ in range(2))
    short = PagedInt8Cache(model.config, pool=pool)
    step(model, short, 1, 16)
    before = short.fork()
    long = filled(model, PagedInt8Cache(model.config, pool=pool), 16)
    del long
    counts = []
    for shared, others in ((pool, [short]), (new, [])):
        while True:
            others.append(PagedInt8Cache(model.config, pool=shared))
            if refusal_of(model, others[-1], 1, 16) is not None:
                break
            assert shared.bytes_held <= LIMIT
        counts.append(len(others))
    segments = len(pool.storages[0].segments)
    assert counts[0] == counts[1] if backend != "triton" else segments == 1
    assert_same(short, before)
    step(model, short, 1, 1)


def test_a_refusal_says_what_is_free_while_others_have_tokens(backend: str) -> None:
    model = model_called("llama")
    pool = PagedInt8Pool(max_bytes=LIMIT, backend=backend)
    long = PagedInt8Cache(model.config, pool=pool)
    step(model, long, 1, 440)  # blocks in one piece, of which none is given back before all are free
    others = [PagedInt8Cache(model.config, pool=pool)]
    step(model, others[0], 1, 5)
    del long
    while True:
        others.append(PagedInt8Cache(model.config, pool=pool))
        said = refusal_of(model, others[-1], 1, 5)
        if said is not None:
            break
    free = pool.allocators["full_attention"].num_free
    assert f"; {free} blocks of full_attention are free, but for nothing else while the pool holds any" in said
    assert "free sequences, shorten" in said
    del others[:]
    empty = PagedInt8Cache(model.config, pool=pool)
    said = refusal_of(model, empty, 1, 3000)
    assert said is not None
    assert "are free" not in said
    assert "take fewer sequences, shorten" in said
    step(model, empty, 16, 16)


def test_a_cache_without_tokens_is_what_it_was(backend: str, tmp_path: Path) -> None:
    """When another one has had all memory given back."""
    model = model_called("llama")
    pool = PagedInt8Pool(max_bytes=LIMIT, backend=backend)
    empty, other = (PagedInt8Cache(model.config, pool=pool) for _ in range(2))
    filled(model, empty, 100)
    empty.reset()
    assert refusal_of(model, other, 1, 3000) is not None
    assert pool.nbytes_allocated == 0 == pool.bytes_held
    assert empty.layers[0].storage.num_blocks == 0
    assert empty.describe().bytes_allocated == 0
    empty.save(tmp_path / "empty")
    loaded = PagedInt8Cache.load(tmp_path / "empty", model.config, pool)
    for cache in (empty, other, loaded, empty.fork()):
        step(model, cache, 1, 40)
        cache.reset()


def test_tokens_that_are_padding_alone_keep_the_memory(backend: str) -> None:
    """They need no block, but the layers' shapes and centres are theirs."""
    model = model_called("llama")
    pool = PagedInt8Pool(max_bytes=LIMIT, backend=backend)
    cache = filled(model, PagedInt8Cache(model.config, pool=pool), 100)
    cache.reset()
    padded = PagedInt8Cache(model.config, pool=pool)
    with torch.no_grad():
        model(random_ids(1, 16), past_key_values=padded, attention_mask=torch.zeros(1, 16, dtype=torch.long))
    assert pool.allocators["full_attention"].num_used == 0
    held = pool.nbytes_allocated
    assert refusal_of(model, cache, 1, 3000) is not None
    assert pool.nbytes_allocated in (held, 0), "blocks that nobody holds may go, layers stay"
    step(model, padded, 1, 20)


@pytest.mark.parametrize("where", ["storages", "allocators", "first tokens"])
def test_an_exception_meanwhile_leaves_the_rest_to_the_next_step(where: str, backend: str, monkeypatch: Any) -> None:
    model = model_called("llama")
    cache = PagedInt8Cache(model.config, max_bytes=LIMIT, backend=backend)
    filled(model, cache, 100)
    cache.reset()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    targets = {
        "storages": ("hf_int8_paged.pool_giving_back._first_blocks", interrupt),
        "allocators": ("hf_int8_paged.block_allocator.BlockAllocator.forget_blocks", interrupt),
        "first tokens": ("hf_int8_paged.sequences.first_tokens.LayerFirstTokens.forget", interrupt),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*targets[where])
        with pytest.raises(KeyboardInterrupt):
            step(model, cache, 16, 16)
    assert cache.describe().sequences == 0
    step(model, cache, 16, 16)
    assert cache.nbytes_allocated <= LIMIT


def test_threads_whose_caches_fill_a_pool_by_turns(backend: str) -> None:
    """Whoever is refused, everybody's tokens are right."""
    model = model_called("llama")
    pool = PagedInt8Pool(max_bytes=LIMIT, backend=backend, center_keys=False)
    right = PagedInt8Cache(model.config, backend=backend, center_keys=False)
    step(model, right, 2, 37)
    step(model, right, 2, 3)
    wrong: list[Any] = []

    def work(number: int) -> None:
        cache = PagedInt8Cache(model.config, pool=pool)
        for turn in range(12):
            try:
                if (turn + number) % 3 == 0:
                    step(model, cache, 1, 300)
                else:
                    step(model, cache, 2, 37)
                    step(model, cache, 2, 3)
                    assert_same(cache, right)
            except CacheFullError:
                pass
            except BaseException as error:
                wrong.append(error)
            cache.reset()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.bytes_held <= LIMIT
    assert not any(allocator.num_used for allocator in pool.allocators.values())


@pytest.mark.parametrize("blocks", [40, 37, 8, 5, 1])
def test_an_allocator_with_fewer_blocks(blocks: int) -> None:
    allocator = BlockAllocator(43)
    held = allocator.allocate(min(blocks, 3))
    allocator.shrink(blocks)
    assert (allocator.num_blocks, allocator.num_free) == (blocks, blocks - len(held))
    taken = allocator.allocate(allocator.num_free)
    assert sorted([*held, *taken]) == list(range(blocks))
    with pytest.raises(ValueError, match="1 blocks asked for, 0 are free"):
        allocator.allocate(1)
    allocator.release(np.array(taken))
    allocator.count_anew([held])
    assert allocator.num_free == blocks - len(held)
    allocator.grow(50)
    assert len(allocator.allocate(allocator.num_free)) == 50 - len(held)
