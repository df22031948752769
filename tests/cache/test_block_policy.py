"""Which blocks are handed out when many are asked for at once: those that asking for them one by one gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hf_int8_paged.block_allocator import HOLE, RUN_LENGTH, BlockAllocator


class OneByOne:
    """The policy as it reads, over a set of free blocks."""

    def __init__(self, num_blocks: int, free: set[int]):
        self.num_blocks, self.free = num_blocks, free

    def continuation(self, after: int) -> int | None:
        block = after + 1
        mine = block % RUN_LENGTH or self.is_whole(block // RUN_LENGTH)
        return block if after != HOLE and block in self.free and mine else None

    def allocate(self, count: int, after: int = HOLE) -> list[int]:
        taken = []
        for _ in range(count):
            block = self.continuation(after)
            after = self.beginning() if block is None else block
            self.free.remove(after)
            taken.append(after)
        return taken

    def allocate_each(self, after: list[int]) -> list[int]:
        taken = []
        for last in after:
            taken.append(self.continuation(last))
            self.free.discard(HOLE if taken[-1] is None else taken[-1])
        return [self.allocate(1)[0] if block is None else block for block in taken]

    def beginning(self) -> int:
        """Of the lowest run that is free as a whole, or else the lowest free block."""
        whole = [run for run in range(-(-self.num_blocks // RUN_LENGTH)) if self.is_whole(run)]
        return whole[0] * RUN_LENGTH if whole else min(self.free)

    def is_whole(self, run: int) -> bool:
        first = run * RUN_LENGTH
        blocks = range(first, min(first + RUN_LENGTH, self.num_blocks))
        return bool(blocks) and self.free.issuperset(blocks)


def some_held(num_blocks: int, generator: np.random.Generator) -> tuple[BlockAllocator, OneByOne]:
    """An allocator some of whose blocks are held, mostly next to each other, and the same for the policy."""
    allocator = BlockAllocator(num_blocks)
    blocks = allocator.allocate(num_blocks)
    changes = generator.random(num_blocks) < generator.choice([0.05, 0.3])
    free = blocks[np.logical_xor.accumulate(changes)]
    allocator.release(free)
    return allocator, OneByOne(num_blocks, set(free.tolist()))


@pytest.mark.parametrize("num_blocks", [1, 7, 8, 9, 64, 203])
def test_many_blocks_are_those_that_one_by_one_would_be(num_blocks: int) -> None:
    generator = np.random.default_rng(num_blocks)
    for _ in range(100):
        allocator, policy = some_held(num_blocks, generator)
        while allocator.num_free:
            count = int(generator.integers(1, allocator.num_free + 1))
            after = int(generator.integers(HOLE, num_blocks))
            assert allocator.allocate(count, after).tolist() == policy.allocate(count, after)


@pytest.mark.parametrize("num_blocks", [1, 7, 8, 9, 64, 203])
def test_a_block_for_each_of_many_sequences_is_that_of_asking_in_turn(num_blocks: int) -> None:
    """First those that continue after their last block, then the others. Sequences may have the same last block."""
    generator = np.random.default_rng(num_blocks)
    for _ in range(100):
        allocator, policy = some_held(num_blocks, generator)
        held = [HOLE, *(block for block in range(num_blocks) if allocator.ref_count(block))]
        while allocator.num_free:
            after = generator.choice(held, int(generator.integers(1, allocator.num_free + 1)))
            assert allocator.allocate_each(after).tolist() == policy.allocate_each(after.tolist())
        assert allocator.num_used == num_blocks
        assert all(allocator.ref_count(block) == 1 for block in range(num_blocks))
        with pytest.raises(ValueError, match="2 blocks asked for, 0 are free"):
            allocator.allocate_each(np.array([HOLE, 0]))


@pytest.mark.parametrize("others", [0, 1, 2], ids=["by_these_alone", "once_more", "twice_more"])
def test_all_holders_copy_a_block_but_the_last_one_if_nobody_else_has_it(others: int) -> None:
    allocator = BlockAllocator(3)
    blocks = allocator.allocate(3)
    for holders in itertools.product([HOLE, *blocks.tolist()], repeat=4):
        rows = np.array(holders, dtype=np.int32)
        counted = [*blocks.tolist() * others, *rows[rows != HOLE].tolist()]
        allocator.count_anew([np.array(counted, dtype=np.int32)])
        left, expected = [allocator.ref_count(block) for block in range(3)], []
        for row, block in enumerate(holders):
            if block != HOLE and left[block] > 1:
                left[block] -= 1
                expected.append(row)
        assert allocator.to_be_copied(rows).tolist() == expected


def test_references_of_a_block_that_comes_more_than_once_are_counted_each() -> None:
    allocator = BlockAllocator(16)
    blocks = allocator.allocate(3)
    allocator.retain([1, 1, 2])
    assert [allocator.ref_count(block) for block in blocks] == [1, 3, 2]
    allocator.release([1, 1, 1, 0, 2])
    assert [allocator.ref_count(block) for block in blocks] == [0, 0, 1]
    assert allocator.num_free == 15
    assert allocator.allocate(1).tolist() == [8], "the first run is not free as a whole"


@pytest.mark.parametrize("blocks", [[5], [2, 2]], ids=["free", "held_once_and_twice_given_back"])
def test_what_is_not_held_cannot_be_given_back_or_shared(blocks: list[int]) -> None:
    allocator = BlockAllocator(16)
    allocator.allocate(3)
    with pytest.raises(AssertionError, match="is free"):
        allocator.release(blocks)
    with pytest.raises(AssertionError, match="cannot be shared"):
        BlockAllocator(16).retain(blocks)
