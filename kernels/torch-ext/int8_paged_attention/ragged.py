"""A ragged step: sequences with query chunks of different lengths in one call, served by the kernels for equal ones.

Rows are packed, ``[total_rows, heads, dim]``. Sequences with equally many rows are put together on the host, and each
of these groups is one call of the backend: all sequences that decode one token are one call, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from .calls import MAX_DECODE_ROWS, Scoring, Tokens
from .first_tokens import FirstTokens
from .storage import KvCacheQuant


class Group(NamedTuple):
    """Sequences of a ragged step that have the same number of rows.

    Attributes:
        sequences: int64 ``[count]`` which of the batch they are.
        rows: int64 ``[count * q_len]`` places of their rows in the packed query.
        q_len: rows of each.
        sees_fresh: whether their own tokens are seen in full precision, if these are at hand.
        tokens: of these sequences alone.
    """

    sequences: torch.Tensor
    rows: torch.Tensor
    q_len: int
    sees_fresh: bool
    tokens: Tokens


def groups_of(tokens: Tokens) -> list[Group]:
    """The groups of a step, worked out once for all its layers. The host waits for lengths that are on a device."""
    groups = tokens.notes.get("ragged")
    if groups is None:
        groups = tokens.notes["ragged"] = _make_groups(tokens)
    return groups


def _make_groups(tokens: Tokens) -> list[Group]:
    assert tokens.cu_seqlens_q is not None
    device = tokens.block_table.device
    starts = tokens.cu_seqlens_q.tolist()
    kinds: dict[tuple[int, bool], list[int]] = {}
    for b, past in enumerate(tokens.context_lens_before.tolist()):
        q_len = starts[b + 1] - starts[b]
        if q_len:
            # As in the cache: long chunks and first prompts have their own tokens at hand, short steps read the blocks.
            sees_fresh = q_len > MAX_DECODE_ROWS or (q_len > 1 and past == 0)
            kinds.setdefault((q_len, sees_fresh), []).append(b)
    groups = []
    for (q_len, sees_fresh), members in kinds.items():
        sequences = torch.tensor(members, device=device)
        first = torch.tensor([starts[b] for b in members], device=device)
        rows = (first[:, None] + torch.arange(q_len, device=device)).flatten()
        own = replace(
            tokens,
            block_table=tokens.block_table[sequences],
            context_lens_before=tokens.context_lens_before[sequences],
            context_lens=tokens.context_lens[sequences],
            kv_start=None if tokens.kv_start is None else tokens.kv_start[sequences],
            cu_seqlens_q=None,
        )
        groups.append(Group(sequences, rows, q_len, sees_fresh, own))
    return groups


def append_ragged(
    append: Callable[..., None], k_new: torch.Tensor, v_new: torch.Tensor, storage: KvCacheQuant, tokens: Tokens
) -> None:
    """``Backend.append`` of packed rows, ``[total_rows, num_kv_heads, dim]``, by calls of ``append`` for rows that are
    not packed."""
    for group in groups_of(tokens):
        append(
            unpacked(k_new[group.rows], group.q_len), unpacked(v_new[group.rows], group.q_len), storage, group.tokens
        )


def attend_ragged(
    attend: Callable[..., None],
    out: torch.Tensor,
    q: torch.Tensor,
    storage: KvCacheQuant,
    tokens: Tokens,
    scoring: Scoring,
    fresh: tuple[torch.Tensor, torch.Tensor] | None,
    first_tokens: FirstTokens | None,
) -> None:
    """``Backend.attend`` of packed rows by calls of ``attend`` for rows that are not packed.

    Args:
        attend: of the backend that was called.
        out: ``[total_rows, num_q_heads, v_head_dim]``, written to.
        q: ``[total_rows, num_q_heads, head_dim]``.
        storage: the layer's.
        tokens: of the whole batch, with ``cu_seqlens_q``.
        scoring: of the whole batch.
        fresh: keys and values of the rows' own tokens, ``[total_rows, num_kv_heads, dim]``. Sequences with more than 16
            rows, and first prompts of more than one, see those of their own; ``None``: all read the blocks.
        first_tokens: of the whole batch.
    """
    for group in groups_of(tokens):
        sequences, rows = group.sequences, group.rows
        own_scoring = scoring
        if scoring.key_mask is not None:
            own_scoring = scoring._replace(key_mask=scoring.key_mask[sequences])
        if first_tokens is not None:
            own_first = replace(
                first_tokens,
                **{name: getattr(first_tokens, name)[sequences] for name in ("row", "first", "stop")},
            )
        own_fresh = None
        if fresh is not None and group.sees_fresh:
            own_fresh = (unpacked(fresh[0][rows], group.q_len), unpacked(fresh[1][rows], group.q_len))
        answer = out.new_empty(len(rows), *out.shape[1:])
        attend(
            unpacked(answer, group.q_len),
            unpacked(q[rows], group.q_len),
            storage,
            group.tokens,
            own_scoring,
            own_fresh,
            None if first_tokens is None else own_first,
        )
        out[rows] = answer


def unpacked(x: torch.Tensor, q_len: int) -> torch.Tensor:
    """Rows ``[count * q_len, heads, dim]`` as the kernels take them, ``[count, heads, q_len, dim]``: a view."""
    return x.unflatten(0, (-1, q_len)).transpose(1, 2)
