"""What of a model's config decides which keys and values it makes: written into a file, compared at loading."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedConfig

from ..layer_types import layer_types

#: Fields of a config that are compared where a model has them. Names of files, dtypes, attention implementations and
#: versions are left out, and so is what a release of transformers may add.
_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "kv_lora_rank", "rope_parameters",
)  # fmt: skip


def fingerprint(config: PreTrainedConfig) -> dict[str, Any]:
    """Name and value of each field that counts, as plain JSON, and the kinds and windows of the layers.

    Two models of one architecture whose weights alone differ have the same: no config tells them apart.

    Args:
        config: of the decoder.
    """
    values = {name: getattr(config, name) for name in _FIELDS if getattr(config, name, None) is not None}
    if any(rope_kind(rope) in ("dynamic", "longrope", "yarn") for rope in ropes(config)):
        values["max_position_embeddings"] = getattr(config, "max_position_embeddings", None)
    values["layers"] = [[kind, kwargs.get("sliding_window")] for kind, kwargs in layer_types(config)]
    return json.loads(json.dumps(values, default=str))


def ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The parameters of a config's rotary embeddings: one for all layers, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [x for x in parameters.values() if isinstance(x, dict)] if "rope_type" not in parameters else [parameters]


def rope_kind(rope: dict[str, Any]) -> str:
    """Its type. Those that contain "dynamic" are one: transformers computes their angles anew as a text grows."""
    kind = str(rope.get("rope_type", "default"))
    return "dynamic" if "dynamic" in kind else kind


def difference(stored: dict[str, Any], mine: dict[str, Any]) -> str | None:
    """The first field in which two fingerprints differ, with both values, or None."""
    for name in (*mine, *(name for name in stored if name not in mine)):
        if stored.get(name) != mine.get(name):
            return f"{name} is {_shown(stored.get(name))} in the file and {_shown(mine.get(name))} in this config"
    return None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
