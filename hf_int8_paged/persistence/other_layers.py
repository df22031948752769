"""The state of cache layers that are transformers' own: recurrent and convolution states, keys of another sequence.

Such a layer's attributes are tensors and plain values. Tensors become tensors of the file, the rest JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .fields import Fields
from .tensor_file import DTYPES, Stored, TensorFile

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


#: The device for what was on the one of this name.
Place = Callable[[str], torch.device]


class UnknownState(TypeError):
    """A layer has an attribute that is neither a tensor nor a plain value."""


def state_as_json(layer: Any, prefix: str, tensors: dict[str, Stored]) -> dict[str, Any]:
    """A layer's attributes as JSON.

    Args:
        layer: of transformers' caches.
        prefix: of the names of its tensors.
        tensors: those of the file; the layer's are added.

    Raises:
        UnknownState: an attribute is neither a tensor nor a plain value.
    """
    return {name: _as_json(value, f"{prefix}.{name}", tensors) for name, value in vars(layer).items()}


def _as_json(value: Any, name: str, tensors: dict[str, Stored]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = Stored.of(value)
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": name, "dtype": dtype, "shape": list(value.shape), "device": str(value.device)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, dict) and all(isinstance(key, int) for key in value):
        return {"by_number": [[key, _as_json(x, f"{name}.{key}", tensors)] for key, x in value.items()]}
    raise UnknownState(f"{name} is a {type(value).__name__}, which no file can hold")


def read_state(layer: Any, stored: Fields, file: TensorFile, place: Place) -> dict[str, Any]:
    """The attributes that `state_as_json` has stored of such a layer, to be set when all else has been read.

    Args:
        layer: a new one of the same class.
        stored: what `state_as_json` made.
        file: has the tensors.
        place: the device for what was on the one of this name.

    Raises:
        CacheFileError: an attribute that such a layer does not have, or of another kind.
    """
    state = {}
    for name in stored.names():
        if not name.isidentifier() or callable(getattr(type(layer), name, None)) or name.startswith("__"):
            raise stored.refuse(name, f"a {type(layer).__name__} has no such state")
        value, now = _value(stored.any(name), name, stored, file, place), vars(layer).get(name)
        plain = (bool, int, float, str, dict)
        if isinstance(now, plain) and type(now) is not type(value):
            raise stored.refuse(name, f"{value!r:.40} in place of a {type(now).__name__}")
        if isinstance(now, dict) and set(now) != set(value):
            raise stored.refuse(name, f"states {sorted(value)} in place of {sorted(now)}")
        state[name] = value
    missing = set(vars(layer)) - set(state)
    if missing:
        raise stored.refuse(sorted(missing)[0], "it is missing")
    return state


def _value(value: Any, name: str, stored: Fields, file: TensorFile, place: Place) -> Any:
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise stored.refuse(name, "a list is no state")
        return value
    if set(value) == {"by_number"}:
        pairs = value["by_number"]
        if not isinstance(pairs, list) or not all(isinstance(x, list) and len(x) == 2 for x in pairs):
            raise stored.refuse(name, "by_number must be pairs of a number and a value")
        if not all(type(key) is int for key, _ in pairs):
            raise stored.refuse(name, "by_number must begin with numbers")
        return {key: _value(x, name, stored, file, place) for key, x in pairs}
    if set(value) == {"tensor", "dtype", "shape", "device"}:
        described = Fields(value, name, lambda field, what: stored.refuse(field, what))
        dtype = DTYPE_NAMES[described.string("dtype", DTYPE_NAMES)]
        shape = described.elements("shape")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise stored.refuse(name, f"{shape} is no shape")
        # The file's memory map must not be written to, and the layer writes in place.
        return file.read(described.string("tensor"), dtype, tuple(shape)).to(
            place(described.string("device")), copy=True
        )
    if set(value) == {"dtype"} and value["dtype"] in DTYPE_NAMES:
        return DTYPE_NAMES[value["dtype"]]
    if set(value) == {"device"} and isinstance(value["device"], str):
        return place(value["device"])
    raise stored.refuse(name, f"{value!r:.40} is no state")
