"""A safetensors file that is written tensor by tensor, with a checksum of each, and read through a memory map.

The `safetensors` library reads it. It writes only what lies in memory as a whole, which a cache of gigabytes need not
do twice; so the header, a page of JSON, is written here, and the tensors follow chunk by chunk.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .atomic import replacing

#: Name of safetensors for each dtype that a file may hold.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
#: The last tensor of a file: CRC-32 of each other tensor in the order of the file, and of the header, uint8
#: ``[tensors + 1, 4]``, little-endian.
CHECKSUMS = "checksums"
#: The header may have so many bytes, as in safetensors.
MAX_HEADER = 100_000_000


class CacheFileError(ValueError):
    """A file that holds no cache, is damaged, or does not fit; the message names the part. Nothing has changed."""


class CacheFileMismatchError(CacheFileError):
    """A sound file that does not fit here: another release, model, machine or pool may take it."""


class Stored(NamedTuple):
    """A tensor to be written.

    Attributes:
        dtype: one of `DTYPES`.
        shape: sizes.
        chunks: makes its parts along the first axis, in order, each on any device.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[torch.Tensor]]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Stored:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: [tensor])

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def file_path(path: str | os.PathLike) -> Path:
    """The path that a caller means, who may write ``~`` for the home.

    Raises:
        TypeError: this is no path.
        ValueError: it is empty.
    """
    if not os.fspath(path):
        raise ValueError("path is empty; give the name of a file")
    return Path(os.path.expanduser(path))


def write_tensors(path: Path, metadata: dict[str, str], tensors: dict[str, Stored]) -> None:
    """Write a file as a whole, or leave ``path`` as it was.

    Args:
        path: of the file; replaced if it is there.
        metadata: strings for the header.
        tensors: by name.

    Raises:
        OSError: the file cannot be written. ``path`` is as it was.
    """
    # Larger elements first, so that all are aligned.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    described = [(name, tensors[name].dtype, tensors[name].shape, tensors[name].nbytes) for name in order]
    for name, dtype, shape, nbytes in [*described, (CHECKSUMS, torch.uint8, (len(order) + 1, 4), 4 * len(order) + 4)]:
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    with replacing(path) as file:
        file.write(header)
        sums = [_write_chunks(file, tensors[name]) for name in order]
        for checksum in (*sums, zlib.crc32(header)):
            file.write(checksum.to_bytes(4, "little"))


def _write_chunks(file: BinaryIO, stored: Stored) -> int:
    checksum = written = 0
    for chunk in stored.chunks():
        data = _bytes_of(chunk)
        checksum, written = zlib.crc32(data, checksum), written + len(data)
        file.write(data)
    assert written == stored.nbytes, "a tensor is not what was announced"
    return checksum


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")


class TensorFile:
    """A file of `write_tensors`, whose header has been checked. Tensors are checked where they are read.

    Args:
        path: of the file.

    Attributes:
        metadata: the header's strings.
        names: of all tensors but the checksums.

    Raises:
        CacheFileError: no such file, or its header is damaged.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            header = self._open()
        except FileNotFoundError as error:
            raise CacheFileError(f"{path}: there is no such file") from error
        except IsADirectoryError as error:
            raise CacheFileError(f"{path}: this is a folder; give the name of a file in it") from error
        try:
            self.metadata: dict[str, str] = self._file.metadata() or {}
            self.names = set(self._file.keys()) - {CHECKSUMS}
            sums = self._file.get_tensor(CHECKSUMS)
        except (SafetensorError, KeyError, RuntimeError, ValueError, OverflowError) as error:
            raise self.error("header", str(error)) from error
        if sums.dtype != torch.uint8 or sums.shape != (len(self.names) + 1, 4):
            raise self.error(CHECKSUMS, f"{sums.dtype} of shape {list(sums.shape)} for {len(self.names)} tensors")
        found = [int.from_bytes(row.numpy().tobytes(), "little") for row in sums]
        if zlib.crc32(header) != found[-1]:
            raise self.error("header", "its checksum is another")
        entries = json.loads(header[8:])
        order = [name for name in entries if name not in ("__metadata__", CHECKSUMS)]
        self._checksums = dict(zip(order, found, strict=False))
        self._described = {name: (entries[name]["dtype"], tuple(entries[name]["shape"])) for name in order}

    def _open(self) -> bytes:
        """Open the file with the library; returns its header as it stands there. Others may delete or replace the file
        at any moment: it is opened again until both are of the same one."""
        while True:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header = file.read(8)
                length = int.from_bytes(header, "little")
                if len(header) < 8 or length > min(MAX_HEADER, size - 8):
                    raise self.error("header size", f"{length} bytes, in a file of {size}")
                header += file.read(length)
                try:
                    self._file = safe_open(self.path, framework="pt", device="cpu")
                except (SafetensorError, RuntimeError, ValueError, OverflowError) as error:
                    raise self.error("header", str(error)) from error
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return header

    @property
    def checksums(self) -> dict[str, int]:
        """CRC-32 of each tensor."""
        return dict(self._checksums)

    def check(self, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
        """Check that there is such a tensor, by the header alone.

        Args:
            name: of the tensor.
            dtype: that it must have.
            shape: sizes that it must have, None where any will do.

        Raises:
            CacheFileError: there is none, or it is another.
        """
        if name not in self._described:
            raise self.error(name, "the file has no such tensor")
        kind, sizes = self._described[name]
        same = len(sizes) == len(shape) and all(want in (None, got) for want, got in zip(shape, sizes))
        if kind != DTYPES[dtype] or not same:
            wanted = ["any" if size is None else size for size in shape]
            raise self.error(name, f"{kind} of {list(sizes)}, where {DTYPES[dtype]} of {wanted} belongs")

    def read(self, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> torch.Tensor:
        """A tensor, in the file's memory map: pages are fetched as they are read. Not to be written to.

        Args:
            name: of the tensor.
            dtype: that it must have.
            shape: sizes that it must have, None where any will do.

        Raises:
            CacheFileError: there is none, it is another, or its checksum is.
        """
        self.check(name, dtype, shape)
        try:
            tensor = self._file.get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise self.error(name, str(error)) from error
        if zlib.crc32(_bytes_of(tensor)) != self._checksums[name]:
            raise self.error(name, "its checksum is another")
        return tensor

    def error(self, field: str, what: str) -> CacheFileError:
        """The error for a part of the file."""
        return CacheFileError(self._message(field, what))

    def mismatch(self, field: str, what: str) -> CacheFileMismatchError:
        """The error for a part that is sound, and does not fit here."""
        return CacheFileMismatchError(self._message(field, what))

    def _message(self, field: str, what: str) -> str:
        return f"{self.path} holds no cache that can be loaded: {field}: {what}"
