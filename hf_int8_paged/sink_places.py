"""Which tokens of every sequence are kept in full precision: host bookkeeping that the layers of a cache share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


class SinkPlaces:
    """Places of the sink tokens of a batch; `kernels.FirstTokens` explains them. Never changes: every operation makes
    another one, so that forks may share it.

    Args:
        table: int32 ``[3, batch]``: row, first and stop of each sequence.
    """

    def __init__(self, table: np.ndarray):
        # Kernels take the address of each row: indexing columns answers with a column-major array.
        self._table = np.ascontiguousarray(table, dtype=np.int32)
        #: No sink token stands at this position or after it.
        self.limit = int(table[2].max(initial=0))
        #: The first position that is a sequence's first token.
        self.earliest = int(table[1].min()) if table.shape[1] else 0
        self._mirrors: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def of_prompt(cls, tokens: np.ndarray, count: int) -> SinkPlaces:
        """The first ``count`` tokens of a prompt, behind left padding.

        Args:
            tokens: bool ``[batch, length]``, False for padding.
        """
        batch, length = tokens.shape
        first = tokens.argmax(axis=1)
        table = np.stack((np.arange(batch), first, np.minimum(first + count, length)))
        return cls(table)

    @property
    def first(self) -> np.ndarray:
        """Position of each sequence's first token, ``[batch]``."""
        return self._table[1]

    def select(self, rows: Sequence[int]) -> SinkPlaces:
        """Sequence i becomes what sequence ``rows[i]`` was. The keys and values stay where they are."""
        return SinkPlaces(self._table[:, list(rows)])

    def truncate(self, length: int) -> SinkPlaces:
        """Forget those from position ``length`` on. Where that is all of them, padding ends there: what is written next
        are tokens."""
        return SinkPlaces(np.stack((self._table[0], *np.minimum(self._table[1:], length))))

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row, first and stop, int32 ``[batch]`` each, on a device; copied there once, without waiting for it."""
        if device not in self._mirrors:
            row, first, stop = torch.from_numpy(self._table).to(device, non_blocking=True)
            self._mirrors[device] = (row, first, stop)
        return self._mirrors[device]


def first_rows(x: torch.Tensor, first: torch.Tensor | None, count: int) -> torch.Tensor:
    """A copy of the ``count`` rows from ``first`` on, contiguous and without gradient. Past the last it repeats that.

    Args:
        x: ``[batch, heads, tokens, dim]``; the result is ``[batch, heads, count, dim]``.
        first: int32 ``[batch]``, or ``None`` for 0.
    """
    x = x.detach()
    if first is None:
        return x[:, :, :count].clone(memory_format=torch.contiguous_format)
    rows = (first.long()[:, None] + torch.arange(count, device=x.device)).clamp(max=x.shape[2] - 1)
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
