"""What a backend is, and which one serves which device: one registry, asked when a layer's storage is made."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection
from typing import TYPE_CHECKING, Protocol, cast

import torch

from .calls import Scoring, Tokens
from .first_tokens import FirstTokens
from .formats import INT8, format_called
from .storage import KvCacheQuant, Segment


class Backend(Protocol):
    """Kernels for one kind of device: a module, or any object, with these names.

    The public functions check what they pass on. The cache calls a backend itself and checks only what a step may
    change, so a backend whose kernels follow addresses checks layouts on its own (`layouts`).
    """

    @property
    def NAME(self) -> str:
        """How storages and callers name the backend."""

    @property
    def TILE_ORDER(self) -> str:
        """The order of the tiles that it makes, one of `storage.TILE_ORDERS`: the only one that it reads, unless it is
        the reference."""

    @property
    def FORMATS(self) -> Collection[str]:
        """Names of the storage formats that it serves."""

    @property
    def LONG_CHUNKS(self) -> bool:
        """Whether ``attend`` has a kernel for ``fresh`` keys and values, which reads the past from its blocks; without
        one it is right and slow, and a caller does better to gather the past."""

    @property
    def SEGMENTS(self) -> bool:
        """Whether it reads storages of several segments. A storage of another backend is copied when it grows."""

    def unavailable(self, device: torch.device, block_size: int, head_dim: int, v_head_dim: int) -> str | None:
        """Why the backend cannot serve a layer of these sizes on ``device``, or None if it can."""

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, filled_slowly: bool = False
    ) -> torch.Tensor:
        """Uninitialised memory for a layer's storage, which a prompt fills at once, or steps fill token by token."""

    def filled(self, segment: Segment) -> None:
        """What steps filled slowly is full; asked where the backend reads several segments."""

    def append(self, k_new: torch.Tensor, v_new: torch.Tensor, storage: KvCacheQuant, tokens: Tokens) -> None:
        """Quantize rows and write them after ``tokens.context_lens_before``; see ``int8_kv_append_paged``."""

    def attend(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        storage: KvCacheQuant,
        tokens: Tokens,
        scoring: Scoring,
        fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
        first_tokens: FirstTokens | None = None,
    ) -> None:
        """Attention of the newest rows; `reference.attend` defines it. Kernels take ``fresh`` rows of q's dtype."""

    def gather(
        self, storage: KvCacheQuant, tokens: Tokens, start: int, stop: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys and values of positions ``start`` to ``stop``, without first tokens; see ``gather_dense``."""

    def copy(self, storage: KvCacheQuant, src: torch.Tensor, dst: torch.Tensor) -> None:
        """Copy whole blocks; see ``copy_blocks``."""


if TYPE_CHECKING:
    from . import reference
    from .cpu import backend as cpu
    from .triton import backend as triton

    #: Here mypy compares every backend of the package with the protocol.
    _IN_THE_PACKAGE: tuple[Backend, ...] = (reference, cpu, triton)

_MODULES = {"reference": ".reference", "cpu": ".cpu.backend", "triton": ".triton.backend"}
#: Names of the backends that come with the package.
BACKENDS = tuple(_MODULES)
#: Backends by device type, the preferred one first.
_PREFERRED = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference"),
    "xpu": ("triton", "reference"),
}
_registered: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Make one more backend known by its name. It serves layers that ask for it, and no others.

    Raises:
        ValueError: another backend has this name.
    """
    if backend.NAME in BACKENDS or _registered.setdefault(backend.NAME, backend) is not backend:
        raise ValueError(f"another backend is called {backend.NAME!r} already")


def load_backend(name: str) -> Backend:
    """The backend called ``name``; imports what it needs only now.

    Raises:
        ValueError: no backend has this name.
    """
    if name in _registered:
        return _registered[name]
    if name not in _MODULES:
        names = ", ".join((*BACKENDS, *_registered))
        raise ValueError(f"unknown backend {name!r}; choose one of {names}, or None for the device's best")
    return _load(name)


@functools.cache
def _load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(_MODULES[name], __package__))


def why_unavailable(
    name: str,
    device: torch.device,
    block_size: int = 16,
    head_dim: int = 64,
    v_head_dim: int = 64,
    format: str = INT8.name,
) -> str | None:
    """Why backend ``name`` cannot serve a layer of this geometry and format on ``device``, or None if it can.

    Raises:
        ValueError: no backend, or no format, has this name.
    """
    format_called(format)
    try:
        backend = load_backend(name)
    except ImportError as error:
        return str(error)
    if format not in backend.FORMATS:
        return f"it serves the format {', '.join(backend.FORMATS)}, not {format!r}"
    return backend.unavailable(device, block_size, head_dim, v_head_dim)


def resolve_backend(
    name: str | None,
    device: torch.device,
    block_size: int = 16,
    head_dim: int = 64,
    v_head_dim: int = 64,
    format: str = INT8.name,
) -> Backend:
    """The backend for a layer.

    Args:
        name: a backend's name, which is then used or refused, never replaced; ``None`` takes the first of the
            device's backends that can serve the layer.

    Raises:
        ValueError: the named backend cannot serve this device, geometry or format; the message says what could.
    """
    layer = (device, block_size, head_dim, v_head_dim, format)
    candidates = _PREFERRED.get(device.type, ("reference",))
    if name is None:
        return next(load_backend(c) for c in candidates if why_unavailable(c, *layer) is None)
    reason = why_unavailable(name, *layer)
    if reason is not None:
        working = [c for c in BACKENDS if c != name and why_unavailable(c, *layer) is None]
        raise ValueError(
            f"backend {name!r} cannot serve device {str(device)!r}: {reason}; working here: {', '.join(working)}"
        )
    return load_backend(name)


def backend_of(storage: KvCacheQuant, override: str | None) -> Backend:
    """The backend that serves a call: the storage's own, or the reference, which reads every tile order."""
    if override is None or override == storage.backend:
        return load_backend(storage.backend)
    if override != "reference":
        raise ValueError(
            f"the storage's tiles belong to backend {storage.backend!r}; only 'reference' reads others' tiles, "
            f"not {override!r}"
        )
    return load_backend("reference")
