"""Where the quantized keys and values of one attention layer live.

The memory layout is defined here and nowhere else. DESIGN.md section 2 gives the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .formats import INT8, format_called
from .notes import Notes

#: How the tile of one (block, head) is ordered in memory. Shapes are the same for all.
#:
#: ``row_major``
#:     K ``[block_size, head_dim]``, V ``[block_size, v_head_dim]``.
#: ``v_transposed``
#:     K as ``row_major``; V ``[v_head_dim, block_size]``, so that both products of attention find
#:     the axis they sum over contiguous.
#: ``dot4``
#:     K ``[head_dim / 4, block_size, 4]``, V ``[block_size / 4, v_head_dim, 4]``: four consecutive
#:     elements of the axis that is summed over lie together, as VNNI and SDOT instructions read them.
TILE_ORDERS = ("row_major", "v_transposed", "dot4")
#: Makes uninitialised memory of a shape and a dtype, for a layer on a device: what a `Backend` does of its own accord.
Empty = Callable[[tuple[int, ...], torch.dtype, torch.device], torch.Tensor]


class Segment(NamedTuple):
    """Blocks that lie together in memory; see `KvCacheQuant`."""

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor

    @property
    def num_blocks(self) -> int:
        return self.k.shape[1]


@dataclass(eq=False, frozen=True)
class KvCacheQuant:
    """Paged quantized keys and values of one attention layer, with one scale per token and head.

    A storage that has grown consists of several segments (`grow_paged_int8_layer`), whose blocks are numbered one
    after the other. The four tensors are those of the first one; `segments` has all.

    Kernels write to the tensors and keep their addresses: the fields cannot be replaced.

    Args:
        k: ``[num_kv_heads, num_blocks, block_size, head_dim]`` of the format's dtype; int8 in [-127, 127].
        v: ``[num_kv_heads, num_blocks, block_size, v_head_dim]``, likewise.
        k_scales: ``[num_kv_heads, num_blocks, block_size]`` of the format's scale dtype, float16 for int8; there a key
            row is ``k_scales * k``. NaN marks a row that held NaN or infinity.
        v_scales: same shape and dtype, for the values.
        backend: name of the backend that reads and writes the tiles.
        tile_order: one of ``TILE_ORDERS``: the order of the stored elements inside a tile.
        rotation: ``"hadamard"`` when rows were rotated before quantization, or ``None``.
        key_center: float32 ``[num_kv_heads, head_dim]`` subtracted from every key before rotation and
            quantization, or ``None``. Must not change while the blocks hold tokens.
        format: name of the rows' format (`formats`).
        more: the segments after the first, whose tensors differ from the first's in ``num_blocks`` only.
        empty: what makes the memory, also when the storage grows; ``None`` for the backend.
    """

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor
    backend: str = "reference"
    tile_order: str = "row_major"
    rotation: str | None = None
    key_center: torch.Tensor | None = None
    format: str = INT8.name
    more: tuple[Segment, ...] = ()
    empty: Empty | None = field(default=None, repr=False)
    notes: Notes = field(default_factory=Notes, init=False, repr=False)

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[0]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, in the order of their blocks' ids."""
        return Segment(self.k, self.v, self.k_scales, self.v_scales), *self.more

    @property
    def num_blocks(self) -> int:
        """Blocks of all segments."""
        return self.k.shape[1] + sum(segment.num_blocks for segment in self.more)

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]

    @property
    def v_head_dim(self) -> int:
        return self.v.shape[3]

    @property
    def device(self) -> torch.device:
        return self.k.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in this layer: stored rows and scales, all heads."""
        return format_called(self.format).bytes_per_token(self.num_kv_heads, self.head_dim, self.v_head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all blocks of this layer."""
        return self.num_blocks * self.block_size * self.bytes_per_token


