"""Which layers share blocks, what fits, forks and equal prefixes: transformers' tests of its allocators, with ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching.requests import RequestState

from .blocks import FULL, SLIDING, bare_cache, free_blocks, request, store_numbers


@pytest.mark.parametrize(
    ("layers", "window", "groups"),
    [
        ("f", None, {FULL: [0]}),
        ("ffff", None, {FULL: [0, 1, 2, 3]}),
        ("sssss", 4096, {SLIDING: [0, 1, 2, 3, 4]}),
        ("fs", 4096, {FULL: [0], SLIDING: [1]}),
        ("ssfssf", 4096, {FULL: [2, 5], SLIDING: [0, 1, 3, 4]}),
        ("ssssf", 4096, {FULL: [4], SLIDING: [0, 1, 2, 3]}),
        ("fffsffs", 4096, {FULL: [0, 1, 2, 4, 5], SLIDING: [3, 6]}),
        (None, None, {FULL: [0, 1, 2, 3]}),
        (None, 4096, {SLIDING: [0, 1, 2, 3]}),
    ],
    ids=[
        "one full layer",
        "full layers",
        "layers with windows",
        "one of each",
        "every third one full",
        "the last one full",
        "two with windows",
        "kinds not said, no window",
        "kinds not said, a window",
    ],
)
def test_layers_of_a_kind_share_an_allocator(
    layers: str | None, window: int | None, groups: dict[str, list[int]]
) -> None:
    cache = bare_cache(layers, window, count=4)
    assert {kind: list(pages.storages) for kind, pages in cache.cache_allocators.items()} == groups
    for kind, members in groups.items():
        assert all(cache.layer_to_allocator[layer] is cache.cache_allocators[kind] for layer in members)
        storages = cache.cache_allocators[kind].storages.values()
        starts = {storage.segments[0].k.data_ptr() for storage in storages}
        assert len(starts) == len(members), "each layer begins at a page of its own"


def test_what_fits_is_told_before_it_is_taken() -> None:
    """A full layer and two with windows share sectors; one of these holds two blocks of the first or one of the
    others. 96 tokens are six full blocks, and as many ring blocks as the window keeps."""
    cache = bare_cache("fss", 20, num_blocks=30)
    pages = cache.cache_allocators
    assert (pages[FULL].blocks_per_sector, pages[SLIDING].blocks_per_sector) == (2, 1)
    ring = pages[SLIDING].ring_pages
    needed = 3 + ring
    state = request("a")
    leave_free(cache, needed)
    assert cache.can_store_request_tokens(state, 96, dry_run=True)
    assert cache.pool.num_free_sectors == needed, "asking takes nothing"
    leave_free(cache, needed - 1)
    assert not cache.can_store_request_tokens(state, 96)
    assert cache.pool.num_free_sectors == needed - 1, "what does not fit takes nothing"
    leave_free(cache, 0)
    assert cache.can_store_request_tokens(state, 0, dry_run=True), "no new tokens always fit"
    leave_free(cache, needed)
    assert cache.can_store_request_tokens(state, 96)
    assert cache.pool.num_free_sectors == 0
    assert [len(pages[kind].block_table["a"]) for kind in (FULL, SLIDING)] == [6, ring]
    # From here on only the full layer grows.
    state.position_offset = 96
    assert not cache.can_store_request_tokens(state, 1, dry_run=True)
    leave_free(cache, 1)
    assert cache.can_store_request_tokens(state, 32, dry_run=True)
    assert not cache.can_store_request_tokens(state, 33, dry_run=True)


def leave_free(cache: Any, sectors: int) -> None:
    """Let the pool have so many free sectors, whatever requests hold; the others are in nobody's hands."""
    reserved = cache.pool.num_reserved_sectors
    cache.pool.free_sectors = list(range(reserved, reserved + cache.num_sectors))[::-1][:sectors]


def test_requests_that_fit_are_counted_with_what_the_ones_before_leave() -> None:
    """A sector of this cache holds two full blocks: what one request leaves of it, the next one takes."""
    cache = bare_cache("fss", 20, num_blocks=30)
    needs = [{FULL: full, SLIDING: 0} for full in (1, 1, 1, 1, 1)]
    leave_free(cache, 2)
    assert cache.count_storable_requests(needs[:4]) == 4
    assert cache.count_storable_requests(needs) == 4
    assert cache.count_storable_requests([{FULL: 3, SLIDING: 0}] * 2) == 1
    cache.pool.allocate_sector(cache.cache_allocators[FULL].index)
    assert cache.count_storable_requests([{FULL: 2, SLIDING: 0}] * 3) == 2
    assert cache.count_storable_requests([{FULL: 0, SLIDING: 1}, {FULL: 0, SLIDING: 1}]) == 1
    assert cache.pool.num_free_sectors == 1, "counting takes nothing"


