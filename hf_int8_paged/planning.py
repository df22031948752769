"""How long a context fits into some memory, in 16 bit and in int8, from a model's config alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .byte_sizes import bytes_as_text, parse_bytes
from .geometry import LayerGeometry, layer_geometry
from .kernels import INT8
from .options import PoolOptions, check_cache_options, checked_integer, decoder_config
from .without_cache import keeps_no_cache

#: No context is as long.
_MOST = 1 << 40


class LayersOfAKind(NamedTuple):
    """Layers of a model that hold the same.

    Attributes:
        kind: as transformers calls it, such as ``"sliding_attention"``.
        window: in tokens, or None.
        layers: how many.
        dense_bytes_per_token: keys and values of one token in all of them, as a dense cache holds them.
        int8_bytes_per_token: the same as `PagedInt8Cache` holds them.
    """

    kind: str
    window: int | None
    layers: int
    dense_bytes_per_token: int
    int8_bytes_per_token: int


class Sizes(NamedTuple):
    """Bytes of so many tokens in every sequence, in a dense cache and in an int8 one."""

    layers: tuple[LayerGeometry, ...]
    batch: int
    dtype: torch.dtype
    block_size: int
    sink_tokens: int
    format: str

    def dense(self, tokens: int) -> int:
        """Bytes of keys and values of ``batch`` sequences of so many tokens in a dense cache."""
        held = [tokens if x.window is None else min(tokens, x.window - 1) for x in self.layers]
        return self.batch * self.dtype.itemsize * sum(n * x.elements_per_token() for n, x in zip(held, self.layers))

    def int8(self, tokens: int) -> int:
        """Bytes that `PagedInt8Cache` allocates for the same, all tokens given at once."""
        return self._int8(tokens, most=False)

    def most_int8(self, tokens: int) -> int:
        """The same, however the tokens come."""
        return self._int8(tokens, most=True)

    def _int8(self, tokens: int, most: bool) -> int:
        size, last, count = self.block_size, -(-tokens // self.block_size), min(self.sink_tokens, tokens)
        total = 0
        for x in self.layers:
            blocks = last
            if x.window is not None:
                # What a prompt keeps; the steps behind it touch one block more at most.
                longest = -(-x.window // size) + 1
                blocks = min(last, longest) if most else last - max(tokens - x.window + 1, 0) // size
            rows = blocks * size * x.bytes_per_token(self.format)
            total += rows + count * x.elements_per_token() * self.dtype.itemsize
        return self.batch * total


class CrossAttention(NamedTuple):
    """Keys and values of an encoder's tokens, or of an image's, which no `PagedInt8Cache` holds.

    Attributes:
        bytes_per_token: of one token of the encoder in all sequences, in 16 bit or whatever the dense cache has.
        max_tokens: most tokens that the encoder gives, or None where the config does not say.
    """

    bytes_per_token: int
    max_tokens: int | None


class Plan(NamedTuple):
    """What fits, and what it takes.

    Attributes:
        memory: bytes for weights and cache together.
        weights: bytes of the weights.
        batch: sequences.
        dense_tokens: longest context of every sequence with a dense cache; 0 if none fits, None if any does.
        int8_tokens: the same with `PagedInt8Cache`, given the rest of the memory as ``max_bytes``.
        max_positions: longest context that the model was made for, or None where the config does not say.
        kinds: the layers that hold keys and values, by kind.
        cross_attention: what comes on top and is not counted, or None.
        dense_bytes: bytes of keys and values of ``batch`` sequences of so many tokens in a dense cache.
        int8_bytes: bytes that `PagedInt8Cache` allocates for the same, all tokens given at once.
    """

    memory: int
    weights: int
    batch: int
    dense_tokens: int | None
    int8_tokens: int | None
    max_positions: int | None
    kinds: tuple[LayersOfAKind, ...]
    cross_attention: CrossAttention | None
    dense_bytes: Callable[[int], int]
    int8_bytes: Callable[[int], int]


def plan(
    config: Any,
    memory: int | str,
    *,
    batch: int = 1,
    weights: int | str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    block_size: int = 16,
    sink_tokens: int = 1,
    format: str = INT8.name,
) -> Plan:
    """How long a context fits into ``memory``.

    Counted are keys and values of the decoder's own tokens. What belongs to ``weights`` besides them: states of
    recurrent layers, which do not grow with the context; keys and values of an encoder's tokens in cross-attention, of
    which ``cross_attention`` says how large they are; and what a forward pass needs.

    Args:
        config: of the model.
        memory: bytes, or a text such as ``"24GiB"``.
        batch: sequences.
        weights: bytes that are taken already, or such a text; ``None`` for none.
        dtype: of the dense cache, and of first tokens in full precision, or its name.
        block_size: tokens per block of the int8 cache.
        sink_tokens: its first tokens in full precision, per sequence.
        format: its storage format.

    Raises:
        TypeError, ValueError: no config, one of a model without such a cache or that says nothing of its heads, weights
            that leave nothing of the memory, or another argument that is of the wrong kind or out of range.
    """
    decoder = decoder_config(config)
    sizes = Sizes(
        _layers(config, decoder),
        _count("batch", batch, 1),
        _dtype(dtype),
        PoolOptions(block_size=block_size, format=format).checked().block_size,
        _sink_tokens(sink_tokens),
        format,
    )
    total, taken = memory_and_weights(memory, weights)
    free = total - taken
    return Plan(
        total,
        taken,
        sizes.batch,
        _longest(sizes.dense, free),
        _longest(sizes.most_int8, free),
        _positive(decoder, "max_position_embeddings") or _positive(decoder, "max_target_positions"),
        _kinds(sizes),
        _cross_attention(config, decoder, sizes),
        sizes.dense,
        sizes.int8,
    )


def memory_and_weights(memory: Any, weights: Any) -> tuple[int, int]:
    """Bytes of the memory and of the weights, which leave something of it.

    Raises:
        TypeError, ValueError: they do not, or one is no number of bytes.
    """
    total, taken = _bytes("memory", memory, 1), 0 if weights is None else _bytes("weights", weights, 0)
    if taken >= total:
        raise ValueError(
            f"weights={taken} bytes ({bytes_as_text(taken)}) leave nothing of memory={total} ({bytes_as_text(total)})"
        )
    return total, taken


def _layers(config: Any, decoder: Any) -> tuple[LayerGeometry, ...]:
    name = config.model_type
    if keeps_no_cache(config, decoder):
        but = "; with is_decoder=True it would" if getattr(decoder, "is_decoder", None) is False else ""
        raise ValueError(f"a model of the type {name!r} generates no text and keeps no keys and values{but}")
    try:
        layers = layer_geometry(decoder)
        sane = all(x.num_kv_heads > 0 and x.head_dim > 0 and x.v_head_dim > 0 for x in layers)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"the config of {name!r} does not say what keys and values its layers hold: {type(error).__name__}: {error}"
        ) from error
    if not layers or not sane:
        kind = "no layer that holds keys and values per token" if not layers else "layers with no heads, or of no width"
        raise ValueError(f"the config of {name!r} names {kind}")
    return tuple(layers)


def _cross_attention(config: Any, decoder: Any, sizes: Sizes) -> CrossAttention | None:
    """All layers of an encoder-decoder model have it beside their own attention, some of an image model instead."""
    layers = sizes.layers
    elements = sum(x.elements_per_token() for x in layers)
    if not (getattr(config, "is_encoder_decoder", False) or getattr(decoder, "add_cross_attention", False)):
        elements = layers[0].elements_per_token() * len(getattr(decoder, "cross_attention_layers", None) or ())
    if not elements:
        return None
    return CrossAttention(sizes.batch * sizes.dtype.itemsize * elements, _positive(config, "max_source_positions"))


def _positive(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _count(name: str, value: Any, least: int) -> int:
    count = checked_integer(name, value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def _bytes(name: str, value: Any, least: int) -> int:
    if value is None:
        raise TypeError(f"{name} must be a number of bytes, or a text such as '24GiB', got None")
    if isinstance(value, str):
        try:
            value = parse_bytes(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return _count(name, value, least)


def _sink_tokens(value: Any) -> int:
    options = check_cache_options(
        PoolOptions(), max_batch_size=None, max_cache_len=None, sink_tokens=value, pool_given=False
    )
    return options.sink_tokens


def _dtype(value: Any) -> torch.dtype:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        kind: type[Exception] = ValueError if isinstance(value, str) else TypeError
        raise kind(f"dtype must be a torch.dtype or its name, such as 'bfloat16', got {value!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be one of floating point, such as torch.bfloat16, got {dtype}")
    return dtype


def _longest(size: Callable[[int], int], free: int) -> int | None:
    if size(_MOST) <= free:
        return None
    low, high = 0, _MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= free else (low, middle)
    return low


def _kinds(sizes: Sizes) -> tuple[LayersOfAKind, ...]:
    alike: dict[tuple[str, int | None], list[LayerGeometry]] = {}
    for layer in sizes.layers:
        alike.setdefault((layer.kind, layer.window), []).append(layer)
    return tuple(
        LayersOfAKind(
            kind,
            window,
            len(same),
            sum(x.elements_per_token() * sizes.dtype.itemsize for x in same),
            sum(x.bytes_per_token(sizes.format) for x in same),
        )
        for (kind, window), same in alike.items()
    )
