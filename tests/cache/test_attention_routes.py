"""The attention function over the cache's views against attention over the same tokens in float64: every route, many
masks. Nothing is computed twice in different ways before it is stored, so that no rounding can tip between the two.

This file runs itself once more under TRITON_INTERPRET=1, for the Triton backend.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.seam.attention import int8_paged_attention
from hf_int8_paged.seam.mask_function import int8_paged_mask
from tests.kernels.conftest import INTERPRETED, backends_here

HEADS, KV_HEADS, DIM, WINDOW = 4, 2, 16, 20
SCALE = DIM**-0.5
MASKS = ("none", "made", "keys", "keys_of_all", "float", "per_head", "rows", "written_into", "not_causal")
BACKENDS = ["triton"] if INTERPRETED else [name for name in backends_here() if name != "triton"]


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = HEADS // KV_HEADS


def empty_cache(window: int | None, **options: Any) -> PagedInt8Cache:
    """One layer."""
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": HEADS * DIM, "num_attention_heads": HEADS}
    sizes["num_key_value_heads"] = KV_HEADS
    config = LlamaConfig(**sizes) if window is None else MistralConfig(**sizes, sliding_window=window)
    return PagedInt8Cache(config, **options)


def made_mask(cache: PagedInt8Cache, q_len: int, padding: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """The mask as transformers asks for it before the layer is updated."""
    kv_length, kv_offset = cache.layers[0].get_mask_sizes(q_len)
    pattern = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    past = cache.get_seq_length()
    return int8_paged_mask(
        len(padding),
        q_len,
        kv_length,
        past,
        kv_offset,
        pattern,
        padding[:, : past + q_len],
        window,
        allow_is_causal_skip=bool(padding.all()),
    )


def positions_seen(q_len: int, kv_len: int, window: int | None) -> torch.Tensor:
    """Rows are the last positions."""
    rows, keys = torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)
    seen = keys <= rows
    return seen if window is None else seen & (keys > rows - window)


def exact(q, k, v, seen: torch.Tensor, bias: torch.Tensor, softcap: float | None, sinks) -> torch.Tensor:
    """Attention in float64, ``[batch, q_len, heads, dim]``; rows that see nothing are NaN."""
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = SCALE * q.double() @ k.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + bias).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


def bound(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Largest error of an element that the kernels' arithmetic may cause.

    A query is split into two int8 terms, so each element (rotated: at most the row's length) is off by at most half of
    |q| / 127 / 256, and a score by SCALE * that * sqrt(DIM) * |k|. Twice the largest error of a score, plus the 2**-16
    to which softmax weights are split, is the largest relative error of a weight; the output moves by that times twice
    the longest value row (rotated likewise). Centred keys are at most twice as long. float32 rounding is far below.
    """
    length = [float(x.double().norm(dim=-1).max()) for x in (q, k, v)]
    score = SCALE * length[0] / 127 / 256 / 2 * DIM**0.5 * 2 * length[1]
    return 2 * length[2] * (2 * score + 2**-15)


