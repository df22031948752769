"""Which layers are near, and what is moved: pages and bytes are counted, not time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels import Segment
from hf_int8_paged.offloading import mapped
from tests.persistence.histories import model_called, step

from .offloaded import WAYS, needs_pagemap, offloaded, resident_bytes, resident_layers, slots_of

LAYERS = 6


def filled(way: str, tokens: int = 100, **options: Any) -> tuple[Any, PagedInt8Cache]:
    """A model of six layers, and a cache after a prompt of two sequences and two steps."""
    model = model_called("llama")
    model = type(model)(model.config.__class__(**{**model.config.to_dict(), "num_hidden_layers": LAYERS})).eval()
    model.set_attn_implementation("int8_paged")
    cache = offloaded(model.config, way, **options)
    for count in (tokens, 1, 1):
        step(model, cache, 2, count)
    return model, cache


def near(cache: PagedInt8Cache) -> list[int]:
    assert cache.pool.offloaded is not None
    return sorted(layer for side in cache.pool.offloaded.far_sides.values() for layer in side.near)


@needs_pagemap
@pytest.mark.parametrize("resident", [0, 1, 4])
def test_after_a_step_the_process_has_pages_of_the_last_layer_and_of_those_that_stay(
    resident: int, backend: str
) -> None:
    model, cache = filled("mapped", resident_layers=resident, backend=backend)
    for _ in range(3):
        step(model, cache, 2, 1)
        assert near(cache) == [LAYERS - 1]
        assert resident_layers(cache) == [*range(resident), LAYERS - 1]


@needs_pagemap
def test_a_layer_that_is_sent_away_leaves_no_page_behind_and_comes_back_as_it_was() -> None:
    _, cache = filled("mapped", tokens=600)
    layer = cache.layers[2]
    held = [x for segment in cache.pool.look_at(2).segments for x in segment]
    before = [x.clone() for x in layer.gather(0, layer.length, torch.float32)]
    read = resident_bytes(held)
    assert read >= cache.nbytes_used // LAYERS  # all that holds tokens was read
    layer.offload()
    assert resident_bytes(held) == 0
    cache.offload(2)  # it is away
    assert all(torch.equal(a, b) for a, b in zip(before, layer.gather(0, layer.length, torch.float32)))
    assert resident_bytes(held) == read
    assert cache.nbytes_allocated == sum(storage.nbytes for storage in cache.pool.storages.values()) + (
        cache._first_tokens_nbytes
    )


@needs_pagemap
def test_what_grows_on_another_backend_by_copying_does_not_stay_in_memory() -> None:
    """The reference copies a layer's blocks when it grows; here every backend does."""
    model, cache = filled("mapped", backend="reference", tokens=30)
    before = cache.pool.allocators["full_attention"].num_blocks
    step(model, cache, 2, 200)
    assert cache.pool.allocators["full_attention"].num_blocks > before
    assert resident_layers(cache) == [LAYERS - 1]


def test_the_system_is_told_one_layer_ahead_and_of_blocks_in_use_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = filled("mapped")
    advised: list[tuple[int, int, int]] = []
    monkeypatch.setattr(mapped, "_advise", lambda x, advice: advised.append((x.data_ptr(), x.nbytes, advice)))
    monkeypatch.setattr(mapped, "_SMALL", 0)
    step(model, cache, 2, 1)
    in_use = cache.pool.allocators["full_attention"].end
    will_need, dont_need = mapped.mmap.MADV_WILLNEED, mapped.mmap.MADV_DONTNEED
    asked = {address: size for address, size, advice in advised if advice == will_need}
    for layer in range(LAYERS):
        storage, first = cache.pool.look_at(layer), 0
        for segment in storage.segments:
            held = max(min(in_use - first, segment.num_blocks), 0)
            first += segment.num_blocks
            for x in segment:
                per_head = x[0, :1].nbytes
                found = sum(asked.get(x[head].data_ptr(), 0) for head in range(x.shape[0]))
                assert found == x.shape[0] * held * per_head
    tensors = sum(len(cache.pool.look_at(layer).segments) * len(Segment._fields) for layer in range(LAYERS))
    assert sum(advice == dont_need for _, _, advice in advised) == tensors


def test_a_step_brings_every_layer_once_and_takes_the_blocks_of_its_tokens_back(backend: str) -> None:
    model, cache = filled("copied", tokens=200, backend=backend)
    cache.crop(-100)  # there are free blocks then, and nothing grows
    side, layer_bytes = slots_of(cache), [cache.pool.look_at(layer).nbytes for layer in range(LAYERS)]
    per_block = cache.pool.look_at(0).bytes_per_token * cache.pool.block_size
    for length, tokens, blocks in [(102, 1, 2), (104, 2, 2), (107, 30, 6), (138, 6, 2)]:
        assert cache.get_seq_length() == length
        step(model, cache, 2, tokens)  # to two sequences
        brought, returned = side.bytes_brought, side.bytes_returned
        step(model, cache, 2, 1)
        # Of the step before, its last layer has yet to leave; of this one too.
        assert side.bytes_brought - brought == sum(layer_bytes)
        assert side.bytes_returned - returned == (LAYERS - 1) * 2 * per_block + blocks * per_block
        assert near(cache) == [0, LAYERS - 1]


