"""A header and tensors as a cache: everything is checked before the cache is handed out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..block_allocator import HOLE
from ..hybrid import PagedInt8HybridLayer
from ..kernels import KvCacheQuant, Segment, format_called, rows_to_tiles, write_blocks
from ..layer import PagedInt8Layer
from ..sequences.first_tokens import FirstTokenPlaces
from ..sequences.growing import GrowingSequences
from ..sequences.preallocated import PreallocatedSequences
from .fields import Fields
from .header import Header, LayerHeader
from .other_layers import DTYPE_NAMES, Place, read_state
from .saving import ids_of, used_blocks
from .tensor_file import CacheFileMismatchError, TensorFile

#: Bytes that are copied into the blocks at a time, about.
_CHUNK = 16 << 20


@torch.inference_mode(False)  # the cache may be used outside it later, which inference tensors refuse
def fill(cache: Any, header: Header, file: TensorFile, place: Place) -> None:
    """Fill a new cache, which nobody has used yet, with what a file holds.

    Args:
        cache: the `PagedInt8Cache`, made of the file's options.
        header: of the file.
        file: has the tensors.
        place: the device for what was on the one of this name.

    Raises:
        CacheFileError: something in the file is damaged, or does not fit the cache's model or its pool.
        CacheFullError: the pool's limit is reached.
    """
    _check_layers(cache, header, file)
    states = []
    for index, (layer, stored) in enumerate(zip(cache.layers, header.layers)):
        if stored.state is not None:
            own = layer.linear_part if isinstance(layer, PagedInt8HybridLayer) else layer
            fields = Fields(stored.state, f"layers[{index}].state", file.error)
            states.append((own, read_state(own, fields, file, place)))
        if stored.num_kv_heads:
            _allocate(index, layer, stored, header, place, file)
    if isinstance(cache._sequences, GrowingSequences):
        _fill_growing(cache, header, file)
    else:
        _fill_preallocated(cache, header, file)
    for own, state in states:
        vars(own).update(state)


def _check_layers(cache: Any, header: Header, file: TensorFile) -> None:
    if len(header.layers) != len(cache.layers):
        raise file.error("layers", f"{len(header.layers)}, where the model has {len(cache.layers)}")
    for index, (layer, stored) in enumerate(zip(cache.layers, header.layers)):
        where, window = f"layers[{index}]", getattr(layer, "window", None)
        if stored.class_name != type(layer).__name__:
            raise file.error(f"{where}.class_name", f"{stored.class_name}, where a {type(layer).__name__} belongs")
        paged = isinstance(layer, PagedInt8Layer)
        if (stored.group is not None) != paged or (paged and header.groups[stored.group or ""].window != window):
            raise file.error(f"{where}.group", f"{stored.group}, where the model's window is {window}")
        if (stored.state is not None) != (not paged or isinstance(layer, PagedInt8HybridLayer)):
            raise file.error(f"{where}.state", "it is missing, or the layer has none")
        if stored.num_kv_heads:
            # Before memory is asked for: sizes are those of tensors that the file really has.
            rows, slots = format_called(header.options["format"]), header.options["block_size"]
            held = (header.groups[stored.group or ""].blocks, stored.num_kv_heads, slots)
            file.check(f"layers.{index}.k", rows.dtype, (*held, stored.head_dim))
            file.check(f"layers.{index}.v", rows.dtype, (*held, stored.v_head_dim))


def _allocate(index: int, layer: Any, stored: LayerHeader, header: Header, place: Place, file: TensorFile) -> None:
    dtype = DTYPE_NAMES[stored.first_tokens or stored.dtypes[0]]
    batch, device = max(header.batch_size, 1), place(stored.device)
    keys = torch.empty(batch, stored.num_kv_heads, 0, stored.head_dim, dtype=dtype, device=device)
    try:
        layer.room.allocate(keys, keys.new_empty(batch, stored.num_kv_heads, 0, stored.v_head_dim))
    except (NotImplementedError, ValueError) as error:  # the pool has others' heads, or no backend serves these
        raise file.mismatch(f"layers[{index}]", str(error)) from error
    layer.room.dtypes = DTYPE_NAMES[stored.dtypes[0]], DTYPE_NAMES[stored.dtypes[1]]


def _fill_growing(cache: Any, header: Header, file: TensorFile) -> None:
    sequences: GrowingSequences = cache._sequences
    pool, length = sequences.pool, header.length
    ids = {name: _table(name, header, file) for name in header.groups}
    if set(ids) != set(sequences.groups):
        raise file.error("groups", f"{', '.join(ids)}, where the model has {', '.join(sequences.groups)}")
    places = None
    if header.first_tokens:
        places = FirstTokenPlaces(_places("first_tokens", header, file).numpy())
    stored_layers = [x for x in zip(cache.layers, header.layers) if x[1].num_kv_heads]
    # All is read and checked before the pool changes.
    contents = []
    for layer, stored in stored_layers:
        room = layer.room
        kept = None
        if stored.first_tokens is not None:
            table = None if places is None else places.table
            kept = _kept(room.index, stored, file, table, room.shape.device)
        blocks = header.groups[stored.group or ""].blocks
        contents.append((_center(room.index, stored, file), _contents(room, blocks, file), kept))
    for (layer, _), (center, _, _) in zip(stored_layers, contents):
        room, group = layer.room, layer.room.group
        takes = pool.takes_center(room.index, center, lambda g=group: g.holds_the_pool)  # type: ignore[misc]
        if (length or center is not None) and not takes:
            raise _centred_otherwise(room.index, file)
    kept_bytes = sum(x.nbytes for _, _, kept in contents if kept is not None for x in kept)
    taken = _take_over(sequences, header, ids, places, kept_bytes)
    for (layer, _), (_, _, kept) in zip(stored_layers, contents):
        if kept is not None:
            layer.room.kept_rows = kept
    for (layer, _), (center, tensors, _) in zip(stored_layers, contents):
        room, group = layer.room, layer.room.group
        if (length or center is not None) and not pool.adopt_center(
            room.index,
            center,
            lambda g=group: g.holds_the_pool,  # type: ignore[misc]
        ):
            raise _centred_otherwise(room.index, file)
        _write(room, torch.from_numpy(taken[group.name].astype(np.int64)), tensors)


def _centred_otherwise(index: int, file: TensorFile) -> CacheFileMismatchError:
    return file.mismatch(
        f"layers.{index}.key_center",
        "the pool holds tokens of another cache, whose keys were centred otherwise; load it into a pool of its own, or "
        "make both with center_keys=False",
    )


def _take_over(
    sequences: GrowingSequences,
    header: Header,
    ids: dict[str, np.ndarray],
    places: FirstTokenPlaces | None,
    kept_bytes: int,
) -> dict[str, np.ndarray]:
    """Make the sequences those of the file, in blocks of their pool whose contents are to be written next.

    Args:
        sequences: without tokens.
        header: of the file.
        ids: of each group, the block table, int32 ``[batch, columns]``, with places in the file for blocks.
        places: of the first tokens.
        kept_bytes: of the first tokens, which the layers are about to keep.

    Returns:
        By group the block for each place, int32 ``[places]``.
    """
    state, pool, taken, tables = sequences.books.state, sequences.pool, {}, {}
    counts = {name: group.blocks for name, group in header.groups.items()}
    with pool.access.exclusive():
        pool.ensure_free(counts, kept_bytes)
        for name, numbers in ids.items():
            allocator, stored = pool.allocators[name], header.groups[name]
            taken[name] = blocks = allocator.allocate(counts[name]).astype(np.int32)
            own = np.full(numbers.shape, HOLE, dtype=np.int32)
            own[numbers != HOLE] = blocks[numbers[numbers != HOLE]]
            allocator.retain(blocks.repeat(np.bincount(numbers[numbers != HOLE], minlength=len(blocks)) - 1))
            seen = stored.dropped_columns, stored.skipped_columns
            tables[name] = state.tables[name].filled(own, header.length, seen)
        sequences.books.state = state._replace(
            tables=tables,
            layer_lengths=dict.fromkeys(state.layer_lengths, header.length),
            length=header.length,
            batch_size=header.batch_size or None,
            step_start=header.length,
            from_blocks=True,
            first_tokens=places,
            record_past=header.record_past,
        )
    return taken


def _fill_preallocated(cache: Any, header: Header, file: TensorFile) -> None:
    sequences: PreallocatedSequences = cache._sequences
    batch, length = header.batch_size, header.length
    for index, (layer, stored) in enumerate(zip(cache.layers, header.layers)):
        if not stored.num_kv_heads:
            continue
        room = layer.room
        blocks = header.groups[stored.group or ""].blocks
        if blocks != batch * used_blocks(room, length):
            raise file.error(f"groups.{stored.group}.blocks", f"{blocks} for {batch} sequences of {length} tokens")
        _write(room, ids_of(room, batch, length), _contents(room, blocks, file))
        center, fixed = _center(index, stored, file), room.memory.first_tokens
        if center is not None:
            room.storage.key_center.copy_(center)
        if stored.first_tokens is not None:
            places = _places(f"layers.{index}.first_tokens", header, file)
            kept = _kept(index, stored, file, places.numpy(), room.storage.device)
            if kept[0].shape[0] != batch or kept[0].shape[2] != header.options["sink_tokens"]:
                raise file.error(f"layers.{index}.first_keys", f"{list(kept[0].shape)} for {batch} sequences")
            fixed.places[:, :batch] = places.to(fixed.places.device)
            for held, new in zip(fixed.rows, kept):
                held[:batch] = new
        if length:
            room.wrote(length, room.dtypes)
            room.first_held = stored.first_held
    sequences.take_over(length, batch or None)
    sequences.record_past = header.record_past


def _table(name: str, header: Header, file: TensorFile) -> np.ndarray:
    """A group's block table, which names every block of the file and no other."""
    group = header.groups[name]
    ids = file.read(f"tables.{name}", torch.int32, (header.batch_size, group.columns)).numpy()
    found = np.unique(ids[ids != HOLE])
    if len(found) != group.blocks or (len(found) and (found[0] != 0 or found[-1] != group.blocks - 1)):
        raise file.error(f"tables.{name}", f"it names {len(found)} blocks, where the file has {group.blocks}")
    visible = 0 if group.window is None else max(header.length - group.window + 1, 0)
    unseen = max(group.dropped_columns, group.skipped_columns[1] if group.skipped_columns[0] == 0 else 0)
    if unseen * header.options["block_size"] > visible and header.length:
        raise file.error(f"groups.{name}.dropped_columns", f"{unseen} columns, of which some are visible")
    return ids


