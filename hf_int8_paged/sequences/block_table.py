"""Which block of a sequence holds which tokens: integers only. Nothing here touches keys or values.

Words: a *block* holds ``block_size`` consecutive tokens of one sequence; a *slot* is a token's place in it; a *block
table* maps the logical blocks of each sequence to physical ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..block_allocator import HOLE, BlockAllocator

NO_ROWS = np.empty(0, dtype=np.intp)
NO_COPIES = np.empty((0, 2), dtype=np.int32)


class BlockTable:
    """The blocks of every sequence of one cache, for one layer group.

    All sequences have the same number of tokens (padding counts). The ids of columns in use never change in place: an
    operation makes another array, so that copies of a table may share theirs and only one of them is changed.

    Attributes:
        length: tokens per sequence.
        ids: int32 ``[batch, columns]`` on the host: physical block of each logical one, or ``HOLE``.
        made: what others have made of this very table, by device; copies begin with nothing.
    """

    def __init__(self, allocator: BlockAllocator, block_size: int):
        self.allocator = allocator
        self.block_size = block_size
        self.length = 0
        self.made: dict[torch.device, Any] = {}
        self._store = np.full((0, 0), HOLE, dtype=np.int32)  # [batch, columns and room for more]
        self._columns = 0
        self._dropped_columns = 0
        #: Columns from the first to before the second never held anything: out of sight when their tokens came.
        self._skipped_columns = (0, 0)
        #: Another object after every change of the ids.
        self._version = object()
        self._mirrors: dict[torch.device, tuple[object, torch.Tensor]] = {}

    @property
    def ids(self) -> np.ndarray:
        return self._store[:, : self._columns]

    @property
    def batch_size(self) -> int:
        return len(self._store)

    @property
    def seen_columns(self) -> tuple[int, tuple[int, int]]:
        """Columns in front that were dropped, and those, from the first to before the second, that never held
        anything."""
        return self._dropped_columns, self._skipped_columns

    def held(self) -> np.ndarray:
        """The blocks that the sequences hold, each as often as they do."""
        return self.ids[self.ids != HOLE]

    def filled(self, ids: np.ndarray, length: int, seen_columns: tuple[int, tuple[int, int]]) -> BlockTable:
        """A table of these ids, in place of this one, which holds nothing. Its blocks are taken already, once for each
        entry.

        Args:
            ids: int32 ``[batch, columns]``.
            length: tokens per sequence.
            seen_columns: as the property of this name.
        """
        twin = BlockTable(self.allocator, self.block_size)
        twin._store, twin._columns, twin.length = np.ascontiguousarray(ids, dtype=np.int32), ids.shape[1], length
        twin._dropped_columns, twin._skipped_columns = seen_columns
        return twin

    def copy(self) -> BlockTable:
        """The same table, to be changed in place of this one. It holds the same blocks, not once more."""
        twin = BlockTable.__new__(BlockTable)  # what `copy.copy` does, in a fifth of the time
        vars(twin).update(vars(self))
        twin.made = {}
        return twin

    def blocks_needed(self, batch: int, new_tokens: int, keep_from: int = 0) -> int:
        """Blocks that `extend` would take at most, given the same arguments."""
        first, last = self._new_columns(new_tokens, keep_from)
        return max(last - first, 0) * batch + len(self._rows_to_copy())

    def extend(
        self, batch: int, new_tokens: int, keep_from: int = 0, same_as: Sequence[int] | None = None
    ) -> np.ndarray:
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
            Blocks whose contents have to be copied before anything is written, ``[copies, 2]``: source, destination.
        """
        store, skipped, version = self._store, self._skipped_columns, self._version
        if not self.batch_size:
            store = np.full((batch, 0), HOLE, dtype=np.int32)
        copies, rows = NO_COPIES, self._rows_to_copy()
        if len(rows):
            store, version = store.copy(), object()
            shared = store[rows, self._columns - 1]
            private = self.allocator.allocate_each(np.full(len(rows), HOLE, dtype=np.int32))
            self.allocator.release(shared)
            store[rows, self._columns - 1] = private
            copies = np.array((shared, private), dtype=np.int32).T
        before = self._columns
        first, last = self._new_columns(new_tokens, keep_from)
        if last > before:
            store, version = self._with_room(store, last), object()
            store[:, before:first] = HOLE
            if last > first:
                self._fill(store, first, last, same_as)
            if first > before:
                skipped = (before, first)
        length, columns = self.length + new_tokens, max(last, before)
        self._store, self._columns, self._skipped_columns, self._version = store, columns, skipped, version
        self.length = length
        return copies

    def select(self, rows: np.ndarray) -> None:
        """Make sequence i what sequence ``rows[i]`` is, sharing its blocks. Moves no tokens.

        The allocator is told of those blocks only that a sequence and its successor do not have in common.
        """
        store = self._store.take(rows, axis=0)
        new, old = store[:, : self._columns], self.ids
        if len(new) == len(old):
            changed = new != old
            new, old = new[changed], old[changed]
        self.allocator.retain(new[new != HOLE])
        self._store, self._version = store, object()
        self.allocator.release(old[old != HOLE])

    def fork(self) -> BlockTable:
        """A table of its own over the same blocks."""
        twin = self.copy()
        twin._store, twin._mirrors = self._store.copy(), {}
        self.allocator.retain(self.held())
        return twin

    def unshare(self) -> np.ndarray:
        """Give every sequence blocks of its own. Returns what `extend` does."""
        store, copies = self._store.copy(), []
        for row, column in zip(*(axis.tolist() for axis in self._entries_to_copy())):
            block = int(store[row, column])
            (private,) = self.allocator.allocate(1, int(store[row, column - 1]) if column else HOLE)
            self.allocator.release([block])
            store[row, column] = private
            copies.append((block, private))
        self._store, self._version = store, object()
        return np.array(copies, dtype=np.int32).reshape(-1, 2)

    def blocks_to_unshare(self) -> int:
        """Blocks that `unshare` would take."""
        return len(self._entries_to_copy()[0])

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
        columns = min(-(-length // self.block_size), self._columns)
        lost = self.ids[:, columns:]
        skipped = self._skipped_columns if self._skipped_columns[0] < columns else (0, 0)
        self.length, self._columns, self._skipped_columns = min(length, self.length), columns, skipped
        self._dropped_columns, self._version = min(self._dropped_columns, columns), object()
        self.allocator.release(lost[lost != HOLE])

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
        version, mirror = self._mirrors.get(device, (None, None))
        if version is not self._version or mirror is None:
            mirror = torch.from_numpy(self._store).to(device, non_blocking=True)
            self._mirrors[device] = (self._version, mirror)
        return mirror[:, : self._columns]

    def _new_columns(self, new_tokens: int, keep_from: int) -> tuple[int, int]:
        """Logical blocks, first and one past the last, that `extend` has to find blocks for."""
        last = -(-(self.length + new_tokens) // self.block_size)
        return min(max(self._columns, keep_from // self.block_size), last), last

    def _rows_to_copy(self) -> np.ndarray:
        """Sequences whose partly filled last block others hold too, so that they cannot write to it."""
        if not self.length % self.block_size:
            return NO_ROWS
        return self.allocator.to_be_copied(self._store[:, self._columns - 1])

    def _entries_to_copy(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the blocks that have to be copied for all sequences to have their own."""
        rows, columns = np.nonzero(self.ids != HOLE)
        shared = self.allocator.to_be_copied(self.ids[rows, columns]) if len(rows) else NO_ROWS
        return rows[shared], columns[shared]

    def _fill(self, store: np.ndarray, first: int, last: int, same_as: Sequence[int] | None) -> None:
        """Find blocks for these columns of a store; sequences that are the same share them."""
        after = store[:, self._columns - 1] if self._columns else np.full(len(store), HOLE, dtype=np.int32)
        rows = np.arange(len(store)) if same_as is None else np.unique(same_as)
        if last - first == 1:
            store[rows, first] = self.allocator.allocate_each(after[rows])
        else:
            for row in rows.tolist():
                store[row, first:last] = self.allocator.allocate(last - first, int(after[row]))
        if same_as is not None:
            copies = np.ones(len(store), dtype=bool)
            copies[rows] = False
            store[:, first:last] = store[np.asarray(same_as), first:last]
            self.allocator.retain(store[copies, first:last].ravel())

    def _with_room(self, store: np.ndarray, columns: int) -> np.ndarray:
        """A store with room for so many columns, whose columns in use are those of ``store``."""
        if columns <= store.shape[1]:
            return store
        larger = np.full((len(store), max(columns, 2 * store.shape[1], 16)), HOLE, dtype=np.int32)
        larger[:, : self._columns] = store[:, : self._columns]
        return larger

    def _make_holes(self, where: Any) -> None:
        store = self._store.copy()
        blocks = store[where].flatten()  # a copy
        store[where] = HOLE
        self._store, self._version = store, object()
        self.allocator.release(blocks[blocks != HOLE])