def tiles_to_rows(tiles: torch.Tensor, tile_order: str, *, values: bool) -> torch.Tensor:
    """Undo the tile order: ``[..., block_size, dim]`` as stored -> ``[..., block_size, dim]`` of token rows."""
    *lead, block_size, dim = tiles.shape
    if tile_order == "dot4" and values:
        return tiles.reshape(*lead, block_size // 4, dim, 4).transpose(-1, -2).reshape(tiles.shape)
    if tile_order == "dot4":
        return tiles.reshape(*lead, dim // 4, block_size, 4).transpose(-2, -3).reshape(tiles.shape)
    if tile_order == "v_transposed" and values:
        return tiles.reshape(*lead, dim, block_size).transpose(-1, -2)
    return tiles


def rows_to_tiles(rows: torch.Tensor, tile_order: str, *, values: bool) -> torch.Tensor:
    """Undo `tiles_to_rows`: ``[..., block_size, dim]`` of token rows -> ``[..., block_size, dim]`` as stored."""
    *lead, block_size, dim = rows.shape
    if tile_order == "dot4" and values:
        return rows.reshape(*lead, block_size // 4, 4, dim).transpose(-1, -2).reshape(rows.shape)
    if tile_order == "dot4":
        return rows.reshape(*lead, block_size, dim // 4, 4).transpose(-2, -3).reshape(rows.shape)
    if tile_order == "v_transposed" and values:
        return rows.transpose(-1, -2).reshape(rows.shape)
    return rows


def in_segments(
    storage: KvCacheQuant, ids: torch.Tensor
) -> Iterator[tuple[Segment, torch.Tensor | slice, torch.Tensor]]:
    """Every segment, with the places in ``ids`` where blocks of it stand, and which of its blocks those are.

    With one segment these are all places, and no call waits for the device.

    Args:
        ids: int64 ``[count]`` block ids, each at least 0 and below ``storage.num_blocks``.
    """
    if not storage.more:
        yield storage.segments[0], slice(None), ids
        return
    first = 0
    for segment in storage.segments:
        here = (ids >= first) & (ids < first + segment.num_blocks)
        yield segment, here, ids[here] - first
        first += segment.num_blocks


def read_blocks(storage: KvCacheQuant, ids: torch.Tensor) -> Segment:
    """A copy of blocks ``ids``, int64 ``[count]``, as a segment of their own."""
    if not storage.more:
        return Segment(*(x[:, ids] for x in storage.segments[0]))
    read = Segment(*(x.new_empty((x.shape[0], len(ids), *x.shape[2:])) for x in storage.segments[0]))
    for segment, here, blocks in in_segments(storage, ids):
        for target, x in zip(read, segment, strict=True):
            target[:, here] = x[:, blocks]
    return read


def write_blocks(storage: KvCacheQuant, ids: torch.Tensor, stored: Segment) -> None:
    """Write blocks that `read_blocks` has read to blocks ``ids``, in place."""
    for segment, here, blocks in in_segments(storage, ids):
        for x, source in zip(segment, stored, strict=True):
            x[:, blocks] = source[:, here]


def write_rows(
    store: torch.Tensor, tile_order: str, blocks: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, *, values: bool
) -> None:
    """Write stored token rows into their tiles, in place.

    Args:
        store: ``[num_kv_heads, num_blocks, block_size, dim]``, modified in place.
        tile_order: one of ``TILE_ORDERS``.
        blocks: int64 ``[tokens]`` block of each token.
        slots: int64 ``[tokens]`` place of each token in its block.
        rows: ``[num_kv_heads, tokens, dim]`` of the same dtype.
        values: whether ``store`` holds values (their tiles are ordered differently from keys).
    """
    heads, num_blocks, block_size, dim = store.shape
    tokens = rows.shape[1]
    if tile_order == "dot4" and values:
        tiles = store.view(heads, num_blocks, block_size // 4, dim, 4)
        tiles[:, blocks, slots // 4, :, slots % 4] = rows.transpose(0, 1)
    elif tile_order == "dot4":
        tiles = store.view(heads, num_blocks, dim // 4, block_size, 4)
        tiles[:, blocks, :, slots] = rows.view(heads, tokens, dim // 4, 4).transpose(0, 1)
    elif tile_order == "v_transposed" and values:
        tiles = store.view(heads, num_blocks, dim, block_size)
        tiles[:, blocks, :, slots] = rows.transpose(0, 1)
    else:
        store[:, blocks, slots] = rows
