"""Tiny random models of eight architectures that the engine serves, and managers for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from hf_int8_paged.batching import PagedInt8BatchingManager
from tests.models import _COMMON, VOCABULARY, random_ids

_HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
#: name -> (prefix of the classes in transformers, what differs from the common sizes)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama: full attention": ("Llama", {}),
    "mistral: windows": ("Mistral", {"sliding_window": 20}),
    "gemma2: softcap, half windows": ("Gemma2", {"head_dim": 64, "sliding_window": 24, "num_hidden_layers": 4}),
    "gemma3: most layers windows": (
        "Gemma3",
        {"head_dim": 32, "sliding_window": 20, "num_hidden_layers": 4, "layer_types": _HYBRID},
    ),
    "mixtral: experts": ("Mixtral", _EXPERTS | {"sliding_window": None}),
    "qwen3_moe: experts, normed heads": (
        "Qwen3Moe",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gpt_oss: sink logits, half windows, experts": (
        "GptOss",
        _EXPERTS | {"head_dim": 32, "sliding_window": 20, "num_hidden_layers": 4},
    ),
    "cohere2: full without positions": (
        "Cohere2",
        {"sliding_window": 24, "num_hidden_layers": 4, "layer_types": _HYBRID},
    ),
}


def batching_model(name: str) -> PreTrainedModel:
    """A random model of a few thousand weights, the same at every call, in float32 and eval mode."""
    prefix, differences = ARCHITECTURES[name]
    config_class = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config_class(**_COMMON | differences)).eval()
    model.set_attn_implementation("int8_paged")
    return model


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Ragged prompts of 1 to 90 tokens, of which a third begins with one of two common prefixes."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    common = [random_ids(40, seed=1000 + i).tolist() for i in range(2)]
    return [
        (common[i % 2] if i % 3 == 0 else []) + random_ids(length, seed=seed + 7 * i + 1).tolist()
        for i, length in enumerate(lengths)
    ]


@contextmanager
def manager_for(
    model: PreTrainedModel, generation: dict[str, Any] | None = None, **options: Any
) -> Iterator[PagedInt8BatchingManager]:
    """A manager with its blocks, which is destroyed afterwards.

    Args:
        model: one of `batching_model`.
        generation: what differs from 10 greedy tokens.
        options: of the manager, those that it has by name, and of the engine's configuration.
    """
    own = {name: options.pop(name) for name in ("centers", "rotation", "sink_tokens", "backend") if name in options}
    defaults = {"page_size": 16, "num_blocks": 400, "max_batch_tokens": 64, "return_logprobs": True, "seed": 0}
    manager = PagedInt8BatchingManager(
        model,
        GenerationConfig(**{"max_new_tokens": 10, "do_sample": False, "eos_token_id": -1} | (generation or {})),
        ContinuousBatchingConfig(**defaults | options),
        **own,
    )
    manager.warmup()
    try:
        yield manager
    finally:
        manager.destroy()


__all__ = ["ARCHITECTURES", "VOCABULARY", "batching_model", "manager_for", "prompts", "random_ids"]
