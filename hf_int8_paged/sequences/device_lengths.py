"""Lengths of a preallocated cache's sequences on one device, at addresses that never change.

All layers on the device read the same tensors, and the first of them in a step counts for all. So a step needs a few
operations on the device for its lengths, however many layers there are.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch

from ..kernels import Tokens


class Table(NamedTuple):
    """Block tables of layers whose sequences have equally many blocks, int32 ``[max_batch_size, columns]``.

    Attributes:
        blocks: where the tokens lie; never changes.
        writable: the same, or holes in a step that only the device counted and that did not fit.
    """

    blocks: torch.Tensor
    writable: torch.Tensor


class DeviceLengths:
    """Tokens of each sequence before and after the newest step; all sequences have the same.

    Args:
        device: where.
        max_batch_size: most sequences.
        max_cache_len: most tokens per sequence.
        block_size: tokens per block.
    """

    def __init__(self, device: torch.device, max_batch_size: int, max_cache_len: int, block_size: int):
        self.device = device
        self.max_cache_len = max_cache_len
        self.block_size = block_size
        #: int32 ``[max_batch_size]``: tokens before the newest step, and after it.
        self.before = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        self.after = torch.zeros_like(self.before)
        #: int32 ``[max_batch_size]``: where a step that the device counts begins to write, if only into holes.
        self.write_from = torch.zeros_like(self.before)
        #: Bool scalar: whether the newest step that only the device counted fitted.
        self.fits = torch.ones((), dtype=torch.bool, device=device)
        #: Whether the newest step is counted here, and whether by the host: it fits then, which nothing here says yet.
        self.counted = self.by_host = False
        self._tables: dict[int, Table] = {}
        self._made: dict[tuple[int, int | None, int], Tokens] = {}
        for tensor in (self.before, self.after, self.write_from, self.fits):
            torch._dynamo.mark_static_address(tensor)

    def table(self, blocks: int) -> Table:
        """The table of layers with so many blocks per sequence: sequence b owns blocks ``b * blocks`` and following. Of
        a window they are a ring: its table repeats them, so new tokens overwrite those that fell out."""
        if blocks not in self._tables:
            columns = -(-self.max_cache_len // self.block_size)
            ring = torch.arange(columns, dtype=torch.int32) % blocks
            first = torch.arange(len(self.after), dtype=torch.int32)[:, None] * blocks
            table = (first + ring).to(self.device)
            self._tables[blocks] = Table(table, table.clone())
            for tensor in self._tables[blocks]:
                torch._dynamo.mark_static_address(tensor)
        return self._tables[blocks]

    def tokens(self, batch: int, window: int | None, blocks: int) -> Tokens:
        """What kernels take of the first ``batch`` sequences, made once; its tensors are those at the fixed addresses.

        Args:
            batch: sequences.
            window: sliding window in tokens, or ``None``.
            blocks: of each sequence, which say the table.
        """
        key = batch, window, blocks
        if key not in self._made:
            table = self.table(blocks).blocks
            self._made[key] = Tokens(table[:batch], self.before[:batch], self.after[:batch], window)
        return self._made[key]

    def count(self, start: int, stop: int) -> None:
        """Know how far the newest step goes, which the host has counted."""
        self.before.fill_(start)
        self.after.fill_(stop)
        self.counted = self.by_host = True

    def count_on_device(self, new_tokens: int) -> None:
        """The same of a step of which the host knows only how many tokens come, and which may not fit. Where other
        layers have had the step already, and the host has counted it, it does."""
        if self.counted:
            if self.by_host:
                self.by_host = False
                self._note(torch.ones_like(self.fits))
            return
        fits = self.after[0] + new_tokens <= self.max_cache_len
        self.before.copy_(self.after)
        self.after.add_(torch.where(fits, new_tokens, 0))
        self._note(fits)
        self.counted, self.by_host = True, False

    def _note(self, fits: torch.Tensor) -> None:
        """What layers that write on the device read of a step that fits, or does not; bool scalar."""
        self.fits.copy_(fits)
        self.write_from.copy_(torch.where(fits, self.before, 0))
        for table in self._tables.values():
            table.writable.copy_(torch.where(fits, table.blocks, -1))

    def read(self) -> tuple[int, int]:
        """Tokens before and after the newest step. Waits for the device."""
        before, after = torch.stack((self.before[0], self.after[0])).tolist()
        return before if self.counted else after, after

    def go_back(self, start: int, stop: int) -> None:
        """Forget tokens: the newest step goes from ``start`` to ``stop`` now."""
        self.count(start, stop)
        self.fits.fill_(True)

    def __deepcopy__(self, memo: dict) -> DeviceLengths:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy({name: x for name, x in vars(self).items() if name != "_made"}, memo))
        twin._made = {}
        return twin
