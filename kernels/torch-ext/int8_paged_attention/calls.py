"""The two records that a call carries beside queries and storage: which tokens are where, and how scores are made.

Both are made once and shared: `Tokens` by all layers of a step that have the same window, `Scoring` by all layers whose
options are equal. A new option of attention is a new field here; no signature between the public functions and the
kernels changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .notes import Notes

#: Most query rows per sequence that attention reads from the blocks, the rows' own tokens included.
MAX_DECODE_ROWS = 16


@dataclass(eq=False, frozen=True)
class Tokens:
    """Where the tokens of a batch of sequences lie, and which of them a query may see at all.

    The same for all layers that share a block table. Native kernels check the tensors once per object and keep their
    addresses, so the fields cannot be replaced. The values in the tensors may change, but not those of a ragged step,
    whose sequences are grouped once.

    Args:
        block_table: int32 ``[batch, max_blocks]`` physical block of each logical one, each row contiguous. A negative
            entry is a hole, which nobody reads or writes.
        context_lens_before: int32 ``[batch]``, contiguous: tokens of each sequence before the step.
        context_lens: int32 ``[batch]``, contiguous: tokens of each sequence after it, the step's own included.
        window: sliding window in tokens, a row's own position included, at least 1; ``None`` without one.
        kv_start: int32 ``[batch]``, contiguous: first position to read; ``None`` reads from 0.
        cu_seqlens_q: int32 ``[batch + 1]``: rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of packed queries, and
            of packed new keys and values, are those of sequence b. ``None``: all sequences have the same number of
            rows, in an axis of their own.
    """

    block_table: torch.Tensor
    context_lens_before: torch.Tensor
    context_lens: torch.Tensor
    window: int | None = None
    kv_start: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    notes: Notes = field(default_factory=Notes, init=False, repr=False)

    @classmethod
    def at(
        cls,
        block_table: torch.Tensor,
        lens: torch.Tensor,
        window: int | None = None,
        kv_start: torch.Tensor | None = None,
    ) -> Tokens:
        """Tokens for a call that reads one of the two lengths: append and attention with fresh keys the one before the
        step, attention from the blocks and gather the one after it. Strides may be any; what kernels cannot read is
        copied."""
        lens = lens.contiguous()
        kv_start = None if kv_start is None else kv_start.contiguous()
        return cls(rows_contiguous(block_table), lens, lens, window, kv_start)


class Scoring(NamedTuple):
    """How attention scores keys, and which of them a mask hides.

    Attributes:
        scale: factor on q.k, finite.
        softcap: bound on the scores, positive and finite, or ``None``.
        sink_logits: ``[num_q_heads]`` logits in the softmax's denominator, or ``None``.
        key_mask: bool ``[batch, columns]``, True where a key may be seen; columns outside of it count as False.
        key_mask_start: position of the mask's first column, any integer.
    """

    scale: float
    softcap: float | None = None
    sink_logits: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    key_mask_start: int = 0


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied unless the elements of a row lie one after the other. Rows of fewer than two elements do."""
    return x if x.stride()[-1] == 1 or x.shape[-1] < 2 else x.contiguous()