def test_a_fork_shares_full_blocks_and_copies_the_rest() -> None:
    """40 tokens: two full blocks of 16 are shared, the begun one is copied. A window's ring is copied whole."""
    cache = bare_cache("ffs", 20, num_blocks=64)
    full, sliding = (cache.cache_allocators[kind] for kind in (FULL, SLIDING))
    state = request("parent", 40)
    assert cache.can_store_request_tokens(state, 40)
    store_numbers(cache, "parent", 0, 40)
    state.position_offset = 40
    assert full.count_non_shareable_blocks("parent", 40) == 1
    assert sliding.count_non_shareable_blocks("parent", 40) == 3
    full.use_block_sharing = False
    assert full.count_non_shareable_blocks("parent", 40) == 3
    full.use_block_sharing = True
    copies: dict[str, tuple[list[int], list[int]]] = {FULL: ([], []), SLIDING: ([], [])}
    assert cache.prepare_fork_request(state, ["child"], copies) == ["child"]
    assert [len(copies[kind][0]) for kind in (FULL, SLIDING)] == [1, 3]
    cache.perform_cache_copy(copies)
    for pages, shared in ((full, 2), (sliding, 0)):
        own, parent = pages.block_table["child"], pages.block_table["parent"]
        assert own[:shared] == parent[:shared]
        assert not set(own[shared:]) & set(parent)
        bytes_of = [pages._copy_view.index_select(0, torch.tensor(blocks)) for blocks in (parent, own)]
        assert torch.equal(*bytes_of)
        assert bytes_of[0].any(dim=1).all(), "every block holds something"
    shared = full.block_table["parent"][:2]
    assert full.ledger.shared_ref_counts == dict.fromkeys(shared, 2)
    assert sliding.ledger.shared_ref_counts == {}
    cache.free_blocks("parent")
    assert full.ledger.shared_ref_counts == {}
    assert full.block_table["child"][:2] == shared, "the child has them still"
    cache.free_blocks("child")
    cache.pool.try_to_free_sectors()
    assert cache.pool.num_free_sectors == cache.num_sectors


def test_a_fork_that_finds_no_room_is_left_to_begin_anew() -> None:
    cache = bare_cache("f", num_blocks=6, allow_block_sharing=False)
    state = request("parent", 20)
    assert cache.can_store_request_tokens(state, 20)
    state.position_offset = 20
    copies: dict[str, tuple[list[int], list[int]]] = {FULL: ([], [])}
    assert cache.prepare_fork_request(state, ["first", "second", "third"], copies) == ["first", "second"]
    assert set(cache.cache_allocators[FULL].block_table) == {"parent", "first", "second"}


class Prefixes:
    """A cache in which requests fill blocks, and what of them others find.

    Attributes:
        cache: of one full layer.
        pages: its allocator.
    """

    def __init__(self) -> None:
        self.cache = bare_cache("f", num_blocks=20)
        self.pages = self.cache.cache_allocators[FULL]

    def fill(self, name: str, tokens: list[int]) -> None:
        state = RequestState(name, tokens)
        assert self.cache.can_store_request_tokens(state, len(tokens))
        complete = self.cache.count_new_complete_blocks(state, len(tokens))
        state.position_offset = len(tokens)
        self.cache.mark_complete_blocks(state, complete)

    def table(self, name: str) -> list[int]:
        return list(self.pages.block_table[name])


def test_equal_content_is_one_block_which_others_find() -> None:
    """A request of 40 tokens fills two blocks of 16. Another one with the same tokens gives its own back; prompts that
    begin with them take them; the last token of a prompt is always computed."""
    prefixes = Prefixes()
    cache, ledger = prefixes.cache, prefixes.pages.ledger
    tokens = [i % 90 for i in range(100, 140)]
    prefixes.fill("source", tokens)
    full = prefixes.table("source")[:2]
    assert list(ledger.block_to_hash) == full
    free = free_blocks(cache, FULL)
    prefixes.fill("equal", tokens)
    assert prefixes.table("equal")[:2] == full
    assert ledger.shared_ref_counts == dict.fromkeys(full, 2)
    assert len(ledger.hash_to_block) == 2
    assert free_blocks(cache, FULL) == free - 1, "all it keeps for itself is the block that it has begun"
    cache.free_blocks("equal")
    assert free_blocks(cache, FULL) == free

    assert cache.search_prefix_match("same", [*tokens[:32], 1, 2, 3]) == 32
    assert cache.search_prefix_match("half", [*tokens[:20], 7, 7]) == 16
    assert cache.search_prefix_match("whole", tokens[:32]) == 16
    assert cache.search_prefix_match("other", [5, *tokens]) == 0
    assert prefixes.table("same") == full
    assert ledger.shared_ref_counts == {full[0]: 4, full[1]: 2}

    for name in ("source", "same", "half", "whole"):
        cache.free_blocks(name)
    assert set(ledger.cached_blocks) == set(full), "kept for their content, though no request has them"
    assert cache.search_prefix_match("later", [*tokens[:32], 9]) == 32
    assert not ledger.cached_blocks
    cache.free_blocks("later")
    assert cache.evict_cached_blocks()
    assert not ledger.hash_to_block
    assert cache.search_prefix_match("too late", [*tokens[:32], 9]) == 0
    cache.pool.try_to_free_sectors()
    assert cache.pool.num_free_sectors == cache.num_sectors


def test_blocks_given_back_for_room_are_not_kept_for_their_content() -> None:
    prefixes = Prefixes()
    prefixes.fill("source", list(range(40)))
    prefixes.cache.free_blocks("source", no_cache=True)
    assert not prefixes.pages.ledger.cached_blocks
    assert prefixes.cache.search_prefix_match("later", list(range(40))) == 0
    prefixes.cache.pool.try_to_free_sectors()
    assert prefixes.cache.pool.num_free_sectors == prefixes.cache.num_sectors
