"""A cache as a header and tensors.

Blocks in use are written once each, whoever shares them, and row by row, so that any backend can take them:
``layers.I.k`` is ``[blocks, num_kv_heads, block_size, head_dim]``, and scales likewise. Block tables name blocks by
their place in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..block_allocator import HOLE
from ..hybrid import PagedInt8HybridLayer
from ..kernels import KvCacheQuant, in_segments, tiles_to_rows
from ..layer import PagedInt8Layer
from ..layer_checks import check_none_left_out
from ..sequences.group import group_name
from ..sequences.growing import GrowingSequences
from ..sequences.preallocated import PreallocatedSequences
from ..sequences.preallocated_room import PreallocatedRoom
from .header import GROWING, PREALLOCATED, GroupHeader, Header, LayerHeader
from .other_layers import state_as_json
from .tensor_file import Stored

#: Bytes that are copied out of the blocks at a time, about.
_CHUNK = 16 << 20


def as_tensors(cache: Any, model: dict[str, Any] | None, version: str) -> tuple[Header, dict[str, Stored]]:
    """The header and the tensors of a cache, which must not change before they are written.

    Args:
        cache: the `PagedInt8Cache`.
        model: fingerprint of its config, or None.
        version: of the library.

    Raises:
        ValueError: the last forward pass was interrupted.
    """
    sequences = cache._sequences
    tensors: dict[str, Stored] = {}
    if isinstance(sequences, GrowingSequences):
        header = _growing(sequences, model, version, tensors)
    else:
        header = _preallocated(sequences, model, version, tensors)
    for index, layer in enumerate(cache.layers):
        header.layers.append(_layer(index, layer, sequences, header, tensors))
    return header, tensors


def blocks_of(sequences: GrowingSequences, group: str) -> np.ndarray:
    """The blocks of a group in use, each once, in the order of the sequences, int64 ``[blocks]``."""
    held = sequences.books.state.tables[group].held()
    blocks, first = np.unique(held, return_index=True)
    return blocks[first.argsort()].astype(np.int64)


def _growing(
    sequences: GrowingSequences, model: dict[str, Any] | None, version: str, tensors: dict[str, Stored]
) -> Header:
    state, pool = sequences.books.state, sequences.pool
    left_out = [index for index, length in state.layer_lengths.items() if length != state.length]
    check_none_left_out(len(state.layer_lengths), left_out, state.step_start, state.length)
    groups = {}
    for name, group in sequences.groups.items():
        table, blocks = state.tables[name], blocks_of(sequences, name)
        place = np.full(max(table.allocator.num_blocks, 1), HOLE, dtype=np.int32)
        place[blocks] = np.arange(len(blocks), dtype=np.int32)
        ids = np.where(table.ids == HOLE, np.int32(HOLE), place[table.ids])
        groups[name] = GroupHeader(group.window, len(blocks), ids.shape[1], *table.seen_columns)
        tensors[f"tables.{name}"] = Stored.of(torch.from_numpy(np.ascontiguousarray(ids)))
    if state.first_tokens is not None:
        tensors["first_tokens"] = Stored.of(torch.from_numpy(state.first_tokens.table.copy()))
    options = {
        "block_size": pool.block_size,
        "rotation": pool.rotation,
        "center_keys": pool.center_keys,
        "format": pool.format,
        "sink_tokens": sequences.sink_tokens,
        "max_batch_size": None,
        "max_cache_len": sequences.max_cache_len,
        "max_tokens": pool.max_tokens,
    }
    return Header(
        GROWING, model, options, state.length, state.batch_size or 0, state.record_past,
        state.first_tokens is not None, groups, [], version,
    )  # fmt: skip


def _preallocated(
    sequences: PreallocatedSequences, model: dict[str, Any] | None, version: str, tensors: dict[str, Stored]
) -> Header:
    length, options = sequences.length, sequences.options
    left_out = [room.index for room in sequences.rooms if room.counted != length]
    check_none_left_out(len(sequences.rooms), left_out, sequences.step_start, length)
    batch = sequences.batch_size or 0
    groups = {}
    for room in sequences.rooms:
        count = batch * used_blocks(room, length)
        groups[group_name(room.window)] = GroupHeader(room.window, count, -(-length // options.block_size))
    return Header(
        PREALLOCATED,
        model,
        {
            "block_size": options.block_size,
            "rotation": options.rotation,
            "center_keys": options.center_keys,
            "format": options.format,
            "sink_tokens": sequences.sink_tokens,
            "max_batch_size": sequences.max_batch_size,
            "max_cache_len": sequences.max_cache_len,
            "max_tokens": None,
        },
        length,
        batch,
        sequences.record_past,
        bool(sequences.sink_tokens and length),
        groups,
        [],
        version,
    )


def used_blocks(room: PreallocatedRoom, length: int) -> int:
    """Blocks of each sequence that hold tokens in a preallocated layer; of a ring they are the first ones or all."""
    return 0 if room.memory is None else min(room.memory.blocks, -(-length // room.sequences.options.block_size))


def ids_of(room: PreallocatedRoom, batch: int, length: int) -> torch.Tensor:
    """Ids of those blocks, sequence by sequence, int64 ``[batch * blocks]``."""
    first = torch.arange(batch, device="cpu")[:, None] * room.allocated.blocks
    return (first + torch.arange(used_blocks(room, length), device="cpu")).reshape(-1)


def _layer(index: int, layer: Any, sequences: Any, header: Header, tensors: dict[str, Stored]) -> LayerHeader:
    name = f"layers.{index}"
    state = None
    if isinstance(layer, PagedInt8HybridLayer) or not isinstance(layer, PagedInt8Layer):
        state = state_as_json(getattr(layer, "linear_part", layer), f"{name}.state", tensors)
    if not isinstance(layer, PagedInt8Layer):
        return LayerHeader(type(layer).__name__, state=state)
    room: Any = layer.room
    group = group_name(layer.window)
    if room.shape is None:
        return LayerHeader(type(layer).__name__, group, state=state)
    storage, length = room.for_reading[index], header.length
    if isinstance(sequences, GrowingSequences):
        blocks = blocks_of(sequences, group)
        table = sequences.books.state.tables[group]
        ids, last = torch.from_numpy(blocks), torch.from_numpy(np.isin(blocks, table.ids[:, -1:]))
        centred = storage.key_center is not None and not sequences.pool.lacks_center(index)
        kept = room.kept_rows if length else None
    else:
        ids = ids_of(room, header.batch_size, length)
        last = torch.zeros(len(ids), dtype=torch.bool, device="cpu")
        if length <= room.allocated.capacity:
            last = ids % room.allocated.blocks == used_blocks(room, length) - 1
        centred = storage.key_center is not None
        fixed = room.allocated.first_tokens if length else None
        kept = None if fixed is None else (*(x[: header.batch_size] for x in fixed.rows),)
        if fixed is not None:
            tensors[f"{name}.first_tokens"] = Stored.of(fixed.places[:, : header.batch_size].contiguous())
    # Slots behind the newest token hold whatever was in memory before: no business of a file.
    blank = ids[last] if length % storage.block_size else ids[:0]
    for field, shape in _shapes(storage, len(ids)).items():
        dtype = getattr(storage, field).dtype
        tensors[f"{name}.{field}"] = Stored(dtype, shape, lambda f=field: _chunks(room, ids, f, blank, length))  # type: ignore[misc]
    if centred:
        tensors[f"{name}.key_center"] = Stored.of(storage.key_center)
    if kept is not None:
        tensors[f"{name}.first_keys"], tensors[f"{name}.first_values"] = (Stored.of(x) for x in kept)
    heads, head_dim, v_head_dim, device = room.shape
    return LayerHeader(
        type(layer).__name__, group, heads, head_dim, v_head_dim, str(device),
        (_name(room.dtypes[0]), _name(room.dtypes[1])), centred, None if kept is None else _name(kept[0].dtype),
        getattr(room, "first_held", 0), state,
    )  # fmt: skip


def _shapes(storage: KvCacheQuant, blocks: int) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of ``blocks`` blocks in a file."""
    heads = storage.num_kv_heads
    return {name: (blocks, heads, *x.shape[2:]) for name, x in storage.segments[0]._asdict().items()}


def _chunks(room: Any, ids: torch.Tensor, field: str, blank: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    """Blocks ``ids`` of one of a layer's tensors, row by row, a few at a time, each ``[some, num_kv_heads, ...]``;
    those in ``blank`` with zeros behind the slot of position ``length``."""
    device, x = room.shape.device, getattr(room.for_reading[room.index], field)
    per_block = x[:, :1].numel() * x.element_size() or _CHUNK
    blank = blank.to(device)
    for some in ids.to(device).split(max(_CHUNK // per_block, 1)):
        # Asked anew each time: the layer may have left meanwhile, or grown.
        storage: KvCacheQuant = room.for_reading[room.index]
        x = getattr(storage, field)
        tiles = x.new_empty((x.shape[0], len(some), *x.shape[2:]))
        for segment, here, blocks in in_segments(storage, some):
            tiles[:, here] = getattr(segment, field)[:, blocks]
        rows = tiles_to_rows(tiles, storage.tile_order, values=field == "v") if field in ("k", "v") else tiles
        rows = rows.transpose(0, 1).contiguous()
        rows[torch.isin(some, blank), :, length % storage.block_size :] = 0
        yield rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
