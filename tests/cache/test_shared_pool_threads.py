"""Several threads, each with caches of its own, over one pool; and one cache that two threads enter."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import MistralConfig

from hf_int8_paged import PagedInt8Cache, PagedInt8Pool
from tests.models import fake_quantize

LAYERS = 2
CONFIG = MistralConfig(
    num_hidden_layers=LAYERS, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=40
)
PLAIN: dict[str, Any] = {"rotation": None, "center_keys": False}


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns as often as the interpreter can: a race of a few instructions then shows in every run."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def run_together(work: Callable[[int], None], threads: int) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(threads)

    def guarded(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    together = [threading.Thread(target=guarded, args=(number,)) for number in range(threads)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_threads_read_what_they_wrote_while_others_grow_the_pool(backend: str, switching: None) -> None:
    pool = PagedInt8Pool(backend=backend, **PLAIN)
    reads = [0] * 4

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for _ in range(12):
            cache = PagedInt8Cache(CONFIG, pool=pool, sink_tokens=0)
            rows = torch.empty(1, 2, 0, 16)
            for count in (30, 1, 1, 20, 1, 17, 1):
                new = torch.randn(1, 2, count, 16, generator=generator)
                rows = torch.cat([rows, new], dim=2)
                for layer in range(LAYERS):
                    cache.update(new, -new, layer)
                branch = cache.fork()
                for layer in range(LAYERS):
                    branch.update(-new, new, layer)
                stored = fake_quantize(rows)[:, :, -39:]
                for held in cache.layers:
                    assert torch.equal(held.keys.clone(), stored)
                    assert torch.equal(held.values.clone(), -stored)
                    reads[number] += 1

    run_together(work, len(reads))
    assert sum(reads) == 4 * 12 * 7 * LAYERS
    gc.collect()
    for allocator in pool.allocators.values():
        assert allocator.num_used == 0
        assert allocator.num_free == allocator.num_blocks


def test_caches_that_start_together_agree_on_the_keys_centre(switching: None) -> None:
    """Whoever is alone may choose the centre; nobody may change it under tokens that are stored."""
    for attempt in range(15):
        pool = PagedInt8Pool(rotation=None)

        def work(number: int, pool: PagedInt8Pool = pool, attempt: int = attempt) -> None:
            generator = torch.Generator().manual_seed(10 * attempt + number)
            rows = 20 * (number + 1) + torch.randn(1, 2, 18, 16, generator=generator)
            cache = PagedInt8Cache(CONFIG, pool=pool, sink_tokens=0)
            for layer in range(LAYERS):
                cache.update(rows, rows, layer)
            for held in cache.layers:
                # Half a step of a row around a centre that lies at most 60 away.
                assert (held.keys.clone() - rows).abs().max() < 70 / 127

        run_together(work, 3)


def test_the_garbage_collector_may_delete_a_cache_in_the_middle_of_an_allocation(monkeypatch) -> None:
    pool = PagedInt8Pool(**PLAIN)
    row = torch.randn(1, 2, 20, 16)

    def used_cache() -> PagedInt8Cache:
        cache = PagedInt8Cache(CONFIG, pool=pool)
        for layer in range(LAYERS):
            cache.update(row, row, layer)
        return cache

    doomed, cache = [used_cache()], used_cache()
    allocator = pool.allocators["sliding_attention_40"]
    find, held = allocator._next_block, allocator.num_used

    def find_while_collecting(after: int) -> int:
        doomed.clear()
        assert allocator.num_used == held, "blocks came back while others were being taken"
        return find(after)

    monkeypatch.setattr(allocator, "_next_block", find_while_collecting)
    for layer in range(LAYERS):
        cache.update(row, row, layer)
    assert allocator.num_used == held - 2 + 1  # the other cache's two blocks are back, this one has one more
    stored = fake_quantize(torch.cat([row, row], dim=2)[:, :, -39:])
    assert torch.equal(cache.layers[0].keys[:, :, -19:], stored[:, :, -19:])


def test_growth_waits_for_a_kernel_that_writes_and_lets_it_finish() -> None:
    pool = PagedInt8Pool(**PLAIN)
    writer, steps = pool.access.join(), []
    writing, release = threading.Event(), threading.Event()

    def write() -> None:
        with writer:
            writing.set()
            release.wait()
            steps.append("written")

    def grow() -> None:
        with pool.access.exclusive(), pool.access.growing():
            steps.append("grown")

    threads = [threading.Thread(target=write), threading.Thread(target=grow)]
    threads[0].start()
    writing.wait()
    threads[1].start()
    while not pool.access.is_growing:
        pass
    assert not steps
    release.set()
    for thread in threads:
        thread.join()
    assert steps == ["written", "grown"]


OPERATIONS: dict[str, Callable[[PagedInt8Cache], object]] = {
    "update": lambda cache: cache.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), 0),
    "crop": lambda cache: cache.crop(-1),
    "reset": lambda cache: cache.reset(),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([0])),
    "fork": lambda cache: cache.fork(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_second_thread_inside_one_cache_is_refused(operation: str, monkeypatch) -> None:
    cache = PagedInt8Cache(CONFIG, sink_tokens=0, **PLAIN)
    rows = torch.randn(2, 2, 20, 16)
    for layer in range(LAYERS):
        cache.update(rows, rows, layer)
    backend = cache.layers[1].room.backend
    inside, release, append = threading.Event(), threading.Event(), backend.append

    def slow_append(*args) -> None:
        inside.set()
        release.wait()
        append(*args)

    cache.update(rows[:, :, :1], rows[:, :, :1], 0)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "append", slow_append)
        first = threading.Thread(target=lambda: cache.update(rows[:, :, :1], rows[:, :, :1], 1))
        first.start()
        inside.wait()
        try:
            with pytest.raises(RuntimeError, match=r"another thread is inside.*fork\(\)"):
                OPERATIONS[operation](cache)
        finally:
            release.set()
            first.join()
    assert cache.get_seq_length() == 21
    expected = fake_quantize(torch.cat([rows, rows[:, :, :1]], dim=2))
    assert torch.equal(cache.layers[1].keys.clone(), expected[:, :, -39:])
    OPERATIONS[operation](cache)  # and afterwards it is let in
