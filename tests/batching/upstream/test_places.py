"""Where tokens lie and which rows see them: what transformers tests of its masks, and of its indices of slots.

There are no masks and no indices here. What they are for is the same: a row sees the tokens of its own request, up to
itself, within the window; a token's place follows from the block table; a window's blocks are used again.
"""

from __future__ import annotations

import numpy as np
import pytest

from .blocks import FULL, SLIDING, bare_cache, request, seen_by_rows, store_numbers, written_slots


@pytest.mark.parametrize(
    ("parts", "window", "rows"),
    [
        ([("a", 0, 4)], None, ["1000", "1100", "1110", "1111"]),
        ([("a", 0, 4)], 2, ["1000", "1100", "0110", "0011"]),
        ([("a", 2, 3)], None, ["11100", "11110", "11111"]),
        ([("a", 2, 3)], 3, ["11100", "01110", "00111"]),
        ([("a", 0, 3), ("b", 0, 3)], None, ["100", "110", "111", "100", "110", "111"]),
        ([("a", 0, 3), ("b", 0, 3)], 2, ["100", "110", "011", "100", "110", "011"]),
    ],
    ids=[
        "a prompt",
        "a prompt in a window",
        "a second piece",
        "a second piece in a window",
        "two requests in one step",
        "two requests in a window",
    ],
)
def test_a_row_sees_its_own_request_up_to_itself(
    parts: list[tuple[str, int, int]], window: int | None, rows: list[str]
) -> None:
    cache = bare_cache("f" if window is None else "s", window)
    for name, past, new in parts:
        assert cache.can_store_request_tokens(request(name), past + new)
        if past:
            seen_by_rows(cache, [(name, 0, past)], 0)
    seen = seen_by_rows(cache, parts, 0)
    assert seen == [[i for i, letter in enumerate(row) if letter == "1"] for row in rows]


def test_all_layers_of_a_step_see_the_same() -> None:
    """A window's ring has another table before a step than after it; each layer takes the right one."""
    cache = bare_cache("fsfs", 20)
    assert cache.can_store_request_tokens(request("a"), 60)
    for layer in range(4):
        seen_by_rows(cache, [("a", 0, 40)], layer)
    for layer in range(4):
        first = 0 if layer % 2 == 0 else 21
        assert seen_by_rows(cache, [("a", 40, 20)], layer)[0] == list(range(first, 41))


@pytest.mark.parametrize(
    ("page", "table", "past", "new"),
    [
        (32, [0, 1, 2], 0, 16),
        (32, [0, 1, 2], 0, 64),
        (32, [0, 1, 2], 16, 16),
        (32, [0, 1, 2], 31, 2),
        (32, [0, 3, 6], 0, 64),
        (32, [2, 5, 8], 60, 10),
        (16, [0, 1, 2, 3], 14, 4),
        (64, [0, 1], 60, 10),
    ],
    ids=[
        "half a page",
        "two pages at once",
        "the rest of a page",
        "over the end of a page",
        "blocks that lie apart",
        "the end of the second of three blocks that lie apart",
        "over the end of a short page",
        "over the end of a long page",
    ],
)
def test_a_token_lies_where_its_block_table_says(page: int, table: list[int], past: int, new: int) -> None:
    """In both layers, and nowhere else; the first block that the engine gives out is the third sector's first."""
    cache = bare_cache("ff", page_size=page, num_blocks=16)
    pages = cache.cache_allocators[FULL]
    first = 2 * pages.blocks_per_sector
    pages.block_table["a"] = [first + block for block in table]
    if past:
        store_numbers(cache, "a", 0, past)
    store_numbers(cache, "a", past, new)
    runs = page // 16  # blocks of the kernels in a page
    expected = {}
    for token in range(past + new):
        block = table[token // page] * 2 * runs + token % page // 16
        expected[block, token % 16] = token + 1
    for layer in range(2):
        own = {place: number for place, number in written_slots(cache, layer).items() if place in expected}
        assert own == expected
    # The second layer's pages are the same memory, seen from one page on.
    everything = written_slots(cache, 0)
    assert len(everything) == 2 * len(expected)


WINDOWS = [
    (16, 8, 0, 3),
    (16, 8, 5, 1),
    (16, 8, 2, 4),
    (16, 8, 10, 1),
    (16, 8, 14, 3),
    (16, 20, 38, 2),
    (16, 8, 0, 50),
    (16, 1, 3, 1),
    (48, 32, 20, 4),
]


@pytest.mark.parametrize(
    ("page", "window", "past", "new"),
    WINDOWS,
    ids=[
        "a first prompt",
        "decoding within the window",
        "a piece within the window",
        "decoding past the window",
        "a piece past the window",
        "over the end of a block",
        "a prompt longer than the ring",
        "a window of one token",
        "a page longer than the window",
    ],
)
def test_a_window_keeps_its_tokens_and_reuses_its_blocks(page: int, window: int, past: int, new: int) -> None:
    """Blocks that lie in no order. The table of the kernels has a block for every token of the window, and holes where
    newer tokens have overwritten older ones."""
    cache = bare_cache("s", window, page_size=page, num_blocks=32)
    pages = cache.cache_allocators[SLIDING]
    first = 2 * pages.blocks_per_sector
    held = min(-(-(past + new) // page), pages.ring_pages)
    pages.block_table["a"] = [first + (5 * i + 3) % 16 for i in range(held)]
    if past:
        store_numbers(cache, "a", 0, past)
    store_numbers(cache, "a", past, new)
    total = past + new
    table = pages.tables(["a"], np.array([total]))[0].tolist()
    slots = written_slots(cache, 0)
    for token in range(max(0, total - window), total):
        assert slots[table[token // 16], token % 16] == token + 1
    ring = pages.ring_pages * (page // 16)
    blocks = -(-total // 16)
    assert [block < 0 for block in table] == [j < blocks - ring for j in range(blocks)]
    assert pages.needs_new_blocks("a", total, 1) == (1 if total % page == 0 and held < pages.ring_pages else 0)


@pytest.mark.parametrize(
    ("page", "window", "steps"),
    [
        (16, 8, [3] + [1] * 40),
        (16, 8, [8] + [1] * 40),
        (16, 8, [11] + [1] * 40),
        (16, 8, [3, 5, 4, 10, 2] + [1] * 20),
        (16, 8, [6, 16, 16, 16]),
        (16, 4, [1] * 60),
        (48, 32, [5] + [1] * 55),
    ],
    ids=[
        "a prompt shorter than the window",
        "a prompt as long as the window",
        "a prompt longer than the window",
        "pieces shorter and longer than the window",
        "pieces that touch as many blocks as a step can",
        "token by token from the first",
        "a page longer than the window",
    ],
)
def test_every_step_sees_the_newest_tokens_of_the_window(page: int, window: int, steps: list[int]) -> None:
    """Over more tokens than the ring has room for."""
    cache = bare_cache("s", window, page_size=page, num_blocks=32)
    state, past = request("a"), 0
    for new in steps:
        state.position_offset = past
        assert cache.can_store_request_tokens(state, new)
        for row, seen in enumerate(seen_by_rows(cache, [("a", past, new)], 0)):
            token = past + row
            assert seen == list(range(max(0, token - window + 1), token + 1))
        past += new
