"""What models ask of the attention function beyond causality: additive masks, biases, sinks, chosen keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BigBirdPegasusConfig, GptOssConfig, LlamaConfig, MistralConfig, NllbMoeConfig

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.seam.attention import int8_paged_attention
from hf_int8_paged.seam.mask_function import int8_paged_mask
from hf_int8_paged.seam.masks import needs_additive_masks
from tests.models import tiny_model


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def tensors(q_len: int = 5, kv_len: int = 9) -> list[torch.Tensor]:
    """A query of 4 heads, keys and values of 2."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, n, 16, generator=generator) for heads, n in ((4, q_len), (2, kv_len), (2, kv_len))]


def dense(q, k, v, bias: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
    """Attention with an additive bias and sinks per row, in a few lines, ``[batch, q_len, heads, dim]``."""
    k, v = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) / 4 + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()], dim=-1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2).float()


def causal(q_len: int, kv_len: int) -> torch.Tensor:
    seen = torch.arange(kv_len) <= torch.arange(kv_len - q_len, kv_len)[:, None]
    return torch.zeros(q_len, kv_len).masked_fill(~seen, -torch.inf)


def test_models_that_add_masks_to_scores_get_masks_to_add():
    assert [needs_additive_masks(c()) for c in (BigBirdPegasusConfig, NllbMoeConfig)] == [True, True]
    assert [needs_additive_masks(c()) for c in (LlamaConfig, GptOssConfig)] == [False, False]
    mask = int8_paged_mask(1, 3, 3, config=BigBirdPegasusConfig(), dtype=torch.float32)
    assert torch.equal(mask[0, 0], torch.full((3, 3), torch.finfo(torch.float32).min).triu(1))
    assert int8_paged_mask(1, 3, 3, config=LlamaConfig(), dtype=torch.float32) is None


def test_a_mask_is_made_where_the_model_asks_for_one_always():
    """Indexers of sparse attention read it."""
    sizes = {"batch_size": 1, "q_length": 1, "kv_length": 8, "q_offset": 7}
    assert int8_paged_mask(**sizes) is None
    assert int8_paged_mask(**sizes, allow_is_causal_skip=False).shape == (1, 1, 1, 8)


def test_rows_without_a_mask_are_the_last_ones():
    """Gemma 4 computes only the last rows of a prompt in some layers."""
    q, k, v = tensors()
    out, _ = int8_paged_attention(Module(), q, k, v, None)
    torch.testing.assert_close(out, dense(q, k, v, causal(5, 9)))


@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "bool_mask"])
def test_a_position_bias_and_sinks_of_each_row(masked):
    q, k, v = tensors()
    generator = torch.Generator().manual_seed(1)
    bias, sinks = torch.randn(2, 4, 5, 9, generator=generator), torch.randn(2, 4, 5, 1, generator=generator)
    mask = (causal(5, 9) == 0)[None, None] if masked else None
    out, _ = int8_paged_attention(Module(), q, k, v, mask, position_bias=bias, sinks=sinks)
    torch.testing.assert_close(out, dense(q, k, v, bias + causal(5, 9), sinks))


@pytest.mark.parametrize("additive", [False, True], ids=["bool_mask", "additive_mask"])
def test_keys_that_an_indexer_chose(additive):
    q, k, v = tensors()
    chosen = torch.tensor([[[0, 2], [1, 3], [2, 6], [3, 7], [0, 8]]] * 2)
    mask = (causal(5, 9) == 0).expand(2, 1, 5, 9)
    seen = torch.zeros(2, 5, 9, dtype=torch.bool).scatter(-1, chosen, True)[:, None] & mask
    mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask
    out, _ = int8_paged_attention(Module(), q, k, v, mask, indices=chosen)
    torch.testing.assert_close(out, dense(q, k, v, torch.zeros(()).masked_fill(~seen, -torch.inf)))


def test_keys_used_as_values_are_read_as_keys():
    """As in DeepSeek V4. The kernels would read the layer's values."""
    cache = PagedInt8Cache(tiny_model("llama").config)
    q, k, v = tensors(q_len=1)
    for layer in range(3):
        cache.update(k, v, layer)
    q, k, v = tensors(q_len=1, kv_len=1)
    keys, _ = cache.update(k, v, 0)
    out, _ = int8_paged_attention(Module(), q, keys, keys, None)
    stored = cache.layers[0].keys.clone()
    torch.testing.assert_close(out, dense(q, stored, stored, torch.zeros(())))


def test_views_can_be_reshaped_without_a_copy():
    """They claim to be contiguous, so models may call ``view``."""
    cache = PagedInt8Cache(tiny_model("llama").config)
    rows = torch.randn(2, 9, 2, 16).transpose(1, 2)
    keys, _ = cache.update(rows, rows, 0)
    assert torch.equal(keys.view(4, 9, 16), rows.reshape(4, 9, 16))


@pytest.mark.parametrize("options", [{}, {"max_batch_size": 2, "max_cache_len": 64}], ids=["growing", "preallocated"])
def test_a_first_prompt_without_a_mask_is_causal_and_no_more(options: dict[str, Any]) -> None:
    """As SDPA has it, also where the layer has a window that is shorter: Moshi's mask does not know of it."""
    config = MistralConfig(
        num_hidden_layers=1, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=12
    )
    q, k, v = (torch.randn(2, heads, 30, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    out, _ = int8_paged_attention(Module(), q, *PagedInt8Cache(config, **options).update(k, v, 0), None)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out.transpose(1, 2), want)
