"""Attention over dense keys and values with what SDPA lacks: softcap and attention sinks."""

from __future__ import annotations

import torch

#: Most bytes of float32 scores formed at once; longer prompts are worked off in slices of query rows.
SCORE_BYTES = 64 * 2**20


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    causal: bool,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``softmax(softcap * tanh(scaling * q.k / softcap) + mask) . v`` in float32, the sinks in the denominator.

    Args:
        query: ``[batch, num_q_heads, q_len, head_dim]``.
        key: ``[batch, num_kv_heads, kv_len, head_dim]``.
        value: ``[batch, num_kv_heads, kv_len, v_head_dim]``.
        mask: bool (True is seen) or additive float, broadcastable to ``[batch, num_q_heads, q_len, kv_len]``.
        dropout: dropout probability on the weights.
        scaling: factor on q.k, default ``head_dim ** -0.5``.
        causal: whether, without a mask, row i sees only the first ``kv_len - q_len + i + 1`` keys.
        softcap: bound on the scores, or ``None``.
        sinks: ``[num_q_heads]`` or ``[batch, num_q_heads, q_len, 1]`` logits, or ``None``.

    Returns:
        ``[batch, q_len, num_q_heads, v_head_dim]``. A row that sees no key is 0.
    """
    batch, num_q_heads, q_len, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1:3]
    scaling = head_dim**-0.5 if scaling is None else scaling
    if mask is None and causal and q_len > 1:
        positions = torch.arange(kv_len - q_len, kv_len, device=query.device)
        mask = torch.arange(kv_len, device=query.device) <= positions[:, None]
    group = num_q_heads // num_kv_heads
    q = query.reshape(batch, num_kv_heads, group, q_len, head_dim)
    rows_at_once = max(1, SCORE_BYTES // (4 * batch * num_q_heads * max(kv_len, 1)))
    out = query.new_empty(batch, q_len, num_q_heads, value.shape[-1])
    for first in range(0, q_len, rows_at_once):
        rows = slice(first, first + rows_at_once)
        scores = scaling * (q[:, :, :, rows] @ key[:, :, None].transpose(-1, -2)).float().flatten(1, 2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            part = mask[..., rows, :] if mask.shape[-2] > 1 else mask
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
        if sinks is not None:
            sink = sinks.float().reshape(1, -1, 1, 1) if sinks.dim() == 1 else sinks.float()[:, :, rows]
            sink = sink.expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sink], dim=-1)
        # A row without any visible key has only -inf, and softmax makes NaN of it.
        blind = (scores == -torch.inf).all(dim=-1, keepdim=True)
        weights = torch.softmax(scores, dim=-1).masked_fill(blind, 0.0)[..., :kv_len]
        weights = torch.nn.functional.dropout(weights, dropout).to(value.dtype)
        weighted = weights.unflatten(1, (num_kv_heads, group)) @ value[:, :, None]
        out[:, rows] = weighted.flatten(1, 2).transpose(1, 2)
    return out
