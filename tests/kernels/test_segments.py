"""A storage that has grown: no block id names two places, nothing moves, and what is refused leaves all as it was."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_int8_paged.kernels import (
    KvCacheQuant,
    Tokens,
    alloc_paged_int8_layer,
    grow_paged_int8_layer,
    int8_paged_decode_attention,
    load_backend,
    read_blocks,
    write_blocks,
)
from hf_int8_paged.kernels.cpu.memory import HUGE_PAGE
from tests.segments import STORES, in_segments, whole

from .helpers import device_of, make_case, poisoned_layer, snapshot

sizes = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def grown(backend: str, added: list[int]) -> KvCacheQuant:
    """A storage that grew by so many blocks each time."""
    storage = alloc_paged_int8_layer(added[0], 16, 3, 32, device=device_of(backend), backend=backend)
    for count in added[1:]:
        storage = grow_paged_int8_layer(storage, storage.num_blocks + count)
    return storage


def addresses(storage: KvCacheQuant) -> list[tuple[int, int]]:
    """First byte and the one after the last of every (tensor, head, block)."""
    return [
        (x.data_ptr() + at * step, x.data_ptr() + (at + 1) * step)
        for segment in storage.segments
        for x in segment
        for step in [x[0, 0].nbytes]
        for at in range(x.shape[0] * x.shape[1])
    ]


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_no_block_id_names_two_places(added: list[int]) -> None:
    for backend in ("reference", "cpu"):
        storage = grown(backend, added)
        assert storage.num_blocks == sum(added)
        assert storage.nbytes == sum(x.nbytes for segment in storage.segments for x in segment)
        places = sorted(addresses(storage))
        assert len(places) == 4 * 3 * sum(added)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(places))


@settings(deadline=None, max_examples=60)
@given(sizes, st.randoms(use_true_random=False))
def test_every_block_keeps_what_was_written_to_it(added: list[int], random) -> None:
    """By the backend's own kernels, through ids in any order."""
    for backend in ("reference", "cpu"):
        storage, count = grown(backend, added), sum(added)
        order = random.sample(range(count), count)
        table = torch.tensor([order], dtype=torch.int32)
        rows = torch.arange(1.0, 16 * count + 1).view(1, 1, -1, 1).expand(1, 3, -1, 32)
        tokens = Tokens.at(table, torch.zeros(1, dtype=torch.int32))
        load_backend(backend).append(rows, -rows, storage, tokens)
        for read_by in ("reference", backend):
            tokens = Tokens.at(table, torch.tensor([16 * count], dtype=torch.int32))
            k, v = load_backend(read_by).gather(storage, tokens, 0, 16 * count, torch.float32)
            assert ((k / rows - 1).abs() < 1e-3).all()  # float16 scales
            assert torch.equal(k, -v)


def test_nothing_moves_when_a_storage_grows(backend: str) -> None:
    storage = poisoned_layer(backend, 7, 16, 2, 32, center_keys=True)
    before, where = snapshot(storage), addresses(storage)
    larger = grow_paged_int8_layer(storage, 11)
    assert larger.num_blocks == 11
    assert larger.key_center is storage.key_center
    assert (larger.backend, larger.tile_order, larger.format) == (storage.backend, storage.tile_order, storage.format)
    for name, bits in snapshot(larger).items():
        assert (bits[:, :7] == before[name]).all()
    if load_backend(backend).SEGMENTS:
        assert addresses(larger)[: len(where)] == where
        larger.segments[0].k.fill_(5)
        assert (storage.segments[0].k == 5).all()


def test_a_storage_without_blocks_grows_to_one_segment(backend: str) -> None:
    larger = grow_paged_int8_layer(alloc_paged_int8_layer(0, 16, 2, 32, device=device_of(backend), backend=backend), 3)
    assert (larger.num_blocks, len(larger.segments)) == (3, 1)


