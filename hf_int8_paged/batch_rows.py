"""Which sequences of a batch an index means, decided on the host before anything changes."""

from __future__ import annotations

from typing import Any

import torch


def selected_rows(indices: Any, batch: int) -> list[int]:
    """Rows that ``tensor[indices, ...]`` takes of ``batch`` rows, all of them at least 0.

    Args:
        indices: a tensor, an array, a list or a tuple of integers (negative ones count from the end) or booleans, or a
            slice.
        batch: rows that there are.

    Raises:
        IndexError: out of range, or of the wrong type or shape.
    """
    if isinstance(indices, torch.Tensor):
        indices = indices.detach().cpu()
    try:
        rows = torch.arange(batch)[indices, ...]
    except (IndexError, TypeError) as error:
        raise IndexError(f"cannot select the sequences {indices!r} of a cache that holds {batch}: {error}") from error
    if rows.ndim != 1:
        raise IndexError(
            f"cannot select the sequences {indices!r}: a list of them has one axis, and this has {rows.ndim}; "
            "for a single sequence give [i]"
        )
    return rows.tolist()


def reordered_rows(beam_idx: Any, batch: int) -> list[int]:
    """Rows that ``tensor.index_select(0, beam_idx)`` takes of ``batch`` rows.

    Args:
        beam_idx: integers from 0 to ``batch``: a tensor, an array, a list or a tuple.
        batch: rows that there are.

    Raises:
        IndexError: out of range, or of the wrong type or shape.
    """
    order = beam_idx if isinstance(beam_idx, torch.Tensor) else torch.as_tensor(beam_idx)
    if order.numel() == 0 and not isinstance(beam_idx, torch.Tensor):
        order = order.long()  # an empty list has no type of its own
    if order.dim() > 1 or order.dtype not in (torch.int32, torch.int64):
        raise IndexError(f"reorder_cache takes one list of the batch's rows, integers, got {beam_idx!r}")
    rows = order.tolist() if order.dim() else [int(order)]
    if rows and not 0 <= min(rows) <= max(rows) < batch:
        wrong = next(row for row in rows if not 0 <= row < batch)
        raise IndexError(f"reorder_cache: there is no row {wrong}; the cache holds {batch} sequences")
    return rows
