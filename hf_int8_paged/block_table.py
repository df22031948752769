"""Which block holds which tokens: integers only. Nothing here touches keys or values.

Words: a *block* holds ``block_size`` consecutive tokens of one sequence; a *slot* is a token's place in it; a *block
table* maps the logical blocks of each sequence to physical ones.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import torch

#: Blocks that a sequence's tokens should find next to each other. A decode then streams through memory instead of
#: jumping between blocks of different sequences.
RUN_LENGTH = 8
#: Table entry of a logical block that holds nothing any more, or never did.
HOLE = -1


class _RunHeap:
    """Run numbers, lowest first, each once. What stopped being usable is thrown out when it surfaces."""

    def __init__(self) -> None:
        self._heap: list[int] = []
        self._members: set[int] = set()

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
    """

    def __init__(self, num_blocks: int = 0):
        self._ref_counts: list[int] = []
        self._free_in_run: list[int] = []
        self._whole_runs = _RunHeap()
        self._partial_runs = _RunHeap()
        self.num_free = 0
        self.grow(num_blocks)

    @property
    def num_blocks(self) -> int:
        return len(self._ref_counts)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def ref_count(self, block: int) -> int:
        """How many tables hold ``block``."""
        return self._ref_counts[block]

    def grow(self, num_blocks: int) -> None:
        """Raise the number of blocks to ``num_blocks``; the new ones are free."""
        for block in range(self.num_blocks, num_blocks):
            run = block // RUN_LENGTH
            self._ref_counts.append(0)
            if run == len(self._free_in_run):
                self._free_in_run.append(0)
            self._free_in_run[run] += 1
            self.num_free += 1
            if block % RUN_LENGTH == RUN_LENGTH - 1 or block == num_blocks - 1:
                self._file_run(run)

    def allocate(self, count: int, after: int = HOLE) -> list[int]:
        """Take ``count`` free blocks, each with one reference, continuing after block ``after`` if possible.

        Raises:
            ValueError: fewer than ``count`` blocks are free. Nothing is taken then.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} are free")
        taken = []
        for _ in range(count):
            after = self._next_block(after)
            self._ref_counts[after] = 1
            self._free_in_run[after // RUN_LENGTH] -= 1
            self._file_run(after // RUN_LENGTH)
            taken.append(after)
        self.num_free -= count
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
                self.num_free += 1
                self._free_in_run[block // RUN_LENGTH] += 1
                self._file_run(block // RUN_LENGTH)

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


class BlockTable:
    """The blocks of every sequence of one cache, for one layer group.

    All sequences have the same number of tokens (padding counts). ``ids`` is int32 ``[batch, columns]`` on the host,
    with ``HOLE`` where a logical block holds nothing.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int):
        self.allocator = allocator
        self.block_size = block_size
        self.rows: list[list[int]] = []
        self.length = 0
        self._dropped_columns = 0
        self._ids = np.full((0, 0), HOLE, dtype=np.int32)
        self._version = 0
        self._mirrors: dict[torch.device, tuple[int, torch.Tensor]] = {}

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    def blocks_needed(self, batch: int, new_tokens: int, keep_from: int = 0) -> int:
        """Blocks that `extend` would take, given the same arguments."""
        first, last = self._new_columns(new_tokens, keep_from)
        # The last sequence that holds a block need not copy it.
        shared = Counter(block for _, block in self._shared_last_blocks())
        copies = sum(min(held, self.allocator.ref_count(block) - 1) for block, held in shared.items())
        return max(last - first, 0) * batch + copies

    def extend(self, batch: int, new_tokens: int, keep_from: int = 0) -> list[tuple[int, int]]:
        """Make room for ``new_tokens`` more tokens in each of ``batch`` sequences.

        Blocks whose tokens all lie before position ``keep_from`` are left out as holes. A partly filled last block
        that others hold too is replaced by a private one.

        Returns:
            Pairs (source block, destination block) whose contents have to be copied before anything is written.
        """
        if not self.rows:
            self.rows = [[] for _ in range(batch)]
        copies = []
        for row, block in self._shared_last_blocks():
            (private,) = self.allocator.allocate(1)
            self.allocator.release([block])
            self._set(row, len(self.rows[row]) - 1, private)
            copies.append((block, private))
        first, last = self._new_columns(new_tokens, keep_from)
        for blocks in self.rows:
            blocks.extend([HOLE] * (min(first, last) - len(blocks)))
            if last > first:
                after = next((b for b in reversed(blocks) if b != HOLE), HOLE)
                new = self.allocator.allocate(last - first, after)
                blocks.extend(new)
        self.length += new_tokens
        self._refresh(first)
        return copies

    def drop_before(self, position: int) -> bool:
        """Give back the blocks whose tokens all lie before ``position``. Returns whether there were any."""
        columns = min(position // self.block_size, len(self.rows[0]) if self.rows else 0)
        if columns <= self._dropped_columns:
            return False
        for blocks in self.rows:
            old = blocks[self._dropped_columns : columns]
            self.allocator.release(b for b in old if b != HOLE)
            blocks[self._dropped_columns : columns] = [HOLE] * len(old)
        self._ids[:, self._dropped_columns : columns] = HOLE
        self._dropped_columns = columns
        self._version += 1
        return True

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on and give their blocks back."""
        columns = -(-length // self.block_size)
        for blocks in self.rows:
            self.allocator.release(b for b in blocks[columns:] if b != HOLE)
            del blocks[columns:]
        self.length = min(length, self.length)
        self._dropped_columns = min(self._dropped_columns, columns)
        self._ids[:, columns:] = HOLE
        self._version += 1

    def clear(self) -> None:
        """Give all blocks back and forget the sequences."""
        self.truncate(0)
        self.rows = []
        self._ids = np.full((0, 0), HOLE, dtype=np.int32)

    def ids_on(self, device: torch.device) -> torch.Tensor:
        """Block ids, int32 ``[batch, columns]``. On the host this is the table itself; another device gets a copy, made
        anew only after a change, and without waiting for the device."""
        columns = len(self.rows[0]) if self.rows else 0
        if device.type == "cpu":
            return torch.from_numpy(self._ids)[:, :columns]
        version, mirror = self._mirrors.get(device, (-1, None))
        if version != self._version or mirror is None:
            mirror = torch.from_numpy(self._ids).to(device, non_blocking=True)
            self._mirrors[device] = (self._version, mirror)
        return mirror[:, :columns]

    def _new_columns(self, new_tokens: int, keep_from: int) -> tuple[int, int]:
        """Logical blocks, first and one past the last, that `extend` has to find blocks for."""
        have = -(-self.length // self.block_size)
        return max(have, keep_from // self.block_size), -(-(self.length + new_tokens) // self.block_size)

    def _shared_last_blocks(self) -> Iterable[tuple[int, int]]:
        if self.length % self.block_size:
            for row, blocks in enumerate(self.rows):
                if blocks[-1] != HOLE and self.allocator.ref_count(blocks[-1]) > 1:
                    yield row, blocks[-1]

    def _set(self, row: int, column: int, block: int) -> None:
        self.rows[row][column] = block
        self._ids[row, column] = block
        self._version += 1

    def _refresh(self, first_column: int) -> None:
        """Bring the host tensor up to date from ``first_column`` on."""
        columns = len(self.rows[0])
        if self._ids.shape[0] != len(self.rows) or self._ids.shape[1] < columns:
            ids = np.full((len(self.rows), max(columns, 2 * self._ids.shape[1], 16)), HOLE, dtype=np.int32)
            ids[:, :columns] = self.rows
            self._ids = ids
            self._version += 1
        elif first_column < columns:
            self._ids[:, first_column:columns] = [blocks[first_column:] for blocks in self.rows]
            self._version += 1
