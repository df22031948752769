"""How long a context fits into some memory, in 16 bit and in int8, from a model's config alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .geometry import LayerGeometry, layer_geometry
from .kernels import INT8
from .options import checked_bytes, decoder_config

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
    dense_bytes: Callable[[int], int]
    int8_bytes: Callable[[int], int]


def plan(
    config: Any,
    memory: int | str,
    *,
    batch: int = 1,
    weights: int | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 16,
    sink_tokens: int = 1,
    format: str = INT8.name,
) -> Plan:
    """How long a context fits into ``memory``.

    Counted are keys and values. States of recurrent layers, which do not grow with the context, and what a forward pass
    needs besides belong to ``weights``.

    Args:
        config: of the model.
        memory: bytes, or a text such as ``"24GiB"``.
        batch: sequences.
        weights: bytes that are taken already, or such a text; ``None`` for none.
        dtype: of the dense cache, and of first tokens in full precision.
        block_size: tokens per block of the int8 cache.
        sink_tokens: its first tokens in full precision, per sequence.
        format: its storage format.

    Raises:
        TypeError, ValueError: no config, no numbers of bytes, or a config that says nothing of its heads.
    """
    layers = layer_geometry(decoder_config(config))
    if not layers:
        raise ValueError(f"the config of {config.model_type!r} names no layer that holds keys and values per token")
    total, taken = checked_bytes("memory", memory), checked_bytes("weights", weights) or 0
    if total is None or batch < 1:
        raise ValueError(f"memory must be a number of bytes and batch at least 1, got {memory!r} and {batch!r}")

    def dense_bytes(tokens: int) -> int:
        held = [tokens if x.window is None else min(tokens, x.window - 1) for x in layers]
        return batch * dtype.itemsize * sum(n * x.elements_per_token() for n, x in zip(held, layers))

    def int8_bytes(tokens: int, most: bool = False) -> int:
        last, count = -(-tokens // block_size), min(sink_tokens, tokens)
        total = 0
        for x in layers:
            blocks = last
            if x.window is not None:
                # What a prompt keeps; the steps behind it touch one block more at most.
                longest = -(-x.window // block_size) + 1
                blocks = min(last, longest) if most else last - max(tokens - x.window + 1, 0) // block_size
            total += blocks * block_size * x.bytes_per_token(format) + count * x.elements_per_token() * dtype.itemsize
        return batch * total

    free = total - taken
    positions = getattr(decoder_config(config), "max_position_embeddings", None)
    return Plan(
        total,
        taken,
        batch,
        _longest(dense_bytes, free),
        _longest(lambda tokens: int8_bytes(tokens, most=True), free),
        positions if isinstance(positions, int) and positions > 0 else None,
        _kinds(layers, dtype, format),
        dense_bytes,
        int8_bytes,
    )


def _longest(size: Callable[[int], int], free: int) -> int | None:
    if size(_MOST) <= free:
        return None
    low, high = 0, _MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= free else (low, middle)
    return low


def _kinds(layers: list[LayerGeometry], dtype: torch.dtype, format: str) -> tuple[LayersOfAKind, ...]:
    alike: dict[tuple[str, int | None], list[LayerGeometry]] = {}
    for layer in layers:
        alike.setdefault((layer.kind, layer.window), []).append(layer)
    return tuple(
        LayersOfAKind(
            kind,
            window,
            len(same),
            sum(x.elements_per_token() * dtype.itemsize for x in same),
            sum(x.bytes_per_token(format) for x in same),
        )
        for (kind, window), same in alike.items()
    )
