"""What the generic shrinking gets wrong, per architecture."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from eval._tiny_configs import VOCABULARY

#: Tokens of the two prompts, no multiples of a block; the shorter one is padded on the left.
PROMPTS = (37, 21)

_HEAD_DIM = {"head_dim": 16}
_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"] * 2}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 2,
}
#: Sizes of the sliding layers, which this config takes under names of their own.
_DOTS3_SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 512,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "gemma4": {"text_config": _SLIDING_AND_FULL},
    "gemma4_text": _SLIDING_AND_FULL,
    "gemma4_unified": {"text_config": _SLIDING_AND_FULL},
    "gemma4_unified_text": _SLIDING_AND_FULL,
    "hunyuan_v1_dense": _HEAD_DIM,
    "hunyuan_v1_moe": _HEAD_DIM,
    "ministral": _HEAD_DIM,
    "nemotron": _HEAD_DIM | {"num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": _DOTS3_SLIDING,
    "dots3_note_text": _DOTS3_SLIDING,
    "cohere_compass_text": _SLIDING_AND_FULL
    | {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": 16},
    "granitemoehybrid": _LINEAR_AND_FULL | {"mamba_d_head": 16},
    "kimi_linear": _LINEAR_AND_FULL,
    "longcat_flash": {"num_layers": 2, "head_dim": 8, "moe_topk": 2, "zero_expert_num": 2},
    "zamba": {"num_hidden_layers": 10, "attn_layer_period": 3, "attention_head_dim": 32},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8},
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma3n_text": _SLIDING_AND_FULL,
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
}
#: Architectures that no `DynamicCache` can be given to, and why.
NO_DYNAMIC_CACHE: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm, which is not installed; see gemma3n_text",
    "gemma4_assistant": "a draft head: reads the keys and values of the model that it assists, has none of its own",
    "gemma4_unified_assistant": "a draft head: reads the keys and values of the model that it assists",
    "minimax": "refuses every cache but its own MiniMaxCache, with `DynamicCache` too",
    "openai-gpt": "takes no cache: computes the whole sequence at every step",
    "reformer": "takes no `Cache`: buckets of its own",
    "rwkv": "takes no `Cache`: a recurrent state of its own",
    "xlm": "takes no cache: computes the whole sequence at every step",
    "xlnet": "takes no `Cache`: segments of memory of its own (`mems`)",
    "xlstm": "takes no `Cache`: a recurrent state of its own",
    "voxtral_realtime": "takes new audio at every step",
}


def inputs_for(model: PreTrainedModel, mapping: str, architecture: str) -> dict[str, Any]:
    """Arguments of `generate` but for the cache."""
    ids = torch.randint(3, VOCABULARY, (2, PROMPTS[0]), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if architecture.startswith("musicgen"):
        model.generation_config.guidance_scale = 1.0
        model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = 0
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask}
    decoder_ids = torch.randint(3, VOCABULARY, (2, PROMPTS[1]), generator=torch.Generator().manual_seed(1))
    model.generation_config.decoder_start_token_id = 1
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
