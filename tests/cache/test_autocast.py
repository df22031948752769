"""Models under autocast, whose keys, values and queries come in different dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_int8_paged import PagedInt8Cache
from tests.models import VOCABULARY, random_ids

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES)),
}


def model_of(name: str) -> PreTrainedModel:
    model_class, config = MODELS[name]
    torch.manual_seed(0)
    return model_class(config).eval()


@torch.no_grad()
def logits_of_steps(model: PreTrainedModel, cache) -> torch.Tensor:
    """Logits of a prompt's last row, four single tokens, a chunk of 5 and one of 20, ``[rows, vocabulary]``."""
    ids, start, parts = random_ids(2, 60), 0, []
    for count in (31, 1, 1, 1, 1, 5, 20):
        parts.append(model(ids[:, start : start + count], past_key_values=cache).logits[:, -1].float())
        start += count
    return torch.cat(parts)


@pytest.mark.parametrize("attention", ["int8_paged", "sdpa", "eager"])
@pytest.mark.parametrize("kind", ["growing", "preallocated"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_a_dynamic_cache_up_to_bfloat16(name: str, kind: str, attention: str) -> None:
    """bfloat16 rounds each product to 2**-9 of itself; int8 adds 2**-8 of a row's largest element, once. What bfloat16
    costs is measured against float32. The two runs in bfloat16 may differ by four times that, or they did not compute
    the same."""
    model = model_of(name)
    model.set_attn_implementation("eager" if attention == "int8_paged" else attention)
    exact = logits_of_steps(model, DynamicCache(config=model.config))
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_of_steps(model, DynamicCache(config=model.config))
        model.set_attn_implementation(attention)
        options: dict[str, Any] = {"max_batch_size": 2, "max_cache_len": 64} if kind == "preallocated" else {}
        logits = logits_of_steps(model, PagedInt8Cache(model.config, **options))
    cost = (expected - exact).norm() / exact.norm()
    assert 1e-4 < cost < 0.2
    assert (logits - expected).norm() / exact.norm() < 4 * cost
