"""Where the blocks of offloaded layers are while nobody needs them: the one interface of both kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..kernels import KvCacheQuant

#: Ids of blocks that somebody is about to write to, asked only where they matter.
WhichBlocks = Callable[[], np.ndarray]


class FarSide(ABC):
    """The far side of the offloaded layers of one device.

    As a function it makes the memory of a layer at home, so a storage knows its far side (`KvCacheQuant.empty`).
    Whatever it does to a layer changes no value: each method may be ended by an exception, and called again.
    """

    #: That the layers' kernels run on.
    device: torch.device

    @abstractmethod
    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Uninitialised memory for a layer at home.

        Raises:
            MemoryError: there is none.
        """

    @abstractmethod
    def begin(self, layer: int, home: KvCacheQuant, blocks: int) -> None:
        """Begin to bring a layer near, without waiting; only the first ``blocks`` blocks hold tokens."""

    @abstractmethod
    def arrive(self, layer: int, home: KvCacheQuant) -> KvCacheQuant:
        """The layer's blocks as kernels of its device take them, now."""

    @abstractmethod
    def leave(self, layer: int, home: KvCacheQuant) -> None:
        """Send a layer away, if it is near."""

    @abstractmethod
    def written(self, layer: int, which: WhichBlocks | None) -> None:
        """Somebody is about to write to these blocks of a layer that has arrived; ``None``: perhaps to all."""

    @abstractmethod
    def settle(self, layer: int, home: KvCacheQuant) -> None:
        """Have everything that the layer holds at home, and the layer away."""

    @abstractmethod
    def replaced(self, layer: int, storage: KvCacheQuant, home: KvCacheQuant | None) -> KvCacheQuant:
        """What is kept at home for a layer from now on.

        Args:
            layer: its index.
            storage: takes the place of the layer's storage: one that `arrive` has returned, with another centre; or
                memory of this far side.
            home: what was at home before; None for a new layer.
        """

    @abstractmethod
    def forget(self) -> None:
        """All layers are gone."""

    @abstractmethod
    def bytes_beside(self, sizes: Sequence[int]) -> int:
        """Bytes that are taken besides, at most, while there are layers of these sizes in bytes."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that are taken besides now."""

    @property
    @abstractmethod
    def near(self) -> list[int]:
        """Layers that are near, or on their way."""

    @property
    @abstractmethod
    def where(self) -> str:
        """Where the far side is, for people."""
