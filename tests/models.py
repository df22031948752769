"""Tiny random models, one per attention feature, and the caches to compare with."""

from __future__ import annotations

import torch
from transformers import (
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
from transformers.cache_utils import Cache, DynamicLayer, get_layer_types_and_kwargs

from hf_int8_paged.kernels import MAX_DECODE_ROWS, mean_key
from hf_int8_paged.kernels.conditioning import hadamard
from hf_int8_paged.kernels.reference import quantize_rows
from hf_int8_paged.pool import MIN_CENTER_TOKENS

VOCABULARY = 128
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


def fake_quantize(x: torch.Tensor, rotation: str | None = None, center: torch.Tensor | None = None) -> torch.Tensor:
    """Rows ``[batch, heads, tokens, dim]`` conditioned, quantized, dequantized and restored."""
    rows = x.float() if center is None else x.float() - center[:, None]
    q, scales = quantize_rows(hadamard(rows) if rotation else rows)
    rows = q.float() * scales.float()[..., None]
    rows = hadamard(rows) if rotation else rows
    return (rows if center is None else rows + center[:, None]).to(x.dtype)


class FakeQuantizedLayer(DynamicLayer):
    """A dense layer whose stored rows went through int8, seen by attention as the paged cache shows them."""

    def __init__(self, window: int | None = None, rotation: str | None = "hadamard", center_keys: bool = True):
        super().__init__()
        self.rotation = rotation
        self.center_keys = center_keys
        self.center: torch.Tensor | None = None
        self.window = window
        self.is_sliding = window is not None

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        if not past and self.center_keys and key_states.shape[2] >= MIN_CENTER_TOKENS:
            self.center = mean_key(key_states)
        seen = []
        for name, new in (("keys", key_states), ("values", value_states)):
            stored = getattr(self, name)
            setattr(self, name, torch.cat([stored, self.quantized(name, new)], dim=-2))
            fresh = new.shape[2] > (MAX_DECODE_ROWS if past else 1)
            seen.append(torch.cat([stored, new], dim=-2) if fresh else getattr(self, name))
        first = self._first(past)
        return seen[0][:, :, first:], seen[1][:, :, first:]

    def quantized(self, name, new):
        return fake_quantize(new, self.rotation, self.center if name == "keys" else None)

    def _first(self, length: int) -> int:
        return 0 if self.window is None else max(length - self.window + 1, 0)

    def get_mask_sizes(self, query_length):
        length = self.get_seq_length()
        return length + query_length - self._first(length), self._first(length)


class FakeQuantizedCache(Cache):
    """The oracle for `PagedInt8Cache`: the same numbers, dense, in a few lines of torch."""

    def __init__(self, config, **conditioning):
        types, kwargs = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        assert set(types) <= {"full_attention", "sliding_attention"}
        super().__init__(layers=[FakeQuantizedLayer(k.get("sliding_window"), **conditioning) for k in kwargs])