def compare(rng: torch.Generator, backend: str, kind: str) -> None:
    """A prompt, a step and a chunk over both, with masks of a kind."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    window = None if number(0, 2) else WINDOW
    batch, prompt = number(1, 4), number(17, 45)
    cache = empty_cache(window, backend=backend, sink_tokens=number(0, 3))
    softcap = 3.0 if number(0, 3) == 0 else None
    sinks = torch.randn(HEADS, generator=rng) if number(0, 3) == 0 else None
    lengths = [prompt, 1, number(2, 17), number(17, 24), 1]
    padding = torch.ones(batch, sum(lengths), dtype=torch.bool)
    if kind == "made" and number(0, 2):
        padding[0, : number(1, prompt)] = False
    for turn, q_len in enumerate(lengths):
        q, k, v = (torch.randn(batch, n, q_len, DIM, generator=rng) for n in (HEADS, KV_HEADS, KV_HEADS))
        mask = made_mask(cache, q_len, padding, window)
        keys, values = cache.update(k, v, 0)
        kv_len = keys.shape[2]
        seen, bias = positions_seen(q_len, kv_len, window), torch.zeros(())
        options: dict[str, Any] = {}
        if kind == "made" or turn == 0:
            seen = seen if mask is None else mask.clone()
        elif kind == "none":
            mask = None
        elif kind == "written_into":
            mask = made_mask_of(seen, batch) if mask is None else mask.clone() if q_len == 1 else mask
            mask[..., number(0, kv_len)] = False
            seen = mask.clone()
        elif kind == "not_causal":
            mask, seen, options = None, torch.ones(q_len, kv_len, dtype=torch.bool), {"is_causal": False}
        else:
            heads = HEADS if kind == "per_head" else 1
            rows = 1 if kind.startswith("keys") else q_len
            shape = (1 if kind == "keys_of_all" else batch, heads, rows, kv_len)
            mask = torch.rand(shape, generator=rng) < 0.7
            mask[..., -q_len:] = True
            seen = mask
            if kind == "float":
                bias = torch.randn(shape, generator=rng)
                mask, seen = bias, torch.ones(shape, dtype=torch.bool)
        out, _ = int8_paged_attention(Module(), q, keys, values, mask, softcap=softcap, s_aux=sinks, **options)
        assert out.dtype == q.dtype
        k, v = keys.clone(), values.clone()
        expected = exact(q, k, v, seen, bias, softcap, sinks)
        visible = seen.any(-1).broadcast_to(batch, HEADS, q_len).transpose(1, 2)
        error = (out.double() - expected)[visible].abs()
        assert error.max() <= bound(q, k, v), (kind, turn, q_len, window, softcap, float(error.max()))


def made_mask_of(seen: torch.Tensor, batch: int) -> torch.Tensor:
    return seen.expand(batch, 1, *seen.shape).clone()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_is_obeyed_on_every_route(kind: str, backend: str) -> None:
    for seed in range(2 if backend == "triton" else 12):
        with torch.no_grad():
            compare(torch.Generator().manual_seed(seed), backend, kind)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_for_another_window_is_obeyed(backend: str) -> None:
    """Chunks whose mask has no window, or another one than the cache's layer, cannot be left to the kernels."""
    rng = torch.Generator().manual_seed(0)
    for of_layer, of_mask in ((WINDOW, None), (None, WINDOW), (WINDOW, 7)):
        cache = empty_cache(of_layer, backend=backend)
        rows = torch.randn(1, KV_HEADS, 18, DIM, generator=rng)
        cache.update(rows, rows, 0)
        for q_len in (5, 17):
            q, k, v = (torch.randn(1, n, q_len, DIM, generator=rng) for n in (HEADS, KV_HEADS, KV_HEADS))
            mask = made_mask(cache, q_len, torch.ones(1, 60, dtype=torch.bool), of_mask)
            keys, values = cache.update(k, v, 0)
            assert mask is not None
            out, _ = int8_paged_attention(Module(), q, keys, values, mask)
            expected = exact(q, keys.clone(), values.clone(), mask.clone(), torch.zeros(()), None, None)
            assert (out.double() - expected).abs().max() <= bound(q, keys.clone(), values.clone())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_len", [1, 20])
def test_views_of_tokens_that_moved_are_refused(q_len: int, backend: str) -> None:
    cache = empty_cache(None, backend=backend)
    prompt = torch.randn(1, KV_HEADS, 30, DIM)
    cache.update(prompt, prompt, 0)
    rows = torch.randn(1, KV_HEADS, q_len, DIM)
    keys, values = cache.update(rows, rows, 0)
    cache.crop(-q_len)
    cache.update(rows + 1, rows + 1, 0)
    with pytest.raises(RuntimeError, match="since dropped or moved"):
        int8_paged_attention(Module(), torch.randn(1, HEADS, q_len, DIM), keys, values, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len", [1, 5, 20])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_under_autocast_answers_have_its_dtype(
    softcap: float | None, q_len: int, q_dtype: torch.dtype, backend: str
) -> None:
    """As SDPA's have. Rotary embeddings in float32 make such queries and keys beside bfloat16 values."""
    rng = torch.Generator().manual_seed(0)
    cache = empty_cache(None, backend=backend)
    for tokens in (30, q_len):
        q, k, v = (torch.randn(2, n, tokens, DIM, generator=rng) for n in (HEADS, KV_HEADS, KV_HEADS))
        keys, values = cache.update(k, v, 0)
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = int8_paged_attention(Module(), q.to(q_dtype), keys, values, None, softcap=softcap)
        assert out.dtype == torch.bfloat16
        k, v = keys.clone(), values.clone()
        expected = exact(q, k, v, positions_seen(tokens, k.shape[2], None), torch.zeros(()), softcap, None)
        # q, k, v, scores, weights and the result are rounded to 8 bits: half a step of 2**-8 each. Scores of length
        # |q| |k| SCALE are off by three such steps, weights by twice that and one more, and so on as in `bound`.
        lengths = [float(x.norm(dim=-1).max()) for x in (q, k, v)]
        score = 3 * 2**-9 * SCALE * lengths[0] * lengths[1]
        assert (out.double() - expected).abs().max() <= lengths[2] * (2 * score + 3 * 2**-9)


@pytest.mark.parametrize("fresh", [True, False], ids=["tensors", "views"])
def test_dtypes_that_sdpa_refuses_are_refused_where_it_computes(fresh: bool) -> None:
    cache = empty_cache(None)
    rows = torch.randn(1, KV_HEADS, 30, DIM)
    keys, values = (rows, rows) if fresh else cache.update(rows, rows, 0)
    with pytest.raises(RuntimeError, match="same dtype"):
        int8_paged_attention(Module(), torch.randn(1, HEADS, 30, DIM, dtype=torch.bfloat16), keys, values, None)


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.skipif(INTERPRETED, reason="this process interprets the kernels itself")
def test_interpreted_triton() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    assert " passed" in result.stdout
