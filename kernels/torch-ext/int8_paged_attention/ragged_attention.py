"""Ragged attention, the public function: sequences with query chunks of different lengths in one call."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from .backends import backend_of
from .calls import MAX_DECODE_ROWS, Scoring, Tokens
from .checks import check_tensor
from .decode_attention import check_table, checked_out, checked_records, query_dtypes
from .first_tokens import FirstTokens
from .storage import KvCacheQuant


def int8_paged_ragged_attention(
    q: torch.Tensor,
    storage: KvCacheQuant,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    scale: float,
    *,
    k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    key_mask_start: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    first_tokens: FirstTokens | None = None,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """``int8_paged_decode_attention`` of sequences that have different numbers of query rows, packed one after another.

    Rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` are the last tokens of sequence b, at positions up to
    ``context_lens[b] - 1``. They see what that function lists. Sequences with equally many rows are one call of the
    kernels.

    With ``k_new`` and ``v_new`` the own tokens of a chunk of more than 16 rows, and of a first prompt of more than one,
    are seen in full precision, as given; all other tokens are read from the blocks.

    Args:
        q: ``[total_rows, num_q_heads, head_dim]``, float32, float16 or bfloat16.
        storage: the layer's storage. Tokens that are read from the blocks have been appended.
        block_table: int32 ``[batch, max_blocks]``.
        context_lens: int32 ``[batch]``, the rows' own tokens included.
        cu_seqlens_q: int32 ``[batch + 1]``, from 0 to ``total_rows``, ascending; a sequence may have no row. The host
            reads it and ``context_lens``, which waits for a device.
        scale: factor on q.k.
        k_new: ``[total_rows, num_kv_heads, head_dim]`` keys of the rows' own tokens, of q's dtype.
        v_new: ``[total_rows, num_kv_heads, v_head_dim]``, likewise.
        kv_start, key_mask, key_mask_start, window, softcap, sink_logits, first_tokens, backend: as in
            ``int8_paged_decode_attention``.
        out: ``[total_rows, num_q_heads, v_head_dim]`` of q's dtype to write to.

    Returns:
        ``out``.

    Raises:
        ValueError: wrong shape, dtype or device, a number out of its range, or a chunk of more than 16 rows without
            ``k_new`` and ``v_new``.
        TypeError: no tensor, or no integer.

    tests/kernels/test_ragged.py shows its use.
    """
    serving = backend_of(storage, backend)
    dtypes, device = query_dtypes(serving), storage.device
    check_table(block_table, storage)
    check_tensor(q, "q", shape=(None, None, storage.head_dim), dtypes=dtypes, device=device)
    rows, num_q_heads, _ = q.shape
    tokens, scoring = checked_records(
        Tokens(block_table, context_lens, context_lens, window, kv_start),
        Scoring(scale, softcap, sink_logits, key_mask, key_mask_start),
        first_tokens,
        storage,
        num_q_heads,
        dtypes,
    )
    check_tensor(cu_seqlens_q, "cu_seqlens_q", shape=(len(block_table) + 1,), dtypes=(torch.int32,), device=device)
    counts = cu_seqlens_q.diff()
    longest = _check_rows(cu_seqlens_q.tolist(), tokens.context_lens.tolist(), rows)
    fresh = None
    if k_new is not None and v_new is not None:
        heads = storage.num_kv_heads
        check_tensor(k_new, "k_new", shape=(rows, heads, storage.head_dim), dtypes=(q.dtype,), device=device)
        check_tensor(v_new, "v_new", shape=(rows, heads, storage.v_head_dim), dtypes=(q.dtype,), device=device)
        fresh = (k_new, v_new)
    elif k_new is not None or v_new is not None:
        raise ValueError("k_new and v_new come together, but only one of them was given")
    elif longest > MAX_DECODE_ROWS:
        raise ValueError(f"a chunk of {longest} rows needs k_new and v_new; without them it has {MAX_DECODE_ROWS} rows")
    tokens = replace(tokens, context_lens_before=tokens.context_lens - counts, cu_seqlens_q=cu_seqlens_q)
    out = checked_out(out, q, (rows, num_q_heads, storage.v_head_dim))
    serving.attend(out, q, storage, tokens, scoring, fresh, first_tokens)
    return out


def _check_rows(starts: list[int], lens: list[int], rows: int) -> int:
    """Check where the rows of each sequence start; returns the most rows of one."""
    counts = [after - before for before, after in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != rows or any(count < 0 for count in counts):
        raise ValueError(f"cu_seqlens_q must ascend from 0 to {rows}, the rows of q, got {starts}")
    for b, (count, length) in enumerate(zip(counts, lens)):
        if count > length:
            raise ValueError(f"sequence {b} has {count} rows, but context_lens counts {length} tokens")
    return max(counts, default=0)
