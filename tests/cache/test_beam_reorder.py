"""What reordering beams costs: not more for a long prompt than for a short one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from eval._workloads import beams_over_a_prompt, reorder, turns_of_beams
from hf_int8_paged.block_allocator import BlockAllocator
from tests.counting import operators, python_work


def test_reordering_beams_does_no_more_over_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytecodes for 8,192 tokens as for 1,024, no tensor touched, and as many blocks retained and released."""
    exchanged: list[int] = []

    def counting(original: Callable[[BlockAllocator, list[int]], None]) -> Callable[[BlockAllocator, list[int]], None]:
        def exchange(self: BlockAllocator, blocks: list[int]) -> None:
            exchanged.append(len(blocks))
            original(self, blocks)

        return exchange

    for name in ("retain", "release"):
        monkeypatch.setattr(BlockAllocator, name, counting(getattr(BlockAllocator, name)))
    found = []
    for tokens in (1024, 8192):
        reordered = functools.partial(reorder, beams_over_a_prompt(tokens), turns_of_beams())
        exchanged.clear()
        called = operators(reordered).called
        found.append((called, list(exchanged), python_work(reordered)))
    short, long = found
    assert long == short
    assert not long[0]
    # Each of 8 beams exchanges at most the blocks of its own 40 tokens, which may begin inside a block: 4.
    assert 0 < max(long[1]) <= 8 * 4
