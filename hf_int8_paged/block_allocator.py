"""Which blocks of a layer group are free, and how many tables hold each: integers only."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

#: Blocks that a sequence's tokens should find next to each other. A decode then streams through memory instead of
#: jumping between blocks of different sequences.
RUN_LENGTH = 8
#: Table entry of a logical block that holds nothing any more, or never did.
HOLE = -1
#: Numbers of the counts' own types: adding another type's to some entries takes numpy ten times as long.
_ONE_HOLDER, _ONE_BLOCK = np.int32(1), np.int8(1)


class BlockAllocator:
    """Free list and reference counts of the blocks of one layer group.

    Blocks are handed out in ascending runs where possible: a sequence gets the block after its last one if that is
    free, else the start of a run of ``RUN_LENGTH`` free blocks, else any free block.

    All of it is kept in arrays, and blocks are taken and given back many at a time: no Python runs for each of them.
    An exception inside one of the methods may leave wrong counts behind; `count_anew` makes them right again.

    Args:
        num_blocks: blocks that there are from the start.
        settle: called before somebody is told how many blocks are free or used; brings the counts up to date.
    """

    def __init__(self, num_blocks: int = 0, settle: Callable[[], None] | None = None):
        self._settle = settle
        self.forget_blocks()
        self.grow(num_blocks)

    def forget_blocks(self) -> None:
        """Have no blocks; none may be held."""
        self._ref_counts = np.zeros(0, dtype=np.int32)
        #: Of each run, the blocks that are held, and those that there are: fewer in the last one.
        self._used_in_run = np.zeros(0, dtype=np.int8)
        self._run_sizes = np.zeros(0, dtype=np.int8)
        self._num_free = 0

    @property
    def num_blocks(self) -> int:
        return len(self._ref_counts)

    @property
    def end(self) -> int:
        """One more than the last block that a table holds; 0 if none is held."""
        (held,) = self._ref_counts.nonzero()
        return int(held[-1]) + 1 if len(held) else 0

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
        return int(self._ref_counts[block])

    def to_be_copied(self, blocks: np.ndarray) -> np.ndarray:
        """Which of the holders of ``blocks`` need a copy before they write. To be asked by who changes the tables.

        Args:
            blocks: one for each holder, ``[holders]``; ``HOLE`` for none.

        Returns:
            Indices of holders, ascending. All that share a block need a copy, but for the last one of a block that
            nobody else holds.
        """
        counts = self._ref_counts.take(blocks)  # of a hole, those of the last block
        (holders,) = (counts > 1).nonzero()
        if len(holders):
            holders = holders[blocks[holders] != HOLE]
        if not len(holders):
            return holders
        by_block = holders[blocks[holders].argsort(kind="stable")]
        (begins,) = _begins(blocks[by_block]).nonzero()
        ends = np.append(begins[1:], len(by_block))
        alone = ends - begins == counts[by_block[begins]]
        copying = counts > 1
        copying[by_block[ends[alone] - 1]] = False
        return holders[copying[holders]]

    def grow(self, num_blocks: int) -> None:
        """Raise the number of blocks to ``num_blocks``; the new ones are free."""
        added = num_blocks - self.num_blocks
        if added <= 0:
            return
        runs = -(-num_blocks // RUN_LENGTH)
        sizes = np.full(runs, RUN_LENGTH, dtype=np.int8)
        sizes[-1] = num_blocks - (runs - 1) * RUN_LENGTH
        used = np.zeros(runs, dtype=np.int8)
        used[: len(self._used_in_run)] = self._used_in_run
        counts = np.zeros(num_blocks, dtype=np.int32)
        counts[: self.num_blocks] = self._ref_counts
        self._ref_counts, self._used_in_run, self._run_sizes = counts, used, sizes
        self._num_free += added

    def shrink(self, num_blocks: int) -> None:
        """Lower the number of blocks to ``num_blocks``, which `end` is the least of."""
        taken = self.num_blocks - num_blocks
        if taken <= 0:
            return
        counts, runs = self._ref_counts[:num_blocks].copy(), -(-num_blocks // RUN_LENGTH)
        used, sizes = self._used_in_run[:runs].copy(), self._run_sizes[:runs].copy()
        if runs:
            sizes[-1] = num_blocks - (runs - 1) * RUN_LENGTH
        self._ref_counts, self._used_in_run, self._run_sizes = counts, used, sizes
        self._num_free -= taken

    def allocate(self, count: int, after: int = HOLE) -> np.ndarray:
        """Take ``count`` free blocks, each with one reference, continuing after block ``after`` if possible.

        Raises:
            ValueError: fewer than ``count`` blocks are free. Nothing is taken then.
        """
        self._check_free(count)
        if count == 1:
            block = self._next_block(after)
            self._ref_counts[block] = 1
            self._used_in_run[block // RUN_LENGTH] += 1
            self._num_free -= 1
            return np.array([block])
        taken, found = np.empty(count, dtype=np.intp), 0
        while found < count:
            first = self._next_block(after)
            stop = self._end_of_stretch(first, count - found)
            taken[found : found + stop - first] = np.arange(first, stop)
            self._take(np.arange(first, stop))
            found, after = found + stop - first, stop - 1
        return taken

    def allocate_each(self, after: np.ndarray) -> np.ndarray:
        """Take a free block for each of several sequences, with one reference. Those that can continue do, and the
        others begin new runs, in their order.

        Args:
            after: the last block of each sequence, or ``HOLE``, ``[sequences]``.

        Raises:
            ValueError: there are not as many free blocks. Nothing is taken then.
        """
        self._check_free(len(after))
        if len(after) == 1:
            return self.allocate(1, int(after[0]))
        taken = after.astype(np.intp) + 1
        may = (after != HOLE) & (taken < self.num_blocks)
        taken[~may] = 0
        # The middle of a run is this sequence's own; a new run only if no other sequence is in it.
        may &= self._ref_counts[taken] == 0
        may &= (taken % RUN_LENGTH != 0) | (self._used_in_run[taken // RUN_LENGTH] == 0)
        (rows,) = may.nonzero()
        if len(rows):
            # Of sequences with the same last block, only the first can continue.
            rows = rows[taken[rows].argsort(kind="stable")]
            rows = rows[_begins(taken[rows])]
            self._take(taken[rows])
        others = np.ones(len(taken), dtype=bool)
        others[rows] = False
        (others,) = others.nonzero()
        if len(others):
            begins = (self._used_in_run == 0).nonzero()[0][: len(others)] * RUN_LENGTH
            self._take(begins)
            rest = others[len(begins) :]
            taken[others[: len(begins)]] = begins
            if len(rest):
                taken[rest] = free = (self._ref_counts == 0).nonzero()[0][: len(rest)]
                self._take(free)
        return taken

    def retain(self, blocks: npt.ArrayLike) -> None:
        """Add a reference to each block; to one that comes more than once, as many."""
        blocks = np.asarray(blocks, dtype=np.intp)
        assert self._ref_counts[blocks].all(), "a block is free and cannot be shared"
        np.add.at(self._ref_counts, blocks, _ONE_HOLDER)

    def release(self, blocks: npt.ArrayLike) -> None:
        """Drop a reference to each block; those without any are free again."""
        blocks = np.asarray(blocks, dtype=np.intp)
        np.subtract.at(self._ref_counts, blocks, _ONE_HOLDER)
        free = blocks[self._ref_counts[blocks] <= 0]
        if len(free):
            free.sort()
            free = free[_begins(free)]
            assert not self._ref_counts[free].any(), "a block is free already"
            np.subtract.at(self._used_in_run, free // RUN_LENGTH, _ONE_BLOCK)
            self._num_free += len(free)

    def count_anew(self, held: Iterable[np.ndarray]) -> None:
        """Forget what was counted.

        Args:
            held: blocks, one array for each table; a block has as many references as it is found in them.
        """
        counts = np.zeros(self.num_blocks, dtype=np.int32)
        for blocks in held:
            counts += np.bincount(blocks, minlength=self.num_blocks).astype(np.int32)
        used = np.flatnonzero(counts)
        used_in_run = np.bincount(used // RUN_LENGTH, minlength=len(self._run_sizes)).astype(np.int8)
        self._ref_counts, self._used_in_run = counts, used_in_run
        self._num_free = len(counts) - len(used)

    def _check_free(self, count: int) -> None:
        if count > self._num_free:
            raise ValueError(f"{count} blocks asked for, {self._num_free} are free")

    def _take(self, blocks: np.ndarray) -> None:
        """Note that these free blocks, each once, have one reference."""
        self._ref_counts[blocks] = 1
        np.add.at(self._used_in_run, blocks // RUN_LENGTH, _ONE_BLOCK)
        self._num_free -= len(blocks)

    def _next_block(self, after: int) -> int:
        """The free block that a sequence gets whose last one is ``after``."""
        block = after + 1
        if (
            0 < block < self.num_blocks
            and not self._ref_counts[block]
            and (block % RUN_LENGTH or not self._used_in_run[block // RUN_LENGTH])
        ):
            return block
        run = int((self._used_in_run == 0).argmax())
        if self._used_in_run[run]:  # no run is free as a whole
            run = int((self._used_in_run < self._run_sizes).argmax())
        first = run * RUN_LENGTH
        return first + int((self._ref_counts[first : first + RUN_LENGTH] == 0).argmax())

    def _end_of_stretch(self, first: int, most: int) -> int:
        """One past the last of at most so many blocks that `_next_block` would hand out one after the other, from this
        free one on."""
        stop = min(first + most, self.num_blocks)
        run_end = min((first // RUN_LENGTH + 1) * RUN_LENGTH, stop)
        (held,) = self._ref_counts[first:run_end].nonzero()
        if len(held):
            return first + int(held[0])
        next_run = -(-run_end // RUN_LENGTH)
        (others,) = self._used_in_run[next_run : -(-stop // RUN_LENGTH)].nonzero()
        return (next_run + int(others[0])) * RUN_LENGTH if len(others) else stop


def _begins(values: np.ndarray) -> np.ndarray:
    """Where in sorted values, at least one, another value begins than the one before."""
    begins = np.empty(len(values), dtype=bool)
    begins[0] = True
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    return begins
