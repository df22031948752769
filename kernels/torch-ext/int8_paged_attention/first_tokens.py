"""The first tokens of a sequence in full precision, beside the int8 blocks.

Attention rests on a sequence's first token so heavily (the "attention sink") that its rounding is in every score. A row
or a few per sequence cost next to nothing. They are kept as the model computed them: neither rotated nor centred.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .notes import Notes

#: Most first tokens per sequence.
MAX_FIRST_TOKENS = 16


@dataclass(eq=False, frozen=True)
class FirstTokens:
    """Keys and values of the first tokens of every sequence, which replace what the blocks hold of them.

    Position j of sequence b, ``first[b] <= j < stop[b]``, is ``k[row[b], :, j - first[b]]``. The blocks are read
    from ``stop[b]`` on. What lies before ``first[b]`` is padding, and nobody sees it; where ``stop[b] <= first[b]`` the
    sequence has no such tokens, and nobody sees what lies before ``stop[b]``. Kernels keep the tensors' addresses: the
    fields cannot be replaced.

    Args:
        k: ``[rows, num_kv_heads, count, head_dim]``, float32, float16 or bfloat16, contiguous.
        v: ``[rows, num_kv_heads, count, v_head_dim]``, same dtype.
        row: int32 ``[batch]`` which of the rows are the sequence's.
        first: int32 ``[batch]`` position of the sequence's first token.
        stop: int32 ``[batch]`` position after its last first token, at most ``first + count``.
        limit: no ``stop`` is larger. Known on the host.
    """

    k: torch.Tensor
    v: torch.Tensor
    row: torch.Tensor
    first: torch.Tensor
    stop: torch.Tensor
    limit: int
    notes: Notes = field(default_factory=Notes, init=False, repr=False)

    @property
    def num_tokens(self) -> int:
        return self.k.shape[2]

    def covers(self, positions: torch.Tensor) -> torch.Tensor:
        """Which of these positions, integers ``[tokens]``, are first tokens: bool ``[batch, tokens]``."""
        return (positions >= self.first[:, None]) & (positions < self.stop[:, None])

    def put_into(self, dense: torch.Tensor, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Put rows of first tokens in their places, in place.

        Args:
            dense: ``[batch, num_kv_heads, tokens, dim]`` of positions from ``start`` on, of any dtype.
            rows: ``[rows, num_kv_heads, count, dim]``: ``k``, ``v`` or something made of them.
            start: position of the first token in ``dense``.

        Returns:
            ``dense``.
        """
        head = dense[:, :, : max(self.limit - start, 0)]
        if head.numel():
            positions = torch.arange(start, start + head.shape[2], dtype=torch.int32, device=dense.device)
            index = (positions - self.first[:, None]).clamp(0, self.num_tokens - 1).long()[:, None, :, None]
            own = rows[self.row.long()].gather(2, index.expand(-1, rows.shape[1], -1, rows.shape[3]))
            head.copy_(torch.where(self.covers(positions)[:, None, :, None], own.to(dense.dtype), head))
        return dense

    def put_both(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the first tokens in their places in dense keys and values, in place, and return those; see `put_into`."""
        return self.put_into(keys, self.k, start), self.put_into(values, self.v, start)
