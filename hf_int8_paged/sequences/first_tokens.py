"""Which tokens of every sequence are kept in full precision (`kernels.FirstTokens`), and those of one layer.

A cache that grows has one table of places for all layers, which never changes in place, and forks share a layer's rows.
A preallocated cache has both in each layer, at addresses that never change, as the host does not know lengths there.
"""

from __future__ import annotations

import numpy as np
import torch

from ..kernels import FirstTokens
from ..layer_checks import LayerShape, of_one_dtype


class FirstTokenPlaces:
    """Places of the first tokens of a batch. Never changes: every operation makes another one, so that forks may share
    it.

    Args:
        table: int32 ``[3, batch]``: row, first and stop of each sequence.
    """

    def __init__(self, table: np.ndarray):
        # Kernels take the address of each row: indexing columns answers with a column-major array.
        self.table = np.ascontiguousarray(table, dtype=np.int32)
        #: No first token stands at this position or after it.
        self.limit = int(table[2].max(initial=0))
        #: The first position that is a sequence's first token.
        self.earliest = int(table[1].min()) if table.shape[1] else 0
        self._mirrors: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def of_prompt(cls, tokens: np.ndarray, count: int) -> FirstTokenPlaces:
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
        return self.table[1]

    def select(self, rows: np.ndarray) -> FirstTokenPlaces:
        """Sequence i becomes what sequence ``rows[i]`` was. The keys and values stay where they are."""
        return FirstTokenPlaces(self.table.take(rows, axis=1))

    def truncate(self, length: int) -> FirstTokenPlaces:
        """Forget those from position ``length`` on. Where that is all of them, padding ends there: what is written next
        are tokens."""
        return FirstTokenPlaces(np.stack((self.table[0], *np.minimum(self.table[1:], length))))

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row, first and stop, int32 ``[batch]`` each, on a device; copied there once, without waiting for it."""
        if device not in self._mirrors:
            row, first, stop = torch.from_numpy(self.table).to(device, non_blocking=True)
            self._mirrors[device] = (row, first, stop)
        return self._mirrors[device]


class LayerFirstTokens:
    """Keys and values of one layer's first tokens in a cache that grows. Never written to: forks share them. Between
    two prompts, those of the first are still there until the second comes, or until the pool needs the memory.

    Args:
        places: of the prompt, which the cache's `SequenceState` has from then on.
        keys: of the prompt, ``[batch, num_kv_heads, tokens, head_dim]``.
        values: ``[batch, num_kv_heads, tokens, v_head_dim]``.
        count: tokens per sequence.
    """

    def __init__(self, places: FirstTokenPlaces, keys: torch.Tensor, values: torch.Tensor, count: int):
        first = places.on(keys.device)[1] if places.first.any() else None
        count = min(count, keys.shape[2])
        keys, values = of_one_dtype(keys, values)
        self.rows = _first_rows(keys, first, count), _first_rows(values, first, count)
        #: What `at` has made last, and of which places.
        self.made: tuple[FirstTokenPlaces | None, FirstTokens | None] = (None, None)

    @classmethod
    def of_rows(cls, keys: torch.Tensor, values: torch.Tensor) -> LayerFirstTokens:
        """Of the rows themselves, ``[rows, num_kv_heads, count, dim]`` of one dtype, contiguous."""
        kept = cls.__new__(cls)
        kept.rows, kept.made = (keys, values), (None, None)
        return kept

    def at(self, places: FirstTokenPlaces) -> FirstTokens:
        """What kernels take."""
        keys, values = self.rows
        made = FirstTokens(keys, values, *places.on(keys.device), places.limit)
        self.made = places, made
        return made

    def forget(self) -> None:
        """Hold nothing any more; no cache that knows of these has tokens."""
        keys, values = self.rows
        self.rows, self.made = (keys.new_empty(0), values.new_empty(0)), (None, None)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.rows)


class FixedFirstTokens:
    """Preallocated keys and values of one layer's first tokens, and where they stand.

    Args:
        batch: most sequences.
        shape: heads, widths and device of the layer's keys and values.
        dtype: that holds both exactly.
        count: tokens per sequence.
        max_cache_len: no position is as large.
    """

    def __init__(self, batch: int, shape: LayerShape, dtype: torch.dtype, count: int, max_cache_len: int):
        heads, *dims, device = shape
        self.rows = tuple(torch.zeros(batch, heads, count, dim, dtype=dtype, device=device) for dim in dims)
        #: int32 ``[3, batch]``: row, first and stop of `FirstTokens`.
        self.places = torch.zeros(3, batch, dtype=torch.int32, device=device)
        self.places[0] = torch.arange(batch, device=device)
        self.max_cache_len = max_cache_len

    def keep(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        is_token: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
    ) -> None:
        """Keep the first of a prompt's tokens.

        Args:
            keys: ``[batch, num_kv_heads, tokens, head_dim]``.
            values: ``[batch, num_kv_heads, tokens, v_head_dim]``.
            is_token: bool ``[batch, tokens]``, False for padding; ``None`` without.
            known: bool scalar on the device: if False, nothing changes. ``None`` counts as True.
        """
        batch, tokens = len(keys), keys.shape[2]
        count = min(self.rows[0].shape[2], tokens)
        row = torch.arange(batch, dtype=torch.int32, device=keys.device)
        first = None if is_token is None else is_token.int().argmax(dim=1).to(row)
        start = torch.zeros_like(row) if first is None else first
        places = torch.stack((row, start, (start + count).clamp(max=tokens)))
        _put(self.places[:, :batch], places, known)
        for held, new in zip(self.rows, (keys, values), strict=True):
            _put(held[:batch, :, :count], _first_rows(new, first, count).to(held.dtype), known)

    def select(self, rows: torch.Tensor) -> None:
        """Sequence i becomes what sequence ``rows[i]`` was."""
        self.places[:, : len(rows)] = self.places[:, rows]

    def truncate(self, length: int) -> None:
        """Forget those from position ``length`` on; see `FirstTokenPlaces.truncate`."""
        self.places[1:].clamp_(max=length)

    def of(self, batch: int) -> FirstTokens:
        """What kernels take, of the first ``batch`` sequences."""
        keys, values = self.rows
        row, first, stop = self.places[:, :batch]
        return FirstTokens(keys, values, row, first, stop, self.max_cache_len)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a compiled step reads, all at fixed addresses."""
        return *self.rows, self.places

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.rows)


def _put(target: torch.Tensor, new: torch.Tensor, known: torch.Tensor | None) -> None:
    target.copy_(new if known is None else torch.where(known, new, target))


def _first_rows(x: torch.Tensor, first: torch.Tensor | None, count: int) -> torch.Tensor:
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
