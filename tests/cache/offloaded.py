"""Caches that offload, in both ways, on the CPU; and how much of a tensor is in the process' memory."""

from __future__ import annotations

import sys
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig

from hf_int8_paged import PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.offloading.copied import CopiedLayers, Slot

#: ``mapped``: a file, as it is on the CPU. ``copied``: slots, as it is on a GPU, with the CPU in the place of both.
WAYS = ("mapped", "copied")
needs_pagemap = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/pagemap")


class PoisonedSlots(CopiedLayers):
    """What is read from a slot whose layer has left is 127 with NaN scales."""

    def _empty(self, slot: Slot) -> None:
        held = slot.held
        super()._empty(slot)
        if held is not None:
            for segment in held.storage.segments:
                segment.k.fill_(127)
                segment.v.fill_(127)
                segment.k_scales.fill_(torch.nan)
                segment.v_scales.fill_(torch.nan)


def offloaded(config: PreTrainedConfig, way: str, **options: Any) -> PagedInt8Cache:
    """A cache all of whose layers leave, unless the options say something else."""
    options = {"offload_only_non_sliding": False} | options
    cache = PagedInt8Cache(config, offloading=True, **options)
    choose(cache.pool, way)
    return cache


def choose(pool: PagedInt8Pool, way: str) -> PagedInt8Pool:
    """Have a pool, which holds nothing yet, offload in this way."""
    assert pool.offloaded is not None
    if way == "copied":
        pool.offloaded.make_far_side = PoisonedSlots
    return pool


def slots_of(cache: PagedInt8Cache) -> CopiedLayers:
    """The slots of a cache that copies."""
    assert cache.pool.offloaded is not None
    (side,) = cache.pool.offloaded.far_sides.values()
    assert isinstance(side, CopiedLayers)
    return side


def resident_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the pages of these tensors that the process has in memory, by /proc/self/pagemap."""
    found = 0
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for x in tensors:
            pages = range(x.data_ptr() // PAGESIZE, -(-(x.data_ptr() + x.nbytes) // PAGESIZE))
            pagemap.seek(8 * pages.start)  # eight bytes for each page; the highest bit says that it is there
            found += int((np.frombuffer(pagemap.read(8 * len(pages)), np.int64) < 0).sum()) * PAGESIZE
    return found


def resident_layers(cache: PagedInt8Cache) -> list[int]:
    """Layers of whose blocks the process has something in memory, found out without touching any."""
    found = []
    for layer in range(len(cache.layers)):
        storage = cache.pool.look_at(layer)
        if resident_bytes([x for segment in storage.segments for x in segment]):
            found.append(layer)
    return found
