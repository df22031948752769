"""First tokens in full precision for a preallocated layer: places on the device, as the host does not know lengths."""

from __future__ import annotations

import torch

from .kernels import SinkTokens
from .sink_places import first_rows


class StaticSinks:
    """Preallocated keys and values of first tokens, and where they stand.

    Args:
        keys: ``[batch, num_kv_heads, tokens, head_dim]`` of the layer's first step; only shape, dtype and device count.
        values: ``[batch, num_kv_heads, tokens, v_head_dim]``.
        count: tokens per sequence.
        max_cache_len: no position is as large.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, count: int, max_cache_len: int):
        slots = (len(keys), keys.shape[1], count)
        self.rows = tuple(x.new_zeros(*slots, x.shape[3]) for x in (keys, values))
        #: int32 ``[3, batch]``: row, first and stop of `SinkTokens`.
        self.places = torch.zeros(3, len(keys), dtype=torch.int32, device=keys.device)
        self.places[0] = torch.arange(len(keys), device=keys.device)
        self.max_cache_len = max_cache_len

    def keep(self, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor | None, known: torch.Tensor) -> None:
        """Keep the first of a prompt's tokens.

        Args:
            keys: ``[batch, num_kv_heads, tokens, head_dim]``.
            values: ``[batch, num_kv_heads, tokens, v_head_dim]``.
            first: int32 ``[batch]`` position of each sequence's first token, or ``None`` for 0.
            known: bool scalar on the device: if False, nothing changes.
        """
        batch, tokens = len(keys), keys.shape[2]
        count = min(self.rows[0].shape[2], tokens)
        row = torch.arange(batch, dtype=torch.int32, device=keys.device)
        start = torch.zeros_like(row) if first is None else first
        places = torch.stack((row, start, (start + count).clamp(max=tokens)))
        self.places.copy_(torch.where(known, places, self.places))
        for held, new in zip(self.rows, (keys, values)):
            head = held[:, :, :count]
            head.copy_(torch.where(known, first_rows(new, first, count), head))

    def select(self, rows: torch.Tensor) -> None:
        """Sequence i becomes what sequence ``rows[i]`` was."""
        self.places.copy_(self.places[:, rows.to(self.places.device)])

    def truncate(self, length: int) -> None:
        """Forget those from position ``length`` on; see `SinkPlaces.truncate`."""
        self.places[1:].clamp_(max=length)

    def tokens(self) -> SinkTokens:
        keys, values = self.rows
        row, first, stop = self.places
        return SinkTokens(keys, values, row, first, stop, self.max_cache_len)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a compiled step reads, all at fixed addresses."""
        return *self.rows, self.places

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.rows)
