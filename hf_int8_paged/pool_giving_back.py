"""Memory that a pool gives back: all of it where no cache has tokens, else what lies behind the last block in use.

It does so where something is refused otherwise, and not before: what a cache forgets its next prompt takes again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import MutableSet
from typing import Protocol

import torch

from .block_allocator import BlockAllocator
from .kernels import KvCacheQuant, Segment
from .offloading.storages import OffloadedStorages
from .pool_access import PoolAccess


class HoldsBytes(Protocol):
    """Tensors beside the blocks that count: first tokens in full precision."""

    @property
    def nbytes(self) -> int: ...

    def forget(self) -> None:
        """Hold nothing any more; nobody will ask."""


class PoolGivingBack:
    """The half of `PagedInt8Pool` that gives memory back. The pool sets these attributes. All of it is called inside
    ``access.exclusive()``; after an exception anywhere in here every block that is held is still there, and what is
    left to be done is done by the next call."""

    access: PoolAccess
    allocators: dict[str, BlockAllocator]
    storages: dict[int, KvCacheQuant]
    offloaded: OffloadedStorages | None
    first_tokens: MutableSet[HoldsBytes]
    _members: dict[str, list[int]]
    _centers: dict[int, torch.Tensor]
    #: Whether all memory is to be given back as soon as no cache has tokens.
    _starts_over: bool

    def start_over_if_refused(self) -> None:
        """Give all memory back, if a layer has been refused since and no cache has tokens."""
        if self._starts_over and self._is_unused():
            self._start_over()

    def _give_back_unused(self) -> bool:
        """Give back what nobody uses. Returns whether there was any."""
        if self._is_unused():
            had = any(x.nbytes for x in self.storages.values()) or any(x.nbytes for x in list(self.first_tokens))
            self._start_over()
            return had
        return self._give_back_ends()

    def _is_unused(self) -> bool:
        """Whether no cache has tokens, so that the next step of each is a first prompt."""
        return not self.access.any_tokens and not any(allocator.num_used for allocator in self.allocators.values())

    @torch.inference_mode(False)  # centres may be written to outside it later, which inference tensors refuse
    def _start_over(self) -> None:
        """Have layers without blocks and without a centre. They stay: caches without tokens are saved, and look."""
        self._starts_over = True  # until all is done
        for layer, storage in list(self.storages.items()):
            center = storage.key_center
            self.storages[layer] = dataclasses.replace(
                _first_blocks(storage, 0), key_center=None if center is None else torch.zeros_like(center)
            )
        for side in [] if self.offloaded is None else self.offloaded.far_sides.values():
            side.forget()
        self._centers.clear()
        for allocator in self.allocators.values():
            allocator.forget_blocks()
        for kept in list(self.first_tokens):
            kept.forget()
        self._starts_over = False

    @torch.inference_mode(False)
    def _give_back_ends(self) -> bool:
        """Give back each group's segments behind the last block that is held. Returns whether there were any."""
        gave = False
        with self.access.growing():
            for group, allocator in self.allocators.items():
                # Allocators first: a layer may have more blocks than they know of, but never fewer.
                layers = {layer: storage for layer, storage in self.storages.items() if layer in self._members[group]}
                ends = (_end_of_segment(storage, allocator.end) for storage in layers.values())
                end = max(allocator.end, *ends, 0)
                allocator.shrink(end)
                for layer, storage in layers.items():
                    if storage.num_blocks > _end_of_segment(storage, end):
                        held = storage if self.offloaded is None else self.offloaded.home(layer)
                        self.storages[layer] = _first_blocks(held, end)
                        gave = True
        return gave


def _end_of_segment(storage: KvCacheQuant, blocks: int) -> int:
    """Blocks of the segments that the first ``blocks`` blocks lie in."""
    end = 0
    for segment in storage.segments:
        if end >= blocks:
            break
        end += segment.num_blocks
    return end


def _first_blocks(storage: KvCacheQuant, blocks: int) -> KvCacheQuant:
    """A storage of the segments that the first ``blocks`` blocks lie in, with the same memory and the same centre."""
    segments, end = list[Segment](), 0
    for segment in storage.segments:
        if end >= blocks:
            break
        segments.append(segment)
        end += segment.num_blocks
    if not segments:
        segments = [Segment(*(x.new_empty((x.shape[0], 0, *x.shape[2:])) for x in storage.segments[0]))]
    return dataclasses.replace(storage, **segments[0]._asdict(), more=tuple(segments[1:]))
