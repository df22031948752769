"""Memory for blocks on the CPU: large allocations on huge pages, so that reading them costs few TLB misses.

What a prompt fills at once gets huge pages at once. What fills token by token gets small ones, as the first token of a
new huge page would wait until 2 MiB are there, in every layer in the same step; it is offered to the system for huge
pages once it is full.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap

import torch

from ..storage import Segment

HUGE_PAGE = 2 << 20


def empty(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, filled_slowly: bool = False
) -> torch.Tensor:
    """Uninitialised memory for a layer's storage; from 2 MiB on, aligned to huge pages and advised to use them, unless
    it is to be filled slowly.

    Only whole huge pages are advised: rounding up would hide up to 2 MiB per tensor.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    advice = mmap.MADV_NOHUGEPAGE if filled_slowly else mmap.MADV_HUGEPAGE
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(advice, offset, size - size % HUGE_PAGE)
    # The tensor's storage keeps the mapping alive, and unmaps it with itself.
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


def filled(segment: Segment) -> None:
    """Offer memory that has been filled slowly to the system for huge pages, which it makes in the background."""
    if segment.k.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    for x in segment:
        first = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        last = (x.data_ptr() + x.nbytes) // HUGE_PAGE * HUGE_PAGE
        if first < last:
            _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
