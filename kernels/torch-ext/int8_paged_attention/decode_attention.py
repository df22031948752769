"""Decode attention, the public function: its contract, and the checks before a backend's kernel runs."""

from __future__ import annotations

import torch

from .backends import Backend, backend_of
from .calls import MAX_DECODE_ROWS, Scoring, Tokens
from .checks import (
    FLOAT_DTYPES,
    check_block_ids,
    check_disjoint,
    check_first_tokens,
    check_lengths,
    check_scale,
    check_softcap,
    check_tensor,
    clamp_mask_start,
    clamp_window,
)
from .first_tokens import FirstTokens
from .storage import KvCacheQuant


def int8_paged_decode_attention(
    q: torch.Tensor,
    storage: KvCacheQuant,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    *,
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
    """Attention of the last ``q_len`` positions over the whole paged context, straight from the int8 blocks.

    Query row i of sequence b stands at position ``p = context_lens[b] - q_len + i`` and sees the keys j with

    * ``j <= p``, ``j < context_lens[b]``, and a table entry that is not negative;
    * ``j >= kv_start[b]``, if given;
    * ``j > p - window``, if given;
    * ``key_mask[b, j - key_mask_start]``, if given; columns outside the mask count as False.

    With ``first_tokens`` the first tokens are read from there, in full precision, whether or not the table has them.

    ``out = softmax(softcap * tanh(scale * q.k / softcap)) . v``, with the head's sink logit in the
    softmax's denominator. A row that sees no key is 0. A key or value row that held NaN or infinity makes the
    rows that see it NaN, and no others.

    Args:
        q: ``[batch, num_q_heads, q_len, head_dim]``, float32, float16 or bfloat16; ``num_q_heads`` a multiple of
            ``num_kv_heads``; q_len 1 to 16. Query head h reads key/value head ``h * num_kv_heads // num_q_heads``.
        storage: the layer's storage; the q_len tokens have been appended.
        block_table: int32 ``[batch, max_blocks]``.
        context_lens: int32 ``[batch]``, the q_len tokens included.
        scale: factor on q.k, usually ``head_dim ** -0.5``.
        kv_start: int32 ``[batch]`` first position to read: left padding is skipped, not read and masked. Below 0 it is
            0, past the context nothing is read.
        key_mask: bool ``[batch, columns]``, True where a key may be seen.
        key_mask_start: position of the mask's first column, any integer.
        window: sliding window in tokens, the row's own position included; at least 1.
        softcap: bound on the scores, as in Gemma 2, positive and finite.
        sink_logits: ``[num_q_heads]`` logits, as in gpt-oss.
        first_tokens: first tokens in full precision (`FirstTokens`).
        out: ``[batch, num_q_heads, q_len, v_head_dim]`` of q's dtype to write to, last axis contiguous, no
            address twice.
        backend: name of the backend to use instead of the storage's own: only ``"reference"`` reads others' tiles. It
            also takes a float64 q and then computes in float64.

    Returns:
        ``out``.

    Raises:
        ValueError: wrong shape, dtype or device, a number out of its range; on the CPU also a block id or a length out
            of range. On other devices such blocks are not read.
        TypeError: no tensor, or no integer.

    Source: ``int8_paged_decode_attention`` of the Rust engine; tests/kernels/test_decode.py shows its use.
    """
    serving = backend_of(storage, backend)
    dtypes = query_dtypes(serving)
    check_table(block_table, storage)
    check_tensor(q, "q", shape=(len(block_table), None, None, storage.head_dim), dtypes=dtypes, device=storage.device)
    batch, num_q_heads, q_len, _ = q.shape
    if not 1 <= q_len <= MAX_DECODE_ROWS:
        raise ValueError(
            f"q_len must be between 1 and {MAX_DECODE_ROWS}, got {q_len}; gather_dense serves longer chunks"
        )
    tokens, scoring = checked_records(
        Tokens(block_table, context_lens, context_lens, window, kv_start),
        Scoring(scale, softcap, sink_logits, key_mask, key_mask_start),
        first_tokens,
        storage,
        num_q_heads,
        dtypes,
    )
    out = checked_out(out, q, (batch, num_q_heads, q_len, storage.v_head_dim))
    serving.attend(out, q, storage, tokens, scoring, None, first_tokens)
    return out


def query_dtypes(serving: Backend) -> tuple[torch.dtype, ...]:
    """dtypes of queries that a backend takes: only the reference computes in float64."""
    return (*FLOAT_DTYPES, torch.float64) if serving.NAME == "reference" else FLOAT_DTYPES


def check_table(block_table: torch.Tensor, storage: KvCacheQuant) -> None:
    """Check a block table; its ids only where they are on the host."""
    check_tensor(block_table, "block_table", shape=(None, None), dtypes=(torch.int32,), device=storage.device)
    check_block_ids(block_table, "block_table", storage.num_blocks)


def checked_records(
    tokens: Tokens,
    scoring: Scoring,
    first_tokens: FirstTokens | None,
    storage: KvCacheQuant,
    num_q_heads: int,
    dtypes: tuple[torch.dtype, ...],
) -> tuple[Tokens, Scoring]:
    """Check all that a caller gives beside queries, a block table that `check_table` has passed and ``cu_seqlens_q``;
    only ``context_lens`` is read of the lengths.

    Args:
        tokens: as given, of any strides.
        scoring: as given.
        first_tokens: as given.
        storage: the layer's.
        num_q_heads: of the queries.
        dtypes: that sink logits may have.

    Returns:
        Both records, as kernels take them.
    """
    device, (batch, max_blocks) = storage.device, tokens.block_table.shape
    capacity = max_blocks * storage.block_size
    scale, softcap, sink_logits, key_mask, key_mask_start = scoring
    if num_q_heads == 0 or num_q_heads % storage.num_kv_heads:
        raise ValueError(
            f"q has {num_q_heads} heads, which is no multiple of the storage's {storage.num_kv_heads} KV heads"
        )
    check_tensor(tokens.context_lens, "context_lens", shape=(batch,), dtypes=(torch.int32,), device=device)
    check_lengths(tokens.context_lens, "context_lens", capacity)
    if tokens.kv_start is not None:
        check_tensor(tokens.kv_start, "kv_start", shape=(batch,), dtypes=(torch.int32,), device=device)
    if key_mask is not None:
        check_tensor(key_mask, "key_mask", shape=(batch, None), dtypes=(torch.bool,), device=device)
    if sink_logits is not None:
        check_tensor(sink_logits, "sink_logits", shape=(num_q_heads,), dtypes=dtypes, device=device)
    if first_tokens is not None:
        check_first_tokens(first_tokens, storage, batch)
    check_scale(scale)
    if softcap is not None:
        check_softcap(softcap)
    window = clamp_window(tokens.window, capacity)
    start = clamp_mask_start(key_mask_start, key_mask, capacity)
    return (
        Tokens.at(tokens.block_table, tokens.context_lens, window, tokens.kv_start),
        Scoring(scale, softcap, sink_logits, key_mask, start),
    )


def checked_out(out: torch.Tensor | None, q: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A caller's output, which must have this shape and q's dtype, or a new one."""
    if out is None:
        return torch.empty(shape, dtype=q.dtype, device=q.device)
    check_tensor(out, "out", shape=shape, dtypes=(q.dtype,), device=q.device)
    check_disjoint(out, "out")
    return out
