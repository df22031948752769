"""What a cache holds, as a record that shows itself as a small table, in a terminal and in a notebook."""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple

from .byte_sizes import bytes_as_text
from .layer import PagedInt8Layer
from .offloading.storages import WhereLayersAre
from .sequences.group import group_name
from .sequences.growing import GrowingSequences


class GroupDescription(NamedTuple):
    """The layers of a cache with one window.

    Attributes:
        name: of the group, such as ``"full_attention"``.
        layers: how many.
        blocks_used: that hold tokens of this cache, each counted once.
        blocks_shared: of them, those that more than one sequence holds, of this cache or of another one.
        blocks_free: of the pool, that nobody holds.
    """

    name: str
    layers: int
    blocks_used: int
    blocks_shared: int
    blocks_free: int


class Description(NamedTuple):
    """A cache at one moment.

    Attributes:
        sequences: how many hold tokens.
        tokens: of each sequence, padding included.
        groups: the layers that hold keys and values, by window.
        other_layers: layers that are transformers' own.
        bytes_used: of blocks that hold tokens in the pool, and of first tokens.
        bytes_allocated: of all blocks, and of first tokens.
        bytes_dense: of the same tokens in a dense cache of the model's dtype.
        max_bytes: the limit, or None.
        backends: names of those that serve the layers.
        format: of stored rows.
        options: rotation, centring and first tokens, as text.
        preallocated: whether all memory is taken at the first use.
        offloaded: where the layers are that leave their device; None if all stay.
    """

    sequences: int
    tokens: int
    groups: tuple[GroupDescription, ...]
    other_layers: int
    bytes_used: int
    bytes_allocated: int
    bytes_dense: int
    max_bytes: int | None
    backends: tuple[str, ...]
    format: str
    options: str
    preallocated: bool
    offloaded: WhereLayersAre | None

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each line of the table."""
        allocated = bytes_as_text(self.bytes_allocated)
        allocated += "" if self.max_bytes is None else f" of at most {bytes_as_text(self.max_bytes)}"
        dense = bytes_as_text(self.bytes_dense)
        if self.bytes_dense:
            dense += f" (in use: {self.bytes_used / self.bytes_dense:.1%} of it)"
        found = [
            ("sequences", f"{self.sequences} of {self.tokens:,} tokens"),
            *(
                (
                    f"{group.layers} x {group.name}",
                    f"{group.blocks_used:,} blocks, {group.blocks_shared:,} shared; {group.blocks_free:,} free",
                )
                for group in self.groups
            ),
            ("bytes in use", bytes_as_text(self.bytes_used)),
            ("allocated", allocated),
            ("dense cache", dense),
            ("stored as", f"{self.format}, {self.options}"),
            ("backend", ", ".join(self.backends) or "not chosen yet"),
        ]
        if self.offloaded is not None:
            layers, near, bytes_near, bytes_far, place = self.offloaded
            sizes = f", {near} near: {bytes_as_text(bytes_near)} near, {bytes_as_text(bytes_far)} {place}"
            found.insert(-3, ("offloaded", f"{layers} layers of the pool{sizes if layers else ''}"))
        if self.other_layers:
            found.insert(1 + len(self.groups), ("other layers", f"{self.other_layers}, transformers' own"))
        return found

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join([self._title, *(f"  {name:<{width}}  {value}" for name, value in rows)])

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
            for name, value in self.rows()
        )
        return f"<table><caption>{self._title}</caption>{cells}</table>"

    @property
    def _title(self) -> str:
        return "PagedInt8Cache, preallocated" if self.preallocated else "PagedInt8Cache"


def description_of(cache: Any) -> Description:
    """What a cache holds now. Of a preallocated one it waits for the device after compiled steps."""
    sequences, layers = cache._sequences, [x for x in cache.layers if isinstance(x, PagedInt8Layer)]
    growing = isinstance(sequences, GrowingSequences)
    options: Any = sequences.pool if growing else sequences.options
    batch, tokens = cache._batch or 0, sequences.length
    dense = 0
    for layer in layers:
        room = layer.room
        if room.shape is not None:
            held = tokens if layer.window is None else min(tokens, layer.window - 1)
            widths = room.shape.head_dim * room.dtypes[0].itemsize + room.shape.v_head_dim * room.dtypes[1].itemsize
            dense += batch * held * room.shape.num_kv_heads * widths
    conditioning = [
        f"rotation {options.rotation}",
        f"centred keys {'on' if options.center_keys else 'off'}",
        f"first tokens {sequences.sink_tokens}",
    ]
    return Description(
        sequences=batch,
        tokens=tokens,
        groups=_growing_groups(sequences) if growing else _preallocated_groups(layers, batch),
        other_layers=len(cache.layers) - len(layers),
        bytes_used=cache.nbytes_used,
        bytes_allocated=cache.nbytes_allocated,
        bytes_dense=dense,
        max_bytes=options.max_bytes,
        backends=tuple(sorted({layer.room.backend.NAME for layer in layers if layer.is_initialized})),
        format=options.format,
        options=", ".join(conditioning),
        preallocated=not growing,
        offloaded=None if sequences.offloaded is None else sequences.offloaded.where(),
    )


def _growing_groups(sequences: GrowingSequences) -> tuple[GroupDescription, ...]:
    found = []
    for name, group in sequences.groups.items():
        blocks, allocator = set(group.table.held().tolist()), group.table.allocator
        shared = sum(allocator.ref_count(block) > 1 for block in blocks)
        found.append(GroupDescription(name, group.num_layers, len(blocks), shared, allocator.num_free))
    return tuple(found)


def _preallocated_groups(layers: list[Any], batch: int) -> tuple[GroupDescription, ...]:
    by_window: dict[int | None, list[Any]] = {}
    for layer in layers:
        by_window.setdefault(layer.window, []).append(layer)
    found = []
    for window, same in by_window.items():
        name, memory = group_name(window), same[0].room.memory
        blocks = 0 if memory is None else min(memory.blocks, -(-same[0].length // memory.storage.block_size)) * batch
        free = 0 if memory is None else memory.storage.num_blocks - blocks
        found.append(GroupDescription(name, len(same), blocks, 0, free))
    return tuple(found)
