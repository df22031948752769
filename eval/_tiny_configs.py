"""Tiny random models of any architecture: default configs, shrunk field by field."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
WINDOW = 12
CHUNK = 16

#: (pattern of a field's whole name, its value), first match wins. Only numbers are replaced.
RULES: list[tuple[str, Any]] = [
    (r"(\w+_)?vocab_size(_\w+)?", VOCABULARY),
    (r"sliding_window|(\w+_)?attention_window(_size)?|local_attention|window_size", WINDOW),
    (r"attention_chunk_size", CHUNK),
    # Latents, which some models cache, keep their usual width.
    (r"kv_lora_rank", 512),
    (r"(\w+_)?[qo]_lora_rank", 16),
    (r"qk_rope_head_dim", 8),
    (r"qk_nope_head_dim|v_head_dim|qk_head_dim", 16),
    (r"(\w+_)?(head_dim|d_head|d_kv|attention_head_size|kv_channels)(_\w+)?", 16),
    (r"index_topk", 16),
    (r"rotary_dim|laurel_rank|hidden_size_per_layer_input", 16),
    (r"num_kv_shared_layers", 2),
    (
        r"sliding_window_pattern|full_attention_interval|layer_group_size|attn_layer_period|global_attn_every_n_layers",
        2,
    ),
    (r"attn_layer_offset", 1),
    (r"moe_\w*k|num_experts_per_tok|top_k_experts|\w*experts_per_tok|num_selected_experts|moe_top_k|router_top_k", 2),
    (r"\w*num_(\w+_)?experts|n_routed_experts|num_local_experts|n_experts", 4),
    (r"n_shared_experts", 1),
    (r"(\w*n_group|topk_group|num_expert_group)", 1),
    (r"(\w+_)?(num_key_value_heads|n_kv_heads|num_kv_heads|kv_heads|multi_query_group_num|kv_n_heads)", 2),
    (r"linear_num_value_heads|linear_num_key_heads", 2),
    (r"mamba_n_heads|mamba_num_heads|linear_num_heads", 8),
    (r"mamba_d_state|ssm_state_size|state_size|mamba_d_ssm", 16),
    (r"mamba_n_groups|mamba_ngroups", 1),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"mamba_chunk_size", 16),
    (r"(\w+_)?(num_attention_heads|attention_heads|num_heads|n_heads?|n_head)(_\w+)?", 4),
    (r"(\w+_)?(num_hidden_layers|n_layers?|n_layer|num_layers|num_blocks)|(num_)?(encoder|decoder)_layers", 4),
    (r"num_sparse_(encoder|decoder)_layers", 2),
    (
        r"(\w+_)?(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|ffn_size|feed_forward_proj_dim|d_inner)(_\w+)?",
        64,
    ),
    (r"(\w+_)?(hidden_size|d_model|n_embd|embedding_size|emb_dim|hidden_dim|dim_model|d_embed)(_\w+)?", 64),
    (r"blank_token_id", 5),
    (r"pad_token_id|padding_idx|pad_token_id_\w+", 0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|sep_token_id|cls_token_id|mask_token_id", 2),
]
_COMPILED = [(re.compile(pattern), value) for pattern, value in RULES]


def shrunk(
    config_class: type[PreTrainedConfig], like: PreTrainedConfig | None = None, **changes: Any
) -> dict[str, Any]:
    """Keyword arguments that make ``config_class`` tiny: its numeric defaults by `RULES`, sub-configs likewise.

    A change for a sub-config is given as a dict under its name and merged.
    """
    arguments: dict[str, Any] = {}
    default = config_class() if like is None else like
    for field in dataclasses.fields(config_class):
        if field.name in config_class.sub_configs:
            inner = getattr(default, field.name)
            if isinstance(inner, PreTrainedConfig):
                merge: Any = changes.get(field.name) if isinstance(changes.get(field.name), dict) else {}
                arguments[field.name] = {"model_type": inner.model_type} | shrunk(type(inner), inner, **merge)
            continue
        if isinstance(field.default, bool) or not isinstance(field.default, int | float | None.__class__):
            continue
        value = next((value for pattern, value in _COMPILED if pattern.fullmatch(field.name)), None)
        # Of the fields left open, only the number of KV heads may have got a value that does not follow the rest.
        grouped = field.default is None and field.name == "num_key_value_heads" and getattr(default, field.name)
        if value is not None and (field.default is not None or grouped):
            arguments[field.name] = value
    if "kv_lora_rank" in arguments and "num_key_value_heads" in arguments:  # latent attention has as many as queries
        arguments["num_key_value_heads"] = arguments["num_attention_heads"]
    own = {
        name: value
        for name, value in changes.items()
        if not (name in config_class.sub_configs and isinstance(value, dict))
    }
    return arguments | own


def tiny_model(
    architecture: str, class_name: str, mapping: str, changes: dict[str, Any], spread: float
) -> PreTrainedModel:
    """A random model in float32 and evaluation mode, the same at every call.

    Args:
        architecture: its ``model_type``.
        class_name: the model's class in transformers.
        changes: config fields that the rules get wrong.
        spread: standard deviation of all weights of two or more dimensions. Larger than usual, so that attention is
            sharp and a wrong key shows. Vectors, which are often zero or one at first, get noise on top.
    """
    model_class = getattr(transformers, class_name)
    config_class = CONFIG_MAPPING[architecture]
    if not issubclass(config_class, model_class.config_class or config_class):
        config_class = model_class.config_class  # the text part of a multimodal model
    arguments = shrunk(config_class, **changes)
    if mapping == "causal" and "is_decoder" in {field.name for field in dataclasses.fields(config_class)}:
        arguments.setdefault("is_decoder", True)
    config = _with_all_kinds(config_class, arguments)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2 and min(parameter.shape) > 1:
                parameter.normal_(0.0, spread)
            else:
                parameter.add_(0.1 * spread * torch.randn_like(parameter))
    return model


def _with_all_kinds(config_class: type[PreTrainedConfig], arguments: dict[str, Any]) -> PreTrainedConfig:
    """The config, with layers of all the kinds that the full-size one has, where they can be listed."""
    config = config_class(**arguments)
    inner, usual = config.get_text_config(decoder=True), config_class().get_text_config(decoder=True)
    kinds = sorted(set(getattr(usual, "layer_types", None) or ()))
    have = getattr(inner, "layer_types", None)
    if not have or set(kinds) <= set(have):
        return config
    listed = {"layer_types": [kinds[i % len(kinds)] for i in range(len(have))]}
    if inner is not config:
        name = next(name for name in config_class.sub_configs if getattr(config, name) is inner)
        listed = {name: arguments[name] | listed}
    try:
        return config_class(**arguments | listed)
    except Exception:
        return config
