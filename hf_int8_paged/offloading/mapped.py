"""Layers of the CPU whose memory is a file, mapped: the system's page cache is between the two.

Addresses never change, so a layer is always where kernels look for it. Near is what the process has pages of; a layer
that is sent away gives its pages back to the page cache, which writes them to the file in its own time and keeps them
as long as nobody else needs the memory.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence

import torch

from ..kernels import KvCacheQuant, Segment
from .far_side import FarSide, WhichBlocks

#: Of the disk, of its files, or of this process' open ones.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE)
#: Somebody has deleted the folder, or has taken the right to write there.
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)
#: Smaller tensors are read ahead as a whole, whatever holds tokens in them.
_SMALL = 1 << 16
_FORKED = (
    "this process was forked while layers were offloaded to a file that both processes would write to; make a new "
    "cache with a pool of its own here, or save() this one before the fork and load it here"
)


class MappedFiles(FarSide):
    """Memory of offloaded layers in files without a name, which the system deletes with the last mapping.

    Args:
        folder: for the files; ``None`` takes the system's folder for temporary files.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | None):
        self._folder = tempfile.gettempdir() if folder is None else folder
        #: The layer that was asked for last, and its memory, as long as nobody has sent it away: all others are away.
        self._newest: tuple[int, tuple[Segment, ...]] | None = None
        #: Whether this is a child process, whose parent has the same files.
        self.forked = False
        _of_this_process.add(self)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype, device=device)
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                _reserve(file.fileno(), size)
                # The tensor's storage keeps the mapping alive, and the mapping the file.
                memory = torch.from_file(f"/dev/fd/{file.fileno()}", shared=True, size=size, dtype=torch.uint8)
        except OSError as error:
            if error.errno in _NO_ROOM:
                what = f"{error.strerror}: {size:,} bytes for an offloaded layer in {self._folder}"
                raise MemoryError(what) from error
            if error.errno not in _NO_FOLDER:
                raise
            what = f"no file can be made for an offloaded layer ({error.strerror})"
            remedy = "make the folder again and repeat the step, or save() the cache and load it into another pool"
            raise OSError(error.errno, f"{what}; {remedy}", self._folder) from error
        return memory.view(dtype).view(shape)

    def begin(self, layer: int, home: KvCacheQuant, blocks: int) -> None:
        if layer in self.near or not hasattr(mmap, "MADV_WILLNEED"):
            return
        for segment in home.segments:
            held = min(blocks, segment.num_blocks)
            blocks -= held
            for x in segment:
                # Heads lie one after the other, and of each of them only the first blocks hold tokens.
                parts = x[:, :held] if held < segment.num_blocks and x.nbytes > _SMALL else x[None] if held else ()
                for part in parts:
                    _advise(part, mmap.MADV_WILLNEED)

    def arrive(self, layer: int, home: KvCacheQuant) -> KvCacheQuant:
        if self.forked:
            raise RuntimeError(_FORKED)
        newest = self._newest
        if newest is None or newest[0] != layer:
            if newest is not None:
                _give_back(newest[1])
            self._newest = layer, home.segments
        return home

    def leave(self, layer: int, home: KvCacheQuant) -> None:
        _give_back(home.segments)
        if layer in self.near:
            self._newest = None

    def written(self, layer: int, which: WhichBlocks | None) -> None:
        """Nothing is to be brought back."""

    def settle(self, layer: int, home: KvCacheQuant) -> None:
        """Home is where the layer is."""

    def replaced(self, layer: int, storage: KvCacheQuant, home: KvCacheQuant | None) -> KvCacheQuant:
        if layer in self.near:
            self._newest = layer, storage.segments
        else:
            self.leave(layer, storage)  # growing may have copied
        return storage

    def forget(self) -> None:
        self._newest = None

    def bytes_beside(self, sizes: Sequence[int]) -> int:
        return self.nbytes

    @property
    def nbytes(self) -> int:
        return 0  # near and far are the same memory

    @property
    def near(self) -> list[int]:
        newest = self._newest
        return [] if newest is None else [newest[0]]

    @property
    def where(self) -> str:
        return f"in files in {self._folder}"


def _reserve(descriptor: int, size: int) -> None:
    """Have ``size`` bytes in a file: a page of a mapping that finds none would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(1 << 20)
    while size > 0:
        size -= os.write(descriptor, zeros[:size])


def _give_back(segments: tuple[Segment, ...]) -> None:
    """Have no page of these in the process; their files keep what they hold."""
    for segment in segments if hasattr(mmap, "MADV_DONTNEED") else ():
        for x in segment:
            _advise(x, mmap.MADV_DONTNEED)


def _advise(x: torch.Tensor, advice: int) -> None:
    """Tell the system how the pages of a contiguous tensor will be used. Advice not taken changes nothing."""
    first = x.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = x.data_ptr() + x.nbytes - first
    if x.nbytes:
        _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


_of_this_process: weakref.WeakSet[MappedFiles] = weakref.WeakSet()


def _after_fork() -> None:
    for files in list(_of_this_process):
        files.forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
