"""Tiny random models, one per attention feature, and the cache to compare with."""

from __future__ import annotations

import statistics

import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from eval._fake_quantized import FakeQuantizedCache, fake_quantize

__all__ = [
    "IMPLEMENTATIONS", "LOGIT_ROUNDING", "TINY", "TIPPED", "VOCABULARY",
    "FakeQuantizedCache", "fake_quantize", "random_ids", "tiny_model", "tipped_roundings",
]  # fmt: skip

VOCABULARY = 128
#: How far apart two ways to compute the same logits of a tiny model in float32 may be: 13 matrix products follow one
#: another (4 in each of 3 layers, and the head), each a sum of at most 96 terms, and logits are at most 8. Where rows
#: are quantized on the way, this can tip a rounding, after which logits differ by more: see `TIPPED`.
LOGIT_ROUNDING = 13 * 96 * 2.0**-24 * 8
#: The part of quantization's whole effect that tipped roundings may make up. A tip moves one of the about 10,000
#: numbers stored of a sequence by a whole step; all of them are off by 0.29 steps (the root mean square of a uniform
#: error). So a tip is 1 / (0.29 * 100) = 3.5 % of the effect, and a quarter of it 50 tips: each may tip others.
TIPPED = 0.25
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Larger weights than usual: attention that is sharp enough for a wrong key to show.
    "initializer_range": 0.2,
}
#: name -> (model class, config class, what differs from the common sizes)
TINY = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 20}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 256, "sliding_window": 24, "num_hidden_layers": 4}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
}
#: Gemma 2 caps its scores, which transformers' SDPA does not do; the model refuses it.
IMPLEMENTATIONS = {name: ["int8_paged", "eager"] + ["sdpa"] * (name != "gemma2") for name in TINY}


def tiny_model(name: str, **changes) -> PreTrainedModel:
    """A random model of a few thousand weights, the same at every call, in float32 and eval mode."""
    model_class, config_class, differences = TINY[name]
    torch.manual_seed(0)
    return model_class(config_class(**_COMMON | differences | changes)).eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without the padding id."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def tipped_roundings(model: PreTrainedModel) -> float:
    """How far apart logits of this model may be that differ in tipped roundings only: `TIPPED` times what quantization
    changes them by after three prompts, the median."""
    implementation, changes = model.config._attn_implementation, []
    model.set_attn_implementation("eager")
    for seed in range(3):
        logits = []
        for cache in (DynamicCache(config=model.config), FakeQuantizedCache(model.config)):
            model(random_ids(2, 40, seed=seed).to(model.device), past_key_values=cache)
            logits.append(model(random_ids(2, 1, seed=seed).to(model.device), past_key_values=cache).logits)
        changes.append(float((logits[0] - logits[1]).abs().max()))
    model.set_attn_implementation(implementation)
    return TIPPED * statistics.median(changes)
