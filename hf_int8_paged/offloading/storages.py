"""A pool's blocks by layer, of which some are away until somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

from ..kernels import KvCacheQuant
from .copied import CopiedLayers
from .far_side import FarSide, WhichBlocks
from .mapped import MappedFiles


class Blocks(Protocol):
    """The blocks of each layer, by its index."""

    def __getitem__(self, layer: int, /) -> KvCacheQuant: ...


class WhereLayersAre(NamedTuple):
    """How many layers are offloaded, and where they are now.

    Attributes:
        layers: that leave their device, or would.
        near: of them, those that are near.
        bytes_near: of these layers' blocks.
        bytes_far: of the others'.
        where: the far side, for people.
    """

    layers: int
    near: int
    bytes_near: int
    bytes_far: int
    where: str


class OffloadedStorages(dict[int, KvCacheQuant]):
    """The blocks of each layer by its index, near from when ``[layer]`` asks for them until others are asked for.

    What ``[layer]`` returns may be written to anywhere, and must not be kept beyond the next ``[layer]``; `reading` and
    `writing` say more of what will be done. ``get``, ``values`` and ``items`` only look: for sizes and centres, never
    for contents or addresses. A layer that has been asked for has the one after it begin to come, and after the last
    one the first.

    Args:
        resident_layers: so many of the layers that could leave stay, the first ones.
        only_non_sliding: layers with a window stay.
        folder: for files; ``None`` takes the system's for temporary ones.
        blocks_in_use: of a layer, how many blocks from the first one on may hold tokens.
    """

    def __init__(
        self,
        resident_layers: int,
        only_non_sliding: bool,
        folder: str | None,
        blocks_in_use: Callable[[int], int],
    ):
        super().__init__()
        self._resident_layers = resident_layers
        self.only_non_sliding = only_non_sliding
        self._blocks_in_use = blocks_in_use
        #: Makes the far side of a device. What is done for a GPU can so be tried on the CPU.
        self.make_far_side: Callable[[torch.device], FarSide] = lambda device: (
            MappedFiles(folder) if device.type == "cpu" else CopiedLayers(device)
        )
        self.far_sides: dict[torch.device, FarSide] = {}
        #: Layers that could leave, in their order.
        self._leaving: list[int] = []
        #: The layer that was asked for last.
        self._newest: int | None = None

    def expect(self, layer: int, window: int | None) -> None:
        """Know of a layer of the model, before it holds anything."""
        if layer not in self._leaving and (window is None or not self.only_non_sliding):
            self._leaving = sorted([*self._leaving, layer])

    def leaves(self, layer: int) -> bool:
        """Whether a layer leaves its device."""
        return layer in self._leaving[self._resident_layers :]

    def memory_for(self, layer: int, device: torch.device) -> FarSide | None:
        """What makes the memory of a layer on ``device``; None for the usual memory of one that stays."""
        if not self.leaves(layer):
            return None
        if device not in self.far_sides:
            self.far_sides[device] = self.make_far_side(device)
        return self.far_sides[device]

    def __getitem__(self, layer: int) -> KvCacheQuant:
        return self.writing(layer, None)

    def writing(self, layer: int, which: WhichBlocks | None) -> KvCacheQuant:
        """A layer's blocks, of which those that ``which`` names may be written to; ``None``: any."""
        storage = self.near(layer)
        side = self._side_of(layer)
        if side is not None:
            side.written(layer, which)
        return storage

    def near(self, layer: int) -> KvCacheQuant:
        """A layer's blocks, to be read."""
        home = super().__getitem__(layer)
        side = home.empty
        if not isinstance(side, FarSide):
            return home
        storage = side.arrive(layer, home)
        if self._newest != layer:
            self._newest = layer
            self.prefetch(self.next_after(layer))
        return storage

    def __setitem__(self, layer: int, storage: KvCacheQuant) -> None:
        # What is in a slot has been made of what is at home, and knows no far side.
        before = self._side_of(layer)
        side = storage.empty if isinstance(storage.empty, FarSide) else before
        if before is not None and before is not side:
            self.send_away(layer)
        super().__setitem__(layer, storage if side is None else side.replaced(layer, storage, self.get(layer)))

    def clear(self) -> None:
        super().clear()
        self._newest = None
        for side in self.far_sides.values():
            side.forget()

    def home(self, layer: int) -> KvCacheQuant:
        """A layer's blocks where they are at home, with all that they hold, and nowhere else; to be made larger."""
        home = super().__getitem__(layer)
        if isinstance(home.empty, FarSide):
            home.empty.settle(layer, home)
        return home

    def prefetch(self, layer: int | None) -> None:
        """Begin to bring a layer near, if it leaves and there is one."""
        home = None if layer is None else self.get(layer)
        if layer is not None and home is not None and isinstance(home.empty, FarSide):
            home.empty.begin(layer, home, self._blocks_in_use(layer))

    def send_away(self, layer: int) -> None:
        """Send a layer away now, if it leaves."""
        home = self.get(layer)
        if home is not None and isinstance(home.empty, FarSide):
            home.empty.leave(layer, home)
            if self._newest == layer:
                self._newest = None

    def next_after(self, layer: int) -> int | None:
        """The layer that leaves and comes next after this one, or after the last one the first; None if there is no
        other."""
        others = [x for x in self._leaving[self._resident_layers :] if x != layer]
        return next((x for x in others if x > layer), others[0] if others else None)

    def device_of(self, layer: int) -> torch.device:
        """The device that a layer's kernels run on, wherever its blocks are."""
        home = super().__getitem__(layer)
        return home.empty.device if isinstance(home.empty, FarSide) else home.device

    def bytes_beside(self, sizes: Mapping[int, int]) -> int:
        """Bytes that are taken besides, at most, while layers have these sizes in bytes. One that holds nothing yet is
        taken to go where the first layer has gone."""
        by_side: dict[FarSide, list[int]] = {}
        for layer, size in sizes.items():
            side = self._side_of(layer) or next(iter(self.far_sides.values()), None)
            if side is not None and self.leaves(layer):
                by_side.setdefault(side, []).append(size)
        return sum(side.bytes_beside(of_side) for side, of_side in by_side.items())

    @property
    def nbytes_beside(self) -> int:
        """Bytes that are taken now beside the layers at home."""
        return sum(side.nbytes for side in self.far_sides.values())

    def where(self) -> WhereLayersAre:
        """Where the layers are now."""
        sizes = {layer: storage.nbytes for layer, storage in self.items() if isinstance(storage.empty, FarSide)}
        near = {layer for side in self.far_sides.values() for layer in side.near if layer in sizes}
        bytes_near = sum(sizes[layer] for layer in near)
        places = " and ".join(sorted({side.where for side in self.far_sides.values()}))
        return WhereLayersAre(len(sizes), len(near), bytes_near, sum(sizes.values()) - bytes_near, places)

    def _side_of(self, layer: int) -> FarSide | None:
        home = self.get(layer)
        return home.empty if home is not None and isinstance(home.empty, FarSide) else None


def made_for_offloading(offloaded: OffloadedStorages | None, operation: str) -> OffloadedStorages:
    """Those of a cache that offloads.

    Args:
        offloaded: of a cache's pool, or None.
        operation: what needs them, for the message.

    Raises:
        NotImplementedError: the cache does not.
    """
    if offloaded is None:
        raise NotImplementedError(
            f"{operation}: this cache was made without offloading=True, so its blocks stay on their device; make it "
            "with PagedInt8Cache(model.config, offloading=True)"
        )
    return offloaded


class Reading:
    """The same blocks for who does not write to them."""

    def __init__(self, storages: OffloadedStorages):
        self._storages = storages

    def __getitem__(self, layer: int) -> KvCacheQuant:
        return self._storages.near(layer)


class Appending:
    """The same blocks for a step that appends: it writes to those of its newest tokens and to no others.

    Args:
        storages: of the pool.
        which: ids of those blocks.
    """

    def __init__(self, storages: OffloadedStorages, which: WhichBlocks):
        self._storages = storages
        self._which = which

    def __getitem__(self, layer: int) -> KvCacheQuant:
        return self._storages.writing(layer, self._which)
