"""What models do to masks beyond causality, windows and padding."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
)

_needs_additive: dict[type, bool] = {}


def needs_additive_masks(config: PreTrainedConfig) -> bool:
    """Whether the model has attention of its own that adds the mask to the scores, so that a boolean mask, or none for
    a causal prompt, would be silently wrong. Those are the models that transformers runs neither under SDPA nor,
    through its attention interface, under flash attention; models unknown to transformers count as modern ones."""
    return _class_needs_additive_masks(type(config))


# Of the class: to torch 2.11's compiler a configuration is no constant, and so not what a constant can follow from.
@torch.compiler.assume_constant_result
def _class_needs_additive_masks(kind: type[PreTrainedConfig]) -> bool:
    if kind not in _needs_additive:
        mappings = (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
        model: Any = next((mapping[kind] for mapping in mappings if kind in mapping), None)
        model = model[0] if isinstance(model, tuple) else model
        _needs_additive[kind] = model is not None and not (
            model._supports_sdpa or (model._supports_flash_attn and model._supports_attention_backend)
        )
    return _needs_additive[kind]


def with_bias(mask: torch.Tensor | None, bias: torch.Tensor) -> torch.Tensor:
    """An additive mask: ``bias`` where ``mask`` (bool or additive, or ``None``) lets something through."""
    if mask is None:
        return bias
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else mask + bias


def with_selected_keys(mask: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """``mask`` narrowed to the keys that a sparse-attention indexer chose.

    Args:
        mask: bool or additive, ``[batch, 1, q_len, kv_len]``.
        indices: ``[batch, q_len, selected]`` positions among the keys.
    """
    batch, q_len, _ = indices.shape
    hidden = torch.ones(batch, q_len, mask.shape[-1], dtype=torch.bool, device=mask.device)
    hidden = hidden.scatter(-1, indices.long(), False)[:, None]
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def causal_rows(q_len: int, kv_len: int, device: torch.device, window: int | None = None) -> torch.Tensor:
    """Bool ``[1, 1, q_len, kv_len]``: the rows are the last ``q_len`` positions, each sees ``window`` keys at most."""
    seen = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)
    return seen if window is None else seen.triu(kv_len - q_len - window + 1)
