"""First tokens in full precision for a preallocated layer: places on the device, as the host does not know lengths."""

from __future__ import annotations

import torch

from .kernels import FirstTokens
from .sink_places import first_rows


class StaticSinks:
    """Preallocated keys and values of first tokens, and where they stand.

    Args:
        batch: most sequences.
        shape: heads, widths and device of the layer's keys and values.
        dtype: that holds both exactly.
        count: tokens per sequence.
        max_cache_len: no position is as large.
    """

    def __init__(
        self, batch: int, shape: tuple[int, int, int, torch.device], dtype: torch.dtype, count: int, max_cache_len: int
    ):
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
        first: torch.Tensor | None = None,
        known: torch.Tensor | None = None,
    ) -> None:
        """Keep the first of a prompt's tokens.

        Args:
            keys: ``[batch, num_kv_heads, tokens, head_dim]``.
            values: ``[batch, num_kv_heads, tokens, v_head_dim]``.
            first: int32 ``[batch]`` position of each sequence's first token, or ``None`` for 0.
            known: bool scalar on the device: if False, nothing changes. ``None`` counts as True.
        """
        batch, tokens = len(keys), keys.shape[2]
        count = min(self.rows[0].shape[2], tokens)
        row = torch.arange(batch, dtype=torch.int32, device=keys.device)
        start = torch.zeros_like(row) if first is None else first
        places = torch.stack((row, start, (start + count).clamp(max=tokens)))
        _put(self.places[:, :batch], places, known)
        for held, new in zip(self.rows, (keys, values), strict=True):
            _put(held[:batch, :, :count], first_rows(new, first, count).to(held.dtype), known)

    def select(self, rows: torch.Tensor) -> None:
        """Sequence i becomes what sequence ``rows[i]`` was."""
        self.places[:, : len(rows)] = self.places[:, rows]

    def truncate(self, length: int) -> None:
        """Forget those from position ``length`` on; see `SinkPlaces.truncate`."""
        self.places[1:].clamp_(max=length)

    def tokens(self, batch: int) -> FirstTokens:
        """Those of the first ``batch`` sequences."""
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
