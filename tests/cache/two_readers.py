"""Two readers of the same blocks: the attention kernels, and attention in float64 over the dense views.

Both see the very keys and values that the cache stored, so no rounding of a key can tip between them: what is left is
the kernels' own arithmetic, and `bound` derives how much that may be.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_int8_paged.seam.attention import NAME, int8_paged_attention
from hf_int8_paged.seam.views import PagedView
from tests.kernels.helpers import hadamard_matrix

#: Unit roundoff of float32.
U = 2.0**-24
#: Largest integer of a query's element and of a softmax weight: the smallest of all backends' (127 * 256).
STEPS = 32512
#: Relative error of the kernels' exp2, and of float32 operations on its argument.
EXP = 4e-7


def visible_keys(
    q_len: int, start: int, stop: int, window: int | None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Which of the positions ``start`` to ``stop`` the newest rows see: bool ``[batch or 1, 1, q_len, keys]``.

    Args:
        q_len: rows, at positions ``stop - q_len`` to ``stop``.
        start: position of the first key.
        stop: position after the last key.
        window: sliding window in tokens, or ``None``.
        mask: bool ``[batch, stop]``, False for padding, or ``None``.
    """
    keys, rows = torch.arange(start, stop), torch.arange(stop - q_len, stop)[:, None]
    visible = (keys <= rows) & (keys > rows - (stop + 1 if window is None else window))
    if mask is None:
        return visible[None, None]
    return visible & mask[:, None, None, start:stop].cpu()


class Attention:
    """Attention in float64 over dense keys and values, and the error that a kernel over int8 blocks may make.

    Args:
        q: ``[batch, num_q_heads, q_len, head_dim]``.
        k: ``[batch, num_kv_heads, keys, head_dim]``, dequantized.
        v: ``[batch, num_kv_heads, keys, v_head_dim]``, dequantized.
        visible: bool, broadcastable to ``[batch, num_q_heads, q_len, keys]``.
        scale: factor on q.k.
        softcap: bound on the scores, or ``None``.
        sinks: attention sink logits ``[num_q_heads]``, or ``None``.
        bias: added to the scores, or ``None``.
    """

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        visible: torch.Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ):
        group = q.shape[1] // k.shape[1]
        self.group, self.scale, self.softcap, self.dtype = group, scale, softcap or 0.0, q.dtype
        self.q = q.detach().double().cpu()
        k, v = (x.detach().double().cpu().repeat_interleave(group, 1) for x in (k, v))
        # A position that no row sees may hold anything; where it does not count it must not spread either.
        seen = visible.broadcast_to(*self.q.shape[:3], k.shape[2])
        anyone = seen.any(2)[..., None]
        self.k, self.v = k.masked_fill(~anyone, 0.0), v.masked_fill(~anyone, 0.0)
        scores = scale * self.q @ self.k.transpose(2, 3)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            bias = bias.detach().double().cpu()
            seen = seen & (bias > torch.finfo(torch.float16).min / 2)  # an additive mask hides with less
            scores = scores + bias
        self.scores = scores.masked_fill(~seen, -torch.inf)
        logits = self.scores
        if sinks is not None:
            sinks = sinks.detach().double().cpu()[None, :, None, None].expand(*scores.shape[:3], 1)
            logits = torch.cat([logits, sinks], dim=3)
        self.weights = torch.softmax(logits, dim=3)[..., : k.shape[2]].nan_to_num(0.0)
        #: ``[batch, num_q_heads, q_len, v_head_dim]``; rows that see no key are 0.
        self.out = self.weights @ self.v

    def bound(self, rotation: str | None, center: torch.Tensor | None, integer: bool) -> torch.Tensor:
        """The largest error of each element of a kernel's output, from the arithmetic of DESIGN.md section 6.

        Worst cases, not likely ones, so that a failure is a fault:

        * A query element is rounded to 1/`STEPS` of the row's largest. Half such a step per element makes a score wrong
          by at most that times the 1-norm of the key, as it is stored: rotated and centred.
        * float32: the terms of a score are at most |q| |k| (the centre's part included), and ``head_dim`` of them are
          added; a Hadamard transform adds log2(head_dim) more roundings, on the query and on the stored rows. Softcap,
          exponent and exp2 err by `EXP` of their values.
        * If no score is off by more than e, no weight is by more than a factor exp(2 e).
        * A weight times its row's scale is rounded to 1/`STEPS` of the largest: half such a step each, times the row in
          units of its scale. The scale is 1/127 of the row's largest stored element.
        * float32 sums of values: one rounding per key, and a few for joining and rotating.
        * The result is rounded to the output's dtype.

        Args:
            rotation: whether rows are stored rotated.
            center: what was subtracted from the keys, ``[num_kv_heads, head_dim]``, or ``None``.
            integer: whether the products are made of integers; False for a kernel in plain float32.
        """
        dim, v_dim, keys = self.q.shape[3], self.v.shape[3], self.k.shape[2]
        norm: Callable[..., torch.Tensor] = torch.linalg.vector_norm
        # The bound itself needs no more than float32.
        q, k, v, weights, scores = (x.float() for x in (self.q, self.k, self.v, self.weights, self.scores))
        mu = torch.zeros(1, 1) if center is None else center.cpu().repeat_interleave(self.group, 0)
        size = abs(self.scale) * norm(q, dim=3)[..., None]
        length = norm(k, dim=3) + 2 * norm(mu, dim=1)[:, None]
        error = (dim + 4 * math.log2(dim) + 16) * U * size * length[:, :, None]
        error = error + EXP * (2 + 2 * abs(self.softcap) + scores.abs())
        if integer:
            step = abs(self.scale) * rotated(q, rotation).abs().amax(3, keepdim=True) / STEPS
            error = error + step / 2 * norm(rotated(k - mu[:, None], rotation), ord=1, dim=3)[:, :, None]
        unseen = scores == -torch.inf
        error = error.masked_fill(unseen, 0.0).amax(3, keepdim=True)
        bound = torch.expm1(2 * error) * (weights @ v.abs())
        bound += (2 * keys + 4 * math.log2(v_dim) + 16) * U * (weights @ norm(v, dim=3)[..., None])
        if integer:
            scales = rotated(v, rotation).abs().amax(3) / 127
            in_scales = (v.abs() / scales[..., None]).nan_to_num(0.0, posinf=0.0)
            most = (weights * scales[:, :, None]).amax(3, keepdim=True)
            bound += most / (2 * STEPS) * ((~unseen).float() @ in_scales)
        finfo = torch.finfo(self.dtype)
        # A hundredth for the products of these small numbers.
        return 1.01 * (bound + finfo.eps / 2 * (self.out.abs() + bound)) + finfo.tiny


