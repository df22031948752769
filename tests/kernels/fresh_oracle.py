"""Attention over a past in blocks and over fresh keys and values, in float64, and the check of a backend against it."""

from __future__ import annotations

import numpy as np
import torch

from hf_int8_paged.kernels import Scoring, Tokens, load_backend, reference

from .first_token_cases import first_positions
from .helpers import SEED, Case, device_of

#: Of a float32 output row, relative to its length: sums of some hundred terms.
FLOAT32_ERROR = 1e-5


def attention_over_fresh(case: Case, b: int, q: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor) -> torch.Tensor:
    """float64 ``[num_q_heads, chunk, v_head_dim]`` of sequence b's chunk after the case's tokens.

    Args:
        case: the past: ``context_lens`` are the lengths before the chunk.
        b: the sequence.
        q: its queries, ``[num_q_heads, chunk, head_dim]``.
        k_new: its fresh keys, ``[num_kv_heads, chunk, head_dim]``.
        v_new: ``[num_kv_heads, chunk, v_head_dim]``.
    """
    past, chunk, group = int(case.context_lens[b]), q.shape[1], q.shape[0] // k_new.shape[0]
    first, stop = first_positions(case.options, b)
    window, softcap, kv_start, key_mask, sink_logits = (
        case.options.get(name) for name in ("window", "softcap", "kv_start", "key_mask", "sink_logits")
    )
    k, v = (
        torch.cat([torch.from_numpy(np.nan_to_num(stored[b, :, :past])), new.double().cpu()], 1)
        for stored, new in ((case.keys, k_new), (case.values, v_new))
    )
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q.double().cpu() @ k.mT * case.scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions, keys = past + torch.arange(chunk)[:, None], torch.arange(past + chunk)
    in_blocks = case.block_table[b].cpu()[keys[:past] // case.storage.block_size] >= 0
    there = torch.cat([in_blocks | (keys[:past] < stop), torch.ones(chunk, dtype=torch.bool)])
    visible = there & (keys >= first) & (keys <= positions)
    if window is not None:
        visible &= keys > positions - window
    if kv_start is not None:
        visible &= keys >= kv_start[b].cpu()
    if key_mask is not None:
        column = keys - case.options.get("key_mask_start", 0)
        row = key_mask[b].cpu()
        inside = (column >= 0) & (column < len(row))
        visible &= torch.tensor([bool(ok) and bool(row[c]) for ok, c in zip(inside, column)])
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        scores = torch.cat([scores, sink_logits.double().cpu()[:, None, None].expand(-1, chunk, 1)], dim=-1)
    return scores.softmax(-1).nan_to_num(0.0)[..., : past + chunk] @ v


def records(case: Case) -> tuple[Tokens, Scoring]:
    """The case's tokens, as those before a chunk, and its scoring."""
    given = case.options
    tokens = Tokens.at(case.block_table, case.context_lens, given.get("window"), given.get("kv_start"))
    scoring = Scoring(case.scale, *(given.get(name) for name in ("softcap", "sink_logits", "key_mask")))
    return tokens, scoring._replace(key_mask_start=given.get("key_mask_start", 0))


def check_fresh(
    backend: str, case: Case, chunk: int, dtype: torch.dtype = torch.float32, tolerance: float = FLOAT32_ERROR
) -> None:
    """A random chunk after the case's tokens, into a poisoned output: against float64, and against the reference."""
    rng = torch.Generator().manual_seed(SEED)
    storage, (batch, heads), device = case.storage, case.q.shape[:2], device_of(backend)
    q = torch.randn(batch, heads, chunk, storage.head_dim, generator=rng).to(device, dtype)
    k_new = torch.randn(batch, storage.num_kv_heads, chunk, storage.head_dim, generator=rng).to(device, dtype)
    # Strided, as a model's projections are.
    v_new = torch.randn(batch, chunk, storage.num_kv_heads, storage.v_head_dim, generator=rng).to(device, dtype)
    v_new = v_new.transpose(1, 2)
    tokens, scoring = records(case)
    outputs = []
    for attend in (load_backend(backend).attend, reference.attend):
        out = torch.full((batch, heads, chunk, storage.v_head_dim), torch.nan, dtype=dtype, device=device)
        attend(out, q, storage, tokens, scoring, (k_new, v_new), case.options.get("first_tokens"))
        outputs.append(out.cpu())
    want = torch.stack([attention_over_fresh(case, b, q[b], k_new[b], v_new[b]) for b in range(batch)])
    for out in outputs:
        assert ((out - want).norm(dim=-1) <= tolerance * want.norm(dim=-1)).all()
