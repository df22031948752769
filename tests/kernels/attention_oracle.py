"""Dense softmax attention in float64 over the dequantized rows of a case, and the error that a backend may make."""

from __future__ import annotations

import numpy as np
import torch

from .helpers import Case, visible_keys

#: fp32 output, relative to the largest visible |v|. The cpu and triton backends compute in the integer domain, with
#: q and the softmax weights split into two int8 terms.
RELATIVE_ERROR = {"reference": 0.0, "cpu": 1e-4, "triton": 3e-4}


def dense_attention(case: Case) -> np.ndarray:
    """float64 ``[batch, num_q_heads, q_len, v_head_dim]``."""
    q = case.q.double().cpu().numpy()
    batch, heads, q_len, _ = q.shape
    group = heads // case.storage.num_kv_heads
    softcap, sink_logits = case.options.get("softcap"), case.options.get("sink_logits")
    out = np.zeros((batch, heads, q_len, case.storage.v_head_dim))
    seen = visible_keys(case)
    for b, h, i in np.ndindex(batch, heads, q_len):
        rows = seen[b][i]
        if not len(rows):
            continue
        scores = case.scale * case.keys[b, h // group, rows] @ q[b, h, i]
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        logits = scores if sink_logits is None else np.append(scores, float(sink_logits[h]))
        weights = np.exp(scores - logits.max())
        out[b, h, i] = weights / np.exp(logits - logits.max()).sum() @ case.values[b, h // group, rows]
    return out


def error_bound(case: Case, want: np.ndarray) -> np.ndarray:
    """Largest error that each output element may have.

    * fp32 rounding: a sum of n weights is off by about sqrt(n) ulps, and a score by an ulp of the size of its terms,
      at most ``scale * |q| * |k|``, which exp turns into a relative error of the weights; factor 4 for the constants.
    * the backend's integer arithmetic, `RELATIVE_ERROR`;
    * half an ulp of the output's dtype.
    """
    q_size = np.linalg.norm(case.q.double().cpu().numpy(), axis=-1)
    center = case.storage.key_center
    k_size = np.linalg.norm(case.keys, axis=-1) + (0 if center is None else float(center.norm(dim=-1).max()))
    group = want.shape[1] // case.storage.num_kv_heads
    seen = visible_keys(case)
    bound = np.zeros(want.shape)
    ulp = 2.0**-23
    for b, h, i in np.ndindex(want.shape[:3]):
        rows = seen[b][i]
        if not len(rows):
            continue
        v_size = np.abs(case.values[b, h // group, rows]).max()
        score_size = case.scale * q_size[b, h, i] * k_size[b, h // group, rows].max()
        rounding = 4 * ulp * (np.sqrt(len(rows)) + score_size + np.log2(want.shape[-1]))
        bound[b, h, i] = v_size * (rounding + RELATIVE_ERROR[case.backend])
    if case.q.dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(case.q.dtype)
        bound += (np.abs(want) + bound) * info.eps / 2 + info.smallest_normal * info.eps / 2
    return bound


def assert_close(got: torch.Tensor, want: np.ndarray, bound: np.ndarray) -> None:
    """Every element within its bound, and NaN exactly where NaN is wanted."""
    result = got.double().cpu().numpy()
    np.testing.assert_array_equal(np.isnan(result), np.isnan(want))
    finite = ~np.isnan(want)
    error, allowed = np.abs(result - want)[finite], bound[finite]
    assert (error <= allowed).all(), (
        f"largest error {error.max():.3g}; worst is {(error / np.maximum(allowed, 1e-300)).max():.3g} times its bound"
    )
