"""What a config alone says of the keys and values that a model's layers will hold."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from .kernels import format_called
from .layer_types import layer_types

#: Kinds of layers that hold keys and values per token.
_WITH_KEYS = ("full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding")


class LayerGeometry(NamedTuple):
    """One layer that holds keys and values.

    Attributes:
        layer: its index in the model.
        kind: as transformers calls it, such as ``"sliding_attention"``.
        window: in tokens, or None.
        num_kv_heads: heads of keys and of values.
        head_dim: width of a key row.
        v_head_dim: width of a value row.
    """

    layer: int
    kind: str
    window: int | None
    num_kv_heads: int
    head_dim: int
    v_head_dim: int

    def bytes_per_token(self, format: str) -> int:
        """Stored rows and scales of one token."""
        return format_called(format).bytes_per_token(self.num_kv_heads, self.head_dim, self.v_head_dim)

    def elements_per_token(self) -> int:
        """Of keys and values, as a cache holds them that does not quantize."""
        return self.num_kv_heads * (self.head_dim + self.v_head_dim)


def layer_geometry(config: PreTrainedConfig) -> list[LayerGeometry]:
    """The layers of a decoder's config that hold keys and values, in order.

    Sizes are read from the names that configs use, so a model that computes its own may hold something else: the cache
    takes the sizes of the first keys that come, whatever is said here.

    Args:
        config: of the decoder.

    Returns:
        One for each; none of the layers whose heads the config says nothing of.
    """
    found = []
    elsewhere = getattr(config, "cross_attention_layers", None) or ()
    kinds = layer_types(config)
    for index, (kind, kwargs) in enumerate(kinds):
        if kind in _WITH_KEYS and index not in elsewhere:
            heads = _heads(config, index, kind)
            if heads is not None:
                found.append(LayerGeometry(index, kind, kwargs.get("sliding_window"), *heads))
    return found


def _heads(config: Any, index: int, kind: str) -> tuple[int, int, int] | None:
    """KV heads, width of a key row and of a value row."""
    # A release of transformers with sizes of single layers hands out a config for each.
    of_layer = getattr(config, "per_layer_config", None)
    config = of_layer[index] if of_layer else config
    query_heads = _first(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    query_heads = _of_layer(query_heads, index)
    width = _first(config, "hidden_size", "n_embd", "d_model")
    dim = _of_layer(_first(config, "head_dim", "d_kv", "kv_channels", "dim_head"), index)
    if query_heads is None or (dim is None and width is None):
        return None
    dim = width // query_heads if dim is None else dim
    heads = _of_layer(_first(config, "num_key_value_heads", "num_kv_heads", "n_head_kv"), index) or query_heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        heads = 1
    if getattr(config, "kv_lora_rank", None) and getattr(config, "qk_rope_head_dim", None):
        return (
            1,
            config.kv_lora_rank,
            config.qk_rope_head_dim,
        )  # what such models cache is a latent, and keys' positions
    if kind != "sliding_attention" and getattr(config, "global_head_dim", None):
        dim = config.global_head_dim
        heads = getattr(config, "num_global_key_value_heads", None) or heads
    v_dim = getattr(config, "v_head_dim", None)
    return heads, dim, dim if v_dim is None else v_dim


def _first(config: Any, *names: str) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def _of_layer(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, list | tuple) else value
