"""Which block of a sequence holds which tokens: integers only. Nothing here touches keys or values.

Words: a *block* holds ``block_size`` consecutive tokens of one sequence; a *slot* is a token's place in it; a *block
table* maps the logical blocks of each sequence to physical ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .block_allocator import HOLE, BlockAllocator


class BlockTable:
    """The blocks of every sequence of one cache, for one layer group.

    All sequences have the same number of tokens (padding counts).

    Attributes:
        length: tokens per sequence.
        ids: int32 ``[batch, columns]`` on the host: physical block of each logical one, or ``HOLE``.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int):
        self.allocator = allocator
        self.block_size = block_size
        self.length = 0
        self._store = np.full((0, 0), HOLE, dtype=np.int32)  # [batch, columns and room for more]
        self._columns = 0
        self._dropped_columns = 0
        #: Columns from the first to before the second never held anything: out of sight when their tokens came.
        self._skipped_columns = (0, 0)
        self._version = 0
        self._mirrors: dict[torch.device, tuple[int, torch.Tensor]] = {}

    @property
    def ids(self) -> np.ndarray:
        return self._store[:, : self._columns]

    @property
    def batch_size(self) -> int:
        return len(self._store)

    def blocks_needed(self, batch: int, new_tokens: int, keep_from: int = 0) -> int:
        """Blocks that `extend` would take at most, given the same arguments."""
        first, last = self._new_columns(new_tokens, keep_from)
        # The last sequence that holds a block need not copy it.
        shared = Counter(block for _, block in self._shared_last_blocks())
        copies = sum(min(held, self.allocator.ref_count(block) - 1) for block, held in shared.items())
        return max(last - first, 0) * batch + copies

    def extend(
        self, batch: int, new_tokens: int, keep_from: int = 0, same_as: Sequence[int] | None = None
    ) -> list[tuple[int, int]]:
        """Make room for ``new_tokens`` more tokens in each of ``batch`` sequences.

        Blocks whose tokens all lie before position ``keep_from`` are left out as holes. A partly filled last block
        that others hold too is replaced by a private one.

        Args:
            batch: sequences.
            new_tokens: tokens per sequence.
            keep_from: first position that anyone will read.
            same_as: for each sequence the first one whose new tokens are the same; those share their new blocks.
                Default: every sequence is its own.

        Returns:
            Pairs (source block, destination block) whose contents have to be copied before anything is written.
        """
        if not self.batch_size:
            self._store = np.full((batch, 0), HOLE, dtype=np.int32)
        copies = []
        for row, block in self._shared_last_blocks():
            (private,) = self.allocator.allocate(1)
            self.allocator.release([block])
            self._store[row, self._columns - 1] = private
            self._version += 1
            copies.append((block, private))
        first, last = self._new_columns(new_tokens, keep_from)
        if last > self._columns:
            before = self._columns
            self._make_room(last)
            for row in range(batch):
                twin = row if same_as is None else same_as[row]
                if twin != row:
                    self._store[row, first:last] = self._store[twin, first:last]
                    self.allocator.retain(self._store[row, first:last].tolist())
                elif last > first:
                    held = self._store[row, :before]
                    after = int(held[-1]) if before and held[-1] != HOLE else HOLE
                    self._store[row, first:last] = self.allocator.allocate(last - first, after)
            if first > before:
                self._skipped_columns = (before, first)
            self._columns = last
            self._version += 1
        self.length += new_tokens
        return copies

    def select(self, rows: Sequence[int]) -> None:
        """Make sequence i what sequence ``rows[i]`` is, sharing its blocks. Moves no tokens.

        Time does not depend on blocks that a sequence and its successor have in common.
        """
        new = self.ids[list(rows)]
        if len(new) == self.batch_size:
            changed = new != self.ids
            gained, lost = new[changed], self.ids[changed]
        else:
            gained, lost = new.ravel(), self.ids.ravel()
        gained, lost = gained[gained != HOLE].tolist(), lost[lost != HOLE].tolist()
        self.allocator.retain(gained)
        self.allocator.release(lost)
        if len(new) != self.batch_size:
            self._store = np.full((len(new), self._store.shape[1]), HOLE, dtype=np.int32)
        self._store[:, : self._columns] = new
        self._version += 1

    def fork(self) -> BlockTable:
        """A table of its own over the same blocks."""
        twin = BlockTable(self.allocator, self.block_size)
        twin.length, twin._columns = self.length, self._columns
        twin._dropped_columns, twin._skipped_columns = self._dropped_columns, self._skipped_columns
        twin._store = self._store.copy()
        self.allocator.retain(self.ids[self.ids != HOLE].tolist())
        return twin

    def unshare(self) -> list[tuple[int, int]]:
        """Give every sequence blocks of its own. Returns pairs (source, destination) to copy."""
        copies = []
        for row, column in self._held():
            block = int(self._store[row, column])
            if self.allocator.ref_count(block) > 1:
                (private,) = self.allocator.allocate(1, int(self._store[row, column - 1]) if column else HOLE)
                self.allocator.release([block])
                self._store[row, column] = private
                copies.append((block, private))
        self._version += 1
        return copies

    def blocks_to_unshare(self) -> int:
        """Blocks that `unshare` would take."""
        shared = Counter(int(self._store[where]) for where in self._held())
        return sum(min(held, self.allocator.ref_count(block) - 1) for block, held in shared.items())

    def drop_before(self, position: int) -> bool:
        """Give back the blocks whose tokens all lie before ``position``. Returns whether there were any."""
        columns = min(position // self.block_size, self._columns)
        if columns <= self._dropped_columns:
            return False
        self._make_holes(np.s_[:, self._dropped_columns : columns])
        self._dropped_columns = columns
        return True

    def drop_unused(self, used: np.ndarray) -> bool:
        """Give back the full blocks none of whose tokens is used.

        Args:
            used: bool ``[batch, tokens]``, False for tokens that nobody will read (padding).

        Returns:
            Whether there were any.
        """
        columns = min(self.length, used.shape[1]) // self.block_size
        blocks = used[:, : columns * self.block_size].reshape(len(used), columns, self.block_size)
        empty = ~blocks.any(axis=2) & (self.ids[:, :columns] != HOLE)
        if not empty.any():
            return False
        self._make_holes((*np.nonzero(empty),))
        return True

    def truncate(self, length: int) -> None:
        """Forget the tokens from position ``length`` on and give their blocks back."""
        columns = -(-length // self.block_size)
        self._make_holes(np.s_[:, columns : self._columns])
        self.length = min(length, self.length)
        self._columns = min(columns, self._columns)
        self._dropped_columns = min(self._dropped_columns, self._columns)
        if self._skipped_columns[0] >= self._columns:
            self._skipped_columns = (0, 0)

    def first_held(self, length: int) -> int:
        """First position from which on all tokens before position ``length`` are held."""
        skipped_from, skipped_to = self._skipped_columns
        reaches = skipped_from * self.block_size < length
        return max(self._dropped_columns, skipped_to if reaches else 0) * self.block_size

    def clear(self) -> None:
        """Give all blocks back and forget the sequences."""
        self.truncate(0)
        self._store = np.full((0, 0), HOLE, dtype=np.int32)

    def ids_on(self, device: torch.device) -> torch.Tensor:
        """Block ids, int32 ``[batch, columns]``. On the host this is the table itself; another device gets a copy, made
        anew only after a change, and without waiting for the device."""
        if device.type == "cpu":
            return torch.from_numpy(self._store)[:, : self._columns]
        version, mirror = self._mirrors.get(device, (-1, None))
        if version != self._version or mirror is None:
            mirror = torch.from_numpy(self._store).to(device, non_blocking=True)
            self._mirrors[device] = (self._version, mirror)
        return mirror[:, : self._columns]

    def _new_columns(self, new_tokens: int, keep_from: int) -> tuple[int, int]:
        """Logical blocks, first and one past the last, that `extend` has to find blocks for."""
        last = -(-(self.length + new_tokens) // self.block_size)
        return min(max(self._columns, keep_from // self.block_size), last), last

    def _shared_last_blocks(self) -> Iterable[tuple[int, int]]:
        """(sequence, block) of partly filled last blocks that are held more than once."""
        if self.length % self.block_size:
            for row, block in enumerate(self.ids[:, -1].tolist()):
                if block != HOLE and self.allocator.ref_count(block) > 1:
                    yield row, block

    def _held(self) -> Iterable[tuple[int, int]]:
        """(sequence, column) of every table entry that holds a block."""
        return zip(*(axis.tolist() for axis in np.nonzero(self.ids != HOLE)))

    def _make_room(self, columns: int) -> None:
        if columns > self._store.shape[1]:
            store = np.full((self.batch_size, max(columns, 2 * self._store.shape[1], 16)), HOLE, dtype=np.int32)
            store[:, : self._columns] = self.ids
            self._store = store

    def _make_holes(self, where: Any) -> None:
        blocks = self._store[where].ravel()
        self.allocator.release(blocks[blocks != HOLE].tolist())
        self._store[where] = HOLE
        self._version += 1
