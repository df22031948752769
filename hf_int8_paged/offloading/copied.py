"""Layers of a device with memory of its own: at home on the host, and copied to one of two slots of the device.

A slot is one buffer, which every layer finds room in whatever its sizes. Its layer is asked for by kernels; the layer
after it is copied to the other slot meanwhile, on a stream of its own. What kernels have written is copied back when
the layer leaves: the blocks that the newest tokens went to, or all of it where nobody said which.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch

from ..kernels import KvCacheQuant, Segment, read_blocks, write_blocks
from .far_side import FarSide, WhichBlocks
from .streams import SideStream

#: The layer in use, and the one that comes next.
SLOTS = 2


class Held(NamedTuple):
    """A layer in a slot: its index, its memory at home, and its blocks in the slot."""

    layer: int
    home: tuple[Segment, ...]
    storage: KvCacheQuant

    def is_made_of(self, home: KvCacheQuant) -> bool:
        """Whether the layer has the same memory at home as then, and the same centre."""
        same_memory = self.home[0].k is home.k and self.storage.num_blocks == home.num_blocks
        return same_memory and self.storage.key_center is home.key_center


class Returning(NamedTuple):
    """Blocks on their way home: when they are on the host, and where they belong; without ids they are there then."""

    event: Any
    ids: torch.Tensor | None = None
    blocks: Segment | None = None


class Slot:
    """Room for one layer on the device."""

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self.held: Held | None = None
        #: What was last made of the buffer for each layer, and of which blocks at home.
        self.made: dict[int, Held] = {}
        #: When this was last asked for or filled; larger is later.
        self.turn = 0
        #: When the layer has arrived, if nobody has waited for it yet; and when kernels have read the one before it.
        self.arrived: Any = None
        self.left: Any = None


class CopiedLayers(FarSide):
    """Memory of offloaded layers on the host, and slots for them on the device.

    One thread may use it for as long as it lives, and another one after it: what one has asked for another would have
    sent away before its kernel runs.

    Args:
        device: of the kernels.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._streams = SideStream(device)
        self.slots = [Slot(device) for _ in range(SLOTS)]
        self._turns = count(1)
        #: By layer, ids of blocks in the slot that differ from those at home; None for perhaps all.
        self._touched: dict[int, set[int] | None] = {}
        self._returning: dict[int, list[Returning]] = {}
        #: Ident and name of the thread that uses this.
        self._thread: tuple[int, str] | None = None
        #: Bytes copied so far, to the device and back.
        self.bytes_brought = self.bytes_returned = 0

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    def begin(self, layer: int, home: KvCacheQuant, blocks: int) -> None:
        self._only_one_thread()
        if self._slot_of(layer) is None:
            self._bring(layer, home)

    def arrive(self, layer: int, home: KvCacheQuant) -> KvCacheQuant:
        self._only_one_thread()
        slot = self._slot_of(layer) or self._bring(layer, home)
        slot.turn = next(self._turns)
        if slot.arrived is not None:
            self._streams.wait(slot.arrived)
            slot.arrived = None
        assert slot.held is not None
        return slot.held.storage

    def leave(self, layer: int, home: KvCacheQuant) -> None:
        slot = self._slot_of(layer)
        if slot is not None:
            self._only_one_thread()
            self._empty(slot)

    def written(self, layer: int, which: WhichBlocks | None) -> None:
        touched = self._touched.get(layer, set())
        if which is None or touched is None:
            self._touched[layer] = None
        else:
            self._touched[layer] = touched.union(which().tolist())

    def settle(self, layer: int, home: KvCacheQuant) -> None:
        self.leave(layer, home)
        for returning in self._returning.get(layer, ()):
            if returning.event is not None:
                returning.event.synchronize()
            if returning.ids is not None and returning.blocks is not None:
                write_blocks(home, returning.ids, returning.blocks)
        self._returning.pop(layer, None)

    def replaced(self, layer: int, storage: KvCacheQuant, home: KvCacheQuant | None) -> KvCacheQuant:
        slot = self._slot_of(layer)
        near = None if slot is None or slot.held is None else slot.held.storage
        same = [x.k for x in (home, near) if x is not None and x.num_blocks == storage.num_blocks]
        if home is not None and any(storage.k is k for k in same):
            if slot is not None:  # it would go on with the old centre if an exception came before the home has the new
                self._empty(slot)
            return dataclasses.replace(home, key_center=storage.key_center)
        # Other memory, which is complete.
        self._touched.pop(layer, None)
        self._returning.pop(layer, None)
        for slot in self.slots:
            slot.made.pop(layer, None)
            if slot.held is not None and slot.held.layer == layer:
                slot.left, slot.held = self._streams.mark(), None
        return storage

    def forget(self) -> None:
        self._streams.finish()
        self._touched.clear()
        self._returning.clear()
        self.slots = [Slot(self.device) for _ in range(SLOTS)]

    def bytes_beside(self, sizes: Sequence[int]) -> int:
        return sum(max(slot.buffer.nbytes, max(sizes)) for slot in self.slots[: len(sizes)])

    @property
    def nbytes(self) -> int:
        return sum(slot.buffer.nbytes for slot in self.slots)

    @property
    def near(self) -> list[int]:
        return [slot.held.layer for slot in self.slots if slot.held is not None]

    @property
    def where(self) -> str:
        return "in the host's memory"

    def _slot_of(self, layer: int) -> Slot | None:
        for slot in self.slots:
            if slot.held is not None and slot.held.layer == layer:
                return slot
        return None

    def _bring(self, layer: int, home: KvCacheQuant) -> Slot:
        """Begin to copy a layer that is away: to the largest slot with nobody in it, or in place of the layer that was
        asked for longest ago."""
        slot = min(self.slots, key=lambda slot: (0, -slot.buffer.nbytes) if slot.held is None else (1, slot.turn))
        self._empty(slot)
        self.settle(layer, home)
        made = slot.made.get(layer)
        if made is None or not made.is_made_of(home):
            made = slot.made[layer] = Held(layer, home.segments, self._in_slot(slot, home))
        with self._streams.after(slot.left, slot.buffer):
            for near, far in zip(made.storage.segments, made.home, strict=True):
                for target, source in zip(near, far, strict=True):
                    target.copy_(source, non_blocking=True)
                    self.bytes_brought += source.nbytes
        slot.arrived, slot.turn = self._streams.mark_side(), next(self._turns)
        slot.held = made
        return slot

    def _empty(self, slot: Slot) -> None:
        """Have nobody in a slot: what was written there is sent home, and what comes waits for the kernels."""
        held = slot.held
        if held is None:
            return
        if slot.arrived is not None:
            self._streams.wait(slot.arrived)
        if held.layer in self._touched:
            touched = self._touched[held.layer]
            before = self._returning.get(held.layer, []) if touched is not None else []
            self._returning[held.layer] = [*before, self._return(held, touched)]
            del self._touched[held.layer]
        slot.left = self._streams.mark()
        slot.held = None

    def _return(self, held: Held, touched: set[int] | None) -> Returning:
        """Begin to copy blocks home; all of them without ``touched``."""
        if touched is None:
            for near, far in zip(held.storage.segments, held.home, strict=True):
                for source, target in zip(near, far, strict=True):
                    target.copy_(source, non_blocking=True)
                    self.bytes_returned += source.nbytes
            return Returning(self._streams.mark())
        ids = self((len(touched),), torch.int64, self.device)
        ids.copy_(torch.from_numpy(np.fromiter(touched, np.int64, len(touched))))
        blocks = read_blocks(held.storage, ids.to(self.device, non_blocking=True))
        self.bytes_returned += sum(x.nbytes for x in blocks)
        staged = Segment(*(self(tuple(x.shape), x.dtype, x.device).copy_(x, non_blocking=True) for x in blocks))
        return Returning(self._streams.mark(), ids, staged)

    @torch.inference_mode(False)  # kernels write to it outside inference mode too
    def _in_slot(self, slot: Slot, home: KvCacheQuant) -> KvCacheQuant:
        """A layer's blocks in a slot, whose contents are to come."""
        if slot.buffer.nbytes < home.nbytes:
            self._streams.finish()
            slot.made.clear()
            slot.buffer = torch.empty(0, dtype=torch.uint8, device=self.device)  # the old goes before the new comes
            slot.buffer = torch.empty(home.nbytes, dtype=torch.uint8, device=self.device)
        segments, begin = [], 0
        for segment in home.segments:
            tensors = []
            for x in segment:  # all begin at multiples of 16 bytes, as blocks have a multiple of 16 rows
                tensors.append(slot.buffer[begin : begin + x.nbytes].view(x.dtype).view(x.shape))
                begin += x.nbytes
            segments.append(Segment(*tensors))
        return dataclasses.replace(home, **segments[0]._asdict(), more=tuple(segments[1:]), empty=None)

    def _only_one_thread(self) -> None:
        mine, held = threading.get_ident(), self._thread
        if held is None or held[0] != mine:
            # Not `Thread.is_alive`, which is True for ever of a thread that Python has not started.
            if held is not None and held[0] in sys._current_frames():
                raise RuntimeError(
                    "layers of this pool are copied to its device when they are needed, which one thread can have done "
                    f"as long as it lives, and that is {held[1]!r}; give each thread a pool of its own, or let one "
                    "thread do everything"
                )
            self._thread = mine, threading.current_thread().name