@functools.cache
def _hadamard(dim: int) -> torch.Tensor:
    return torch.from_numpy(hadamard_matrix(dim)).float()


def rotated(rows: torch.Tensor, rotation: str | None) -> torch.Tensor:
    """Rows ``[..., dim]`` as they are stored."""
    return rows @ _hadamard(rows.shape[-1]) if rotation else rows


def assert_same_attention(out: torch.Tensor, key: PagedView, value: PagedView, attention: Attention) -> None:
    """A kernel's output ``[batch, q_len, num_q_heads, v_head_dim]`` is `attention` over these views, to rounding."""
    layer: Any = key.content.layer
    storage = layer.storage
    bound = attention.bound(storage.rotation, storage.key_center, storage.backend != "reference")
    error = (out.detach().double().cpu().transpose(1, 2) - attention.out).abs()
    # Not a comparison with >: NaN is wrong, too.
    assert (error <= bound).all(), (
        f"{storage.backend} kernel of layer {layer.index}, {list(attention.q.shape)} over "
        f"{key.shape[2]} keys: {float((error / bound).max()):.3g} times the largest error that its arithmetic allows"
    )


class CheckedAttention:
    """``int8_paged`` attention, every call of which over a cache's views is compared with float64 attention."""

    def __init__(self) -> None:
        #: Comparisons, by number of query rows.
        self.compared: list[int] = []

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        if not isinstance(key, PagedView) or not isinstance(value, PagedView):
            return int8_paged_attention(module, query, key, value, mask, **options)
        attention = self.by_the_other_reader(module, query, key, value, mask, **options)
        out, weights = int8_paged_attention(module, query, key, value, mask, **options)
        assert_same_attention(out, key, value, attention)
        self.compared.append(query.shape[2])
        return out, weights

    @staticmethod
    def by_the_other_reader(
        module: Any, query: torch.Tensor, key: PagedView, value: PagedView, mask: torch.Tensor | None, **options: Any
    ) -> Attention:
        layer: Any = key.content.layer
        stop = key.content.stop
        window = layer.window
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if causal and not isinstance(layer.get_seq_length(), torch.Tensor):
            visible = visible_keys(query.shape[2], key.content.start, stop, window)
        else:  # a preallocated layer's mask says how many of its keys there are
            visible = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        bias = options.get("position_bias")
        if mask is not None and mask.dtype == torch.bool:
            visible = visible & mask.cpu()
        elif mask is not None:
            bias = mask if bias is None else mask + bias
        scale = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        dense = key.dense(), value.dense()
        return Attention(query, *dense, visible, scale, options.get("softcap"), options.get("s_aux"), bias)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> CheckedAttention:
    """Every attention call of ``int8_paged`` models over views of a cache is compared with the other reader's."""
    attention = CheckedAttention()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, attention)
    return attention
