"""Finding sequences with the same prompt, as beam search and ``num_return_sequences`` make them, to hold it once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Copies of a sequence in one batch come out of the same matrix products, but perhaps of other tiles. Their keys may
#: differ by this many units of rounding.
ROUNDING_UNITS = 4


def same_prompts(key_states: torch.Tensor) -> list[int] | None:
    """For each sequence the first of the neighbours before it that has the same keys.

    Args:
        key_states: ``[batch, num_kv_heads, tokens, head_dim]`` of the first layer. Compared on their device; the host
            waits for the answer, once per first prompt of more than one sequence.

    Returns:
        ``[batch]`` indices, or ``None`` if all sequences differ.
    """
    if len(key_states) == 1 or not key_states.shape[2]:
        return None
    first = list(range(len(key_states)))
    for row, same in enumerate(_all_close(key_states[1:], key_states[:-1]), start=1):
        if same:
            first[row] = first[row - 1]
    return first if len(set(first)) < len(first) else None


def is_same(states: torch.Tensor, same_as: Sequence[int]) -> bool:
    """Whether every sequence is what ``same_as`` says, in another layer's keys or values."""
    rows = [row for row, first in enumerate(same_as) if first != row]
    return all(_all_close(states[rows], states[[same_as[row] for row in rows]]))


def _all_close(a: torch.Tensor, b: torch.Tensor) -> list[bool]:
    tolerance = ROUNDING_UNITS * torch.finfo(a.dtype).eps * b.abs().amax(dim=-1)
    close = (a - b).abs().amax(dim=-1) <= tolerance  # [batch, num_kv_heads, tokens]
    return close.flatten(1).all(dim=1).tolist()