def _places(name: str, header: Header, file: TensorFile) -> torch.Tensor:
    """Row, first and stop of each sequence's first tokens, int32 ``[3, batch]``."""
    places = file.read(name, torch.int32, (3, header.batch_size))
    row, first, stop = places
    if len(row) and (int(places.min()) < 0 or int(stop.max()) > header.length or int(first.max()) > header.length):
        raise file.error(name, f"a place is outside of the {header.length} tokens")
    return places.clone()


def _kept(
    index: int, stored: LayerHeader, file: TensorFile, places: np.ndarray | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's rows of first tokens, which are there for every place."""
    if places is None or stored.first_tokens is None:
        raise file.error(f"layers[{index}].first_tokens", "there are rows, but no places of them")
    name, dtype = f"layers.{index}.first_keys", DTYPE_NAMES[stored.first_tokens]
    keys = file.read(name, dtype, (None, stored.num_kv_heads, None, stored.head_dim))
    rows, _, count, _ = keys.shape
    values = file.read(f"layers.{index}.first_values", dtype, (rows, stored.num_kv_heads, count, stored.v_head_dim))
    row, first, stop = places
    if row.max(initial=-1) >= rows or (stop - first).max(initial=0) > count or not dtype.is_floating_point:
        raise file.error(name, f"{dtype} {list(keys.shape)}, where a place asks for more")
    return keys.to(device, copy=True), values.to(device, copy=True)


def _center(index: int, stored: LayerHeader, file: TensorFile) -> torch.Tensor | None:
    if not stored.centred:
        return None
    return file.read(f"layers.{index}.key_center", torch.float32, (stored.num_kv_heads, stored.head_dim))


def _contents(room: Any, blocks: int, file: TensorFile) -> list[torch.Tensor]:
    """A layer's blocks in the file: the tensors of a `Segment`, blocks first, rows in the order of tokens."""
    tensors, storage = [], room.for_reading[room.index]
    for name, x in zip(Segment._fields, storage.segments[0]):
        shape = (blocks, storage.num_kv_heads, *x.shape[2:])
        rows = file.read(f"layers.{room.index}.{name}", x.dtype, shape)
        if rows.dtype == torch.int8 and bool((rows == -128).any()):
            raise file.error(f"layers.{room.index}.{name}", "-128 is no stored element")
        tensors.append(rows)
    return tensors


def _write(room: Any, ids: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy a layer's blocks into those of these ids, a few at a time, in the order of the storage's tiles."""
    per_block = sum(x[:1].nbytes for x in tensors) or _CHUNK
    count = max(_CHUNK // per_block, 1)
    for start in range(0, len(ids), count):
        # Asked anew each time: another cache may let the pool grow meanwhile, which replaces the object.
        with room.writer:
            storage: KvCacheQuant = room.storage
            parts = []
            for name, rows in zip(Segment._fields, tensors):
                part = rows[start : start + count].transpose(0, 1)
                tiles = rows_to_tiles(part, storage.tile_order, values=name == "v") if name in ("k", "v") else part
                parts.append(tiles.to(storage.device))
            write_blocks(storage, ids[start : start + count].to(storage.device), Segment(*parts))
