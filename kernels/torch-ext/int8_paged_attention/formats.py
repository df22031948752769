"""What a stored row is: how many bytes it takes, how it is quantized and how it is restored.

A format is an object that `KvCacheQuant.format` names. The reference backend reads and writes every format by the
methods here; the other backends say which formats their kernels know (`Backend.FORMATS`) and are refused for others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

FLOAT16_MAX = 65504.0


class Format(ABC):
    """One way to store the rows of keys and values, each with a scale of its own.

    Attributes:
        name: how storages and callers name it.
        dtype: of the stored elements.
        scale_dtype: of the scale of a row.
        largest: stored elements lie in ``[-largest, largest]``.
    """

    name: str
    dtype: torch.dtype
    scale_dtype: torch.dtype
    largest: float

    def bytes_per_row(self, dim: int) -> int:
        """Bytes that one row of ``dim`` elements takes, its scale included: one token, one head, keys or values."""
        return dim * self.dtype.itemsize + self.scale_dtype.itemsize

    def bytes_per_token(self, num_kv_heads: int, head_dim: int, v_head_dim: int) -> int:
        """Bytes that one token takes in a layer: keys and values of all heads, their scales included."""
        return num_kv_heads * (self.bytes_per_row(head_dim) + self.bytes_per_row(v_head_dim))

    @abstractmethod
    def quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 rows ``[..., dim]`` -> stored rows ``[..., dim]`` of ``dtype`` and scales ``[...]`` of
        ``scale_dtype``. A row with NaN or infinity gets scale NaN."""

    @abstractmethod
    def restore(self, stored: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Stored rows ``[..., dim]`` and their scales ``[...]`` -> rows of ``dtype``, float32 or float64. A row whose
        scale is NaN is NaN."""


class Int8(Format):
    """int8 elements with one float16 scale per row (DESIGN.md section 2)."""

    name = "int8"
    dtype = torch.int8
    scale_dtype = torch.float16
    largest = 127

    def quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``scale = float16(max|x| / 127)``, ``q = clamp(round_half_even(x / float32(scale)), -127, 127)``.

        A zero scale gives q = 0; a row that holds NaN or infinity gets scale NaN and q = 0; a scale above float16's
        largest number saturates there, and the row clips.
        """
        largest = rows.abs().amax(dim=-1)
        # amax passes NaN on; infinity is a fault of the same kind.
        finite = largest < torch.inf
        scales = (largest / 127).clamp(max=FLOAT16_MAX).to(torch.float16)
        usable = finite & (scales > 0)
        divisor = torch.where(usable, scales.to(torch.float32), 1.0)[..., None]
        stored = torch.round(torch.where(usable[..., None], rows, 0.0) / divisor).clamp(-127, 127).to(torch.int8)
        return stored, torch.where(finite, scales, torch.nan)

    def restore(self, stored: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return stored.to(dtype) * scales[..., None].to(dtype)


INT8 = Int8()
#: All formats by name; a container of the names that the reference backend serves.
FORMATS: dict[str, Format] = {INT8.name: INT8}


def register_format(new: Format) -> None:
    """Make one more format known. Its name must not be taken.

    Raises:
        ValueError: another format has this name.
    """
    if FORMATS.setdefault(new.name, new) is not new:
        raise ValueError(f"another format is called {new.name!r} already")


def format_called(name: str) -> Format:
    """The format called ``name``.

    Raises:
        ValueError: no format has this name.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