def test_reading_takes_nothing_back() -> None:
    _, cache = filled("copied")
    side = slots_of(cache)
    for layer in range(LAYERS):
        cache.offload(layer)
    returned = side.bytes_returned
    for layer in cache.layers:
        layer.keys.clone()
    assert side.bytes_returned == returned
    assert near(cache) == [0, LAYERS - 1]


def test_copying_blocks_for_a_beam_takes_those_back() -> None:
    model, cache = filled("copied", tokens=37)  # 39 tokens: the last block is partly filled
    side, per_block = slots_of(cache), cache.pool.look_at(0).bytes_per_token * cache.pool.block_size
    cache.batch_repeat_interleave(2)
    for layer in range(LAYERS):
        cache.offload(layer)
    returned = side.bytes_returned
    step(model, cache, 4, 1)
    for layer in range(LAYERS):
        cache.offload(layer)
    # Two sequences get copies of their last blocks, then four tokens are written, which may be two trips of a block.
    assert 4 * LAYERS * per_block <= side.bytes_returned - returned <= 6 * LAYERS * per_block


def test_slots_are_two_layers_whatever_their_sizes(backend: str) -> None:
    _, cache = filled("copied", backend=backend)
    side = slots_of(cache)
    largest = max(cache.pool.look_at(layer).nbytes for layer in range(LAYERS))
    assert len(side.slots) == 2
    for slot in side.slots:
        assert slot.buffer.nbytes == largest


@pytest.mark.parametrize("way", WAYS)
def test_prefetch_takes_the_next_layer_that_leaves_and_then_the_first(way: str) -> None:
    _, cache = filled(way, resident_layers=2)
    for layer in range(LAYERS):
        cache.offload(layer)
    assert near(cache) == []
    if way == "mapped":
        cache.prefetch(0)
        assert near(cache) == []  # the system reads, the process has no pages yet
        return
    for asked, found in [(0, [2]), (3, [2, 3]), (5, [3, 5]), (LAYERS, [2, 5])]:
        cache.prefetch(asked)
        assert near(cache) == found
    cache.layers[4].prefetch()
    assert near(cache) == [2, 4]
    cache.layers[0].prefetch()  # it stays
    cache.layers[0].offload()
    assert near(cache) == [2, 4]


@pytest.mark.parametrize("way", WAYS)
def test_what_a_cache_says_of_it(way: str) -> None:
    _, cache = filled(way, resident_layers=1)
    where = cache.describe().offloaded
    assert where is not None
    assert (where.layers, where.near) == (LAYERS - 1, 1 if way == "mapped" else 2)
    assert where.bytes_near + where.bytes_far == sum(cache.pool.look_at(i).nbytes for i in range(1, LAYERS))
    text = str(cache.describe())
    assert f"{LAYERS - 1} layers of the pool, {where.near} near" in text
    assert ("in files in " if way == "mapped" else "in the host's memory") in text
    assert f"{LAYERS - 1 - where.near} of its pool's {LAYERS - 1} layers that leave are away" in repr(cache)
    plain = PagedInt8Cache(cache._config)
    assert plain.describe().offloaded is None
    assert "away" not in repr(plain)


class Recorded:
    """Stands for the streams of a device: events are moments, and what waits for which is written down."""

    def __init__(self) -> None:
        self.now = 0
        #: What kernels have waited for.
        self.waits: list[Moment] = []

    @contextmanager
    def after(self, event: Moment | None, buffer: torch.Tensor) -> Iterator[None]:
        yield

    def mark(self) -> Moment:
        self.now += 1
        return Moment(self.now)

    mark_side = mark

    def wait(self, event: Moment) -> None:
        self.waits.append(event)

    def finish(self) -> None:
        pass


class Moment:
    """An event, which the host may have waited for."""

    def __init__(self, number: int):
        self.number = number
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


def test_no_slot_is_filled_before_its_kernels_have_read_and_none_is_read_before_it_is_filled() -> None:
    """On a device with streams; the copies themselves are the CPU's."""
    model, cache = filled("copied")
    side, streams = slots_of(cache), Recorded()
    side._streams = streams  # type: ignore[assignment]
    arrive, handed_out = side.arrive, dict[int, int]()

    def arriving(layer: int, home: Any) -> Any:
        storage = arrive(layer, home)
        (slot,) = (slot for slot in side.slots if slot.held is not None and slot.held.layer == layer)
        assert slot.arrived is None, "somebody has waited for the copy"
        streams.now += 1
        handed_out[slot.buffer.data_ptr()] = streams.now
        return storage

    side.arrive = arriving  # type: ignore[method-assign]
    used = dict[int, int]()
    begin = streams.after

    def beginning(event: Moment | None, buffer: torch.Tensor) -> Any:
        used_until = handed_out.get(buffer.data_ptr())
        if used_until is not None:
            assert event is not None
            assert event.number > used_until, "the event comes after the last kernel that was given the slot"
            used[buffer.data_ptr()] = used_until
        return begin(event, buffer)

    streams.after = beginning  # type: ignore[method-assign]
    for tokens in (1, 1, 20, 1):
        step(model, cache, 2, tokens)
    assert len(used) >= 2  # growth makes other buffers
    assert len(streams.waits) >= 4 * LAYERS
    assert not any(x.event.waited for returning in side._returning.values() for x in returning if x.event is not None)
    waiting = [x.event for x in side._returning[2] if x.event is not None]
    cache.pool.offloaded.home(2)  # type: ignore[union-attr]
    assert waiting
    assert all(event.waited for event in waiting), "the host puts blocks in their places when they are there"
