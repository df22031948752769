"""Which blocks of a layer group are free, and how many tables hold each: integers only."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

import numpy as np

#: Blocks that a sequence's tokens should find next to each other. A decode then streams through memory instead of
#: jumping between blocks of different sequences.
RUN_LENGTH = 8
#: Table entry of a logical block that holds nothing any more, or never did.
HOLE = -1


class _RunHeap:
    """Run numbers, lowest first, each once. What stopped being usable is thrown out when it surfaces."""

    def __init__(self, runs: Iterable[int] = ()) -> None:
        self._heap: list[int] = sorted(runs)
        self._members: set[int] = set(self._heap)

    def push(self, run: int) -> None:
        if run not in self._members:
            self._members.add(run)
            heapq.heappush(self._heap, run)

    def lowest(self, usable: Callable[[int], bool]) -> int | None:
        while self._heap and not usable(self._heap[0]):
            self._members.remove(heapq.heappop(self._heap))
        return self._heap[0] if self._heap else None


class BlockAllocator:
    """Free list and reference counts of the blocks of one layer group.

    Blocks are handed out in ascending runs where possible: a sequence gets the block after its last one if that is
    free, else the start of a run of ``RUN_LENGTH`` free blocks, else any free block.

    An exception inside one of its methods may leave wrong counts behind; `count_anew` makes them right again.

    Args:
        num_blocks: blocks that there are from the start.
        settle: called before somebody is told how many blocks are free or used; brings the counts up to date.
    """

    def __init__(self, num_blocks: int = 0, settle: Callable[[], None] | None = None):
        self._settle = settle
        self._ref_counts: list[int] = []
        self._free_in_run: list[int] = []
        self._whole_runs = _RunHeap()
        self._partial_runs = _RunHeap()
        self._num_free = 0
        self.grow(num_blocks)

    @property
    def num_blocks(self) -> int:
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        """Blocks that no table holds."""
        if self._settle is not None:
            self._settle()
        return self._num_free

    @property
    def num_used(self) -> int:
        """Blocks that a table holds."""
        return self.num_blocks - self.num_free

    def ref_count(self, block: int) -> int:
        """How many tables hold ``block``."""
        if self._settle is not None:
            self._settle()
        return self._ref_counts[block]

    def is_shared(self, block: int) -> bool:
        """Whether ``block`` is held more than once. To be asked by who changes the tables."""
        return self._ref_counts[block] > 1

    def grow(self, num_blocks: int) -> None:
        """Raise the number of blocks to ``num_blocks``; the new ones are free."""
        for block in range(self.num_blocks, num_blocks):
            run = block // RUN_LENGTH
            self._ref_counts.append(0)
            if run == len(self._free_in_run):
                self._free_in_run.append(0)
            self._free_in_run[run] += 1
            self._num_free += 1
            if block % RUN_LENGTH == RUN_LENGTH - 1 or block == num_blocks - 1:
                self._file_run(run)

    def allocate(self, count: int, after: int = HOLE) -> list[int]:
        """Take ``count`` free blocks, each with one reference, continuing after block ``after`` if possible.

        Raises:
            ValueError: fewer than ``count`` blocks are free. Nothing is taken then.
        """
        if count > self._num_free:
            raise ValueError(f"{count} blocks asked for, {self._num_free} are free")
        taken = []
        for _ in range(count):
            after = self._next_block(after)
            self._ref_counts[after] = 1
            self._free_in_run[after // RUN_LENGTH] -= 1
            self._file_run(after // RUN_LENGTH)
            taken.append(after)
        self._num_free -= count
        return taken

    def retain(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block."""
        for block in blocks:
            assert self._ref_counts[block] > 0, f"block {block} is free and cannot be shared"
            self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop a reference to each block; those without any are free again."""
        for block in blocks:
            assert self._ref_counts[block] > 0, f"block {block} is free already"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._num_free += 1
                self._free_in_run[block // RUN_LENGTH] += 1
                self._file_run(block // RUN_LENGTH)

    def count_anew(self, held: Iterable[np.ndarray]) -> None:
        """Forget what was counted.

        Args:
            held: blocks, one array for each table; a block has as many references as it is found in them.
        """
        counts = np.zeros(self.num_blocks, dtype=np.int64)
        for blocks in held:
            counts += np.bincount(blocks, minlength=self.num_blocks)
        is_free = counts == 0
        free_in_run = np.add.reduceat(is_free, range(0, len(counts), RUN_LENGTH)) if len(counts) else counts
        size = np.minimum(RUN_LENGTH, len(counts) - np.arange(len(free_in_run)) * RUN_LENGTH)
        whole = _RunHeap(np.flatnonzero(free_in_run == size).tolist())
        partial = _RunHeap(np.flatnonzero((free_in_run > 0) & (free_in_run < size)).tolist())
        self._whole_runs, self._partial_runs = whole, partial
        self._ref_counts, self._free_in_run = counts.tolist(), free_in_run.tolist()
        self._num_free = int(is_free.sum())

    def _next_block(self, after: int) -> int:
        block = after + 1
        is_free = 0 < block < self.num_blocks and self._ref_counts[block] == 0
        # The middle of a run is this sequence's own; a new run only if no other sequence is in it.
        if is_free and (block % RUN_LENGTH or self._is_whole(block // RUN_LENGTH)):
            return block
        run = self._whole_runs.lowest(self._is_whole)
        if run is None:
            run = self._partial_runs.lowest(self._has_free)
        assert run is not None, "no free block, although some were counted"
        first = run * RUN_LENGTH
        return next(b for b in range(first, first + self._run_size(run)) if self._ref_counts[b] == 0)

    def _run_size(self, run: int) -> int:
        return min(RUN_LENGTH, self.num_blocks - run * RUN_LENGTH)

    def _is_whole(self, run: int) -> bool:
        return self._free_in_run[run] == self._run_size(run)

    def _has_free(self, run: int) -> bool:
        return self._free_in_run[run] > 0

    def _file_run(self, run: int) -> None:
        if self._is_whole(run):
            self._whole_runs.push(run)
        elif self._has_free(run):
            self._partial_runs.push(run)
