"""Memory for blocks on the CPU: large allocations on huge pages, so that reading them costs few TLB misses."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap

import torch

HUGE_PAGE = 2 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for a layer's storage; from 2 MiB on, aligned to huge pages and advised to use them.

    Only whole huge pages are advised: rounding up would hide up to 2 MiB per tensor.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, offset, size - size % HUGE_PAGE)
    # The tensor's storage keeps the mapping alive, and unmaps it with itself.
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
