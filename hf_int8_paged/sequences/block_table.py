"""Which block of a sequence holds which tokens: integers only. Nothing here touches keys or values.

Words: a *block* holds ``block_size`` consecutive tokens of one sequence; a *slot* is a token's place in it; a *block
table* maps the logical blocks of each sequence to physical ones.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from ..block_allocator import HOLE, BlockAllocator


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

    def held(self) -> np.ndarray:
        """The blocks that the sequences hold, each as often as they do."""
        return self.ids[self.ids != HOLE]

    def copy(self) -> BlockTable:
        """The same table, to be changed in place of this one. It holds the same blocks, not once more."""
        twin = copy.copy(self)
        twin.made = {}
        return twin

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
        store, skipped, version = self._store, self._skipped_columns, self._version
        if not self.batch_size:
            store = np.full((batch, 0), HOLE, dtype=np.int32)
        copies: list[tuple[int, int]] = []
        for row, block in self._shared_last_blocks():
            if not copies:
                store, version = store.copy(), object()
            (private,) = self.allocator.allocate(1)
            self.allocator.release([block])
            store[row, self._columns - 1] = private
            copies.append((block, private))
        before = self._columns
        first, last = self._new_columns(new_tokens, keep_from)
        if last > before:
            store, version = self._with_room(store, last), object()
            store[:, before:first] = HOLE
            for row in range(batch):
                twin = row if same_as is None else same_as[row]
                if twin != row:
                    store[row, first:last] = store[twin, first:last]
                    self.allocator.retain(store[row, first:last].tolist())
                elif last > first:
                    held = store[row, :before]
                    after = int(held[-1]) if before and held[-1] != HOLE else HOLE
                    store[row, first:last] = self.allocator.allocate(last - first, after)
            if first > before:
                skipped = (before, first)
        length, columns = self.length + new_tokens, max(last, before)
        self._store, self._columns, self._skipped_columns, self._version = store, columns, skipped, version
        self.length = length
        return copies

    def select(self, rows: Sequence[int]) -> None:
        """Make sequence i what sequence ``rows[i]`` is, sharing its blocks. Moves no tokens.

        The allocator is told of those blocks only that a sequence and its successor do not have in common.
        """
        new = self.ids[list(rows)]
        if len(new) == self.batch_size:
            changed = new != self.ids
            gained, lost = new[changed], self.ids[changed]
        else:
            gained, lost = new.ravel(), self.ids.ravel()
        gained, lost = gained[gained != HOLE].tolist(), lost[lost != HOLE].tolist()
        self.allocator.retain(gained)
        store = np.full((len(new), self._store.shape[1]), HOLE, dtype=np.int32)
        store[:, : self._columns] = new
        self._store, self._version = store, object()
        self.allocator.release(lost)

    def fork(self) -> BlockTable:
        """A table of its own over the same blocks."""
        twin = self.copy()
        twin._store, twin._mirrors = self._store.copy(), {}
        self.allocator.retain(self.held().tolist())
        return twin

    def unshare(self) -> list[tuple[int, int]]:
        """Give every sequence blocks of its own. Returns pairs (source, destination) to copy."""
        store, copies = self._store.copy(), []
        for row, column in self._held_entries():
            block = int(store[row, column])
            if self.allocator.is_shared(block):
                (private,) = self.allocator.allocate(1, int(store[row, column - 1]) if column else HOLE)
                self.allocator.release([block])
                store[row, column] = private
                copies.append((block, private))
        self._store, self._version = store, object()
        return copies

    def blocks_to_unshare(self) -> int:
        """Blocks that `unshare` would take."""
        shared = Counter(self.held().tolist())
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
        columns = min(-(-length // self.block_size), self._columns)
        lost = self.ids[:, columns:]
        skipped = self._skipped_columns if self._skipped_columns[0] < columns else (0, 0)
        self.length, self._columns, self._skipped_columns = min(length, self.length), columns, skipped
        self._dropped_columns, self._version = min(self._dropped_columns, columns), object()
        self.allocator.release(lost[lost != HOLE].tolist())

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

    def _shared_last_blocks(self) -> Iterable[tuple[int, int]]:
        """(sequence, block) of partly filled last blocks that are held more than once."""
        if self.length % self.block_size:
            for row, block in enumerate(self.ids[:, -1].tolist()):
                if block != HOLE and self.allocator.is_shared(block):
                    yield row, block

    def _held_entries(self) -> Iterable[tuple[int, int]]:
        """(sequence, column) of every table entry that holds a block."""
        return zip(*(axis.tolist() for axis in np.nonzero(self.ids != HOLE)))

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
        self.allocator.release(blocks[blocks != HOLE].tolist())