@pytest.mark.parametrize("num_blocks", [0, 6, 7])
def test_a_storage_does_not_shrink(backend: str, num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks must be more than the storage's 7, got {num_blocks}"):
        grow_paged_int8_layer(poisoned_layer(backend, 7, 16, 2, 32), num_blocks)


def test_segments_do_not_change_a_bit_of_attention() -> None:
    case = make_case("cpu", lens=(90, 33, 200), group=3, q_len=2, rotation="hadamard", center=True, window=70)
    assert len(case.storage.segments) == 3
    split = int8_paged_decode_attention(*case.arguments, **case.options)
    together = dataclasses.replace(case.storage, **{name: whole(case.storage, name) for name in STORES}, more=())
    assert len(together.segments) == 1
    case.storage = together
    assert torch.equal(int8_paged_decode_attention(*case.arguments, **case.options), split)


def test_blocks_are_read_and_written_back_over_boundaries() -> None:
    storage = in_segments(9, 16, 2, 32, backend="cpu")
    for name in STORES:
        for segment in storage.segments:
            x = getattr(segment, name)
            x.copy_(torch.rand(x.shape) * 100)
    ids = torch.tensor([8, 0, 5, 4, 1])
    read, want = read_blocks(storage, ids), {name: whole(storage, name).clone() for name in STORES}
    assert all(torch.equal(getattr(read, name), want[name][:, ids]) for name in STORES)
    write_blocks(storage, ids.flip(0), read)
    for name in STORES:
        want[name][:, ids.flip(0)] = getattr(read, name)
        assert torch.equal(whole(storage, name), want[name])


def test_a_backend_without_segments_refuses_them_by_number() -> None:
    triton = pytest.importorskip("hf_int8_paged.kernels.triton.layouts", reason="triton is not installed")
    storage = dataclasses.replace(in_segments(9, 16, 2, 32, backend="cpu"), backend="triton", tile_order="v_transposed")
    with pytest.raises(ValueError, match="backend 'triton' reads storages of one segment, not of 3"):
        triton.layer_of(storage)


@pytest.mark.parametrize(
    "wrong", [{"k": torch.zeros(2, 3, 16, 36, dtype=torch.int8)}, {"v_scales": torch.zeros(2, 3, 16)}]
)
def test_a_segment_of_other_sizes_or_types_is_refused(wrong: dict[str, torch.Tensor]) -> None:
    storage = in_segments(9, 16, 2, 32, backend="cpu")
    segment = in_segments(3, 16, 2, 32, backend="reference").segments[0]._replace(**wrong)
    spoilt = dataclasses.replace(storage, more=(*storage.more, segment))
    rows, none = torch.zeros(1, 2, 1, 32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        load_backend("cpu").append(rows, rows, spoilt, Tokens.at(none[None], none))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells the advice given for memory")
def test_memory_that_fills_slowly_is_offered_for_huge_pages_once_it_is_full() -> None:
    """What a prompt fills is so at once; the first token of a huge page would wait for all of it."""
    per_block = 2 * 16 * 64
    storage = alloc_paged_int8_layer(2 * HUGE_PAGE // per_block, 16, 2, 64, backend="cpu")
    grown = grow_paged_int8_layer(storage, 2 * storage.num_blocks)
    first, second = (segment.k.data_ptr() for segment in grown.segments)
    assert "hg" in advice(first)
    assert "nh" in advice(second)
    grow_paged_int8_layer(grown, 3 * storage.num_blocks)
    assert "hg" in advice(second)


def advice(address: int) -> list[str]:
    """``VmFlags`` of the mapping at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(place[1], 16) <= address < int(place[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def test_memory_comes_from_whoever_was_named_also_when_the_storage_grows(backend: str) -> None:
    made: list[torch.Tensor] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(torch.empty(shape, dtype=dtype, device=device))
        return made[-1]

    storage = alloc_paged_int8_layer(2, 16, 2, 16, device=device_of(backend), backend=backend, empty=empty)
    assert [x.data_ptr() for x in storage.segments[0]] == [x.data_ptr() for x in made]
    larger = grow_paged_int8_layer(storage, 5)
    assert len(made) == 8
    assert [x.data_ptr() for x in larger.segments[-1]] == [x.data_ptr() for x in made[4:]]
    assert larger.empty is empty
