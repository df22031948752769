"""Which backend serves which device: one registry, asked when a layer's storage is made.

A backend is a module with ``NAME``, ``TILE_ORDER`` and the functions of `reference`: ``unavailable``, ``empty``,
``append``, ``decode``, ``gather`` and ``copy``, with the same arguments. They get arguments that
the public functions have checked. A backend may have ``extend`` (`triton_backend.extend`), attention of a long chunk
over a past in blocks; without it the past is gathered.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from .storage import KvCacheQuant

_MODULES = {"reference": ".reference", "cpu": ".cpu", "triton": ".triton_backend"}
#: Backends by device type, the preferred one first.
_PREFERRED = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference"),
    "xpu": ("triton", "reference"),
}
BACKENDS = tuple(_MODULES)


def load_backend(name: str) -> ModuleType:
    """The backend module called ``name``; imports what it needs only now."""
    if name not in _MODULES:
        raise ValueError(
            f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}, or None for the device's best"
        )
    return importlib.import_module(_MODULES[name], __package__)


def why_unavailable(
    name: str, device: torch.device, block_size: int = 16, head_dim: int = 64, v_head_dim: int = 64
) -> str | None:
    """Why backend ``name`` cannot serve a layer of this geometry on ``device``, or None if it can.

    Raises:
        ValueError: no backend has this name.
    """
    try:
        backend = load_backend(name)
    except ImportError as error:
        return str(error)
    return backend.unavailable(device, block_size, head_dim, v_head_dim)


def resolve_backend(
    name: str | None, device: torch.device, block_size: int = 16, head_dim: int = 64, v_head_dim: int = 64
) -> ModuleType:
    """The backend for a layer.

    Args:
        name: a backend's name, which is then used or refused, never replaced; ``None`` takes the first of the
            device's backends that can serve the layer.

    Raises:
        ValueError: the named backend cannot serve this device or geometry; the message says what could.
    """
    sizes = (block_size, head_dim, v_head_dim)
    candidates = _PREFERRED.get(device.type, ("reference",))
    if name is None:
        return next(load_backend(c) for c in candidates if why_unavailable(c, device, *sizes) is None)
    reason = why_unavailable(name, device, *sizes)
    if reason is not None:
        working = [c for c in BACKENDS if c != name and why_unavailable(c, device, *sizes) is None]
        raise ValueError(
            f"backend {name!r} cannot serve device {str(device)!r} with head_dim {head_dim}: {reason}; "
            f"working here: {', '.join(working)}"
        )
    return load_backend(name)


def backend_of(storage: KvCacheQuant, override: str | None) -> ModuleType:
    """The backend that serves a call: the storage's own, or the reference, which reads every tile order."""
    if override is None or override == storage.backend:
        return load_backend(storage.backend)
    if override != "reference":
        raise ValueError(
            f"the storage's tiles belong to backend {storage.backend!r}; only 'reference' reads others' tiles, "
            f"not {override!r}"
        )
    return load_backend("reference")
