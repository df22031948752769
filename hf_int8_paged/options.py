"""Every option of `PagedInt8Cache` and `PagedInt8Pool`: its type and range, checked here and nowhere else.

`TypeError` says that an option is of the wrong kind, `ValueError` that it is out of range or that a mode cannot honour
it. The message names the value and what would work.
"""

from __future__ import annotations

import operator
import os
import tempfile
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from .byte_sizes import parse_bytes
from .kernels import INT8, MAX_FIRST_TOKENS, ROTATIONS, format_called, resolve_backend, why_unavailable


class PoolOptions(NamedTuple):
    """What blocks are like, and how many there may be. The defaults are those of `PagedInt8Pool`."""

    block_size: int = 16
    backend: str | None = None
    max_tokens: int | None = None
    rotation: str | None = "hadamard"
    center_keys: bool = True
    format: str = INT8.name
    max_bytes: int | str | None = None
    offloading: bool = False
    offload_only_non_sliding: bool = True
    resident_layers: int = 0
    offload_folder: str | os.PathLike | None = None

    def checked(self) -> PoolOptions:
        """The same options as Python's own types.

        Raises:
            TypeError, ValueError: one of them is of the wrong kind or out of range.
        """
        block_size = checked_integer("block_size", self.block_size)
        if block_size <= 0 or block_size % 16:
            raise ValueError(f"block_size must be a positive multiple of 16, got {block_size}")
        max_tokens = _limit("max_tokens", self.max_tokens)
        if max_tokens is not None and max_tokens < block_size:
            raise ValueError(
                f"max_tokens={max_tokens} is less than one block, and a block has block_size={block_size} tokens: the "
                f"cache could hold nothing; give at least {block_size}"
            )
        if self.backend is not None:
            if not isinstance(self.backend, str):
                raise TypeError(
                    f"backend must be a backend's name or None, got {_shown(self.backend)}; None takes the best one"
                )
            why_unavailable(self.backend, torch.device("cpu"))  # refuses unknown names
        if self.rotation is not None and (not isinstance(self.rotation, str) or self.rotation not in ROTATIONS):
            raise ValueError(f"unknown rotation {self.rotation!r}; choose one of {', '.join(ROTATIONS)}, or None")
        if not isinstance(self.format, str):
            raise TypeError(f"format must be a storage format's name, got {_shown(self.format)}")
        format_called(self.format)  # refuses unknown names
        return self._replace(
            block_size=block_size,
            max_tokens=max_tokens,
            center_keys=_switch("center_keys", self.center_keys),
            max_bytes=checked_bytes("max_bytes", self.max_bytes),
            **self._checked_offloading(),
        )

    def _checked_offloading(self) -> dict[str, Any]:
        offloading = _switch("offloading", self.offloading)
        resident_layers = checked_integer("resident_layers", self.resident_layers)
        if resident_layers < 0:
            raise ValueError(f"resident_layers must be at least 0, got {resident_layers}")
        for name in ("resident_layers", "offload_folder"):
            if not offloading and getattr(self, name) != PoolOptions._field_defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} needs offloading=True, without which no layer leaves")
        return {
            "offloading": offloading,
            "offload_only_non_sliding": _switch("offload_only_non_sliding", self.offload_only_non_sliding),
            "resident_layers": resident_layers,
            "offload_folder": _writable_folder("offload_folder", self.offload_folder),
        }


class CacheOptions(NamedTuple):
    """What a cache decides by itself, beside its pool's options."""

    max_batch_size: int | None
    max_cache_len: int | None
    sink_tokens: int


def check_cache_options(
    pool_options: PoolOptions,
    *,
    max_batch_size: Any,
    max_cache_len: Any,
    sink_tokens: Any,
    pool_given: bool,
) -> CacheOptions:
    """Check the options of a cache, and whether they go together.

    Args:
        pool_options: checked ones; with ``pool_given`` those that the caller gave beside the pool.
        pool_given: whether the caller gave a pool.

    Raises:
        TypeError, ValueError: an option is of the wrong kind, out of range, or not honoured in this mode.
    """
    options = CacheOptions(
        _limit("max_batch_size", max_batch_size),
        _limit("max_cache_len", max_cache_len),
        checked_integer("sink_tokens", sink_tokens),
    )
    if not 0 <= options.sink_tokens <= MAX_FIRST_TOKENS:
        raise ValueError(f"sink_tokens must be between 0 and {MAX_FIRST_TOKENS}, got {sink_tokens}")
    given = [name for name, value, default in zip(PoolOptions._fields, pool_options, PoolOptions()) if value != default]
    if pool_given and given:
        raise ValueError(
            f"{', '.join(given)}: {', '.join(PoolOptions._fields)} belong to the pool; give them to PagedInt8Pool"
        )
    if options.max_batch_size is None:
        return options
    if options.max_cache_len is None:
        raise ValueError(
            f"max_batch_size={options.max_batch_size} preallocates everything, which needs max_cache_len too; a cache "
            "that grows takes any batch size without being told"
        )
    if pool_given:
        raise ValueError("max_batch_size preallocates everything, which needs no pool; leave out one of the two")
    if pool_options.offloading:
        raise ValueError(
            "a preallocated cache does not offload layers: its memory stays at addresses that compiled steps know; a "
            "cache that grows does, leave out max_batch_size"
        )
    if pool_options.max_tokens is not None:
        raise ValueError(
            f"max_tokens={pool_options.max_tokens} limits a cache that grows; with max_batch_size all is allocated at "
            "once, and max_batch_size and max_cache_len are the limits"
        )
    return options


def check_device(device: Any, backend: str | None, block_size: int, format: str = INT8.name) -> None:
    """Raise ``ValueError`` for a device that this machine lacks, and for a backend that cannot serve ``device`` or, if
    that is ``None``, any device of this machine."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        resolve_backend(backend, checked_device(device), block_size, format=format)
    elif backend is not None:
        devices = [torch.device("cpu")] + ([accelerator] if accelerator is not None else [])
        if all(why_unavailable(backend, d, block_size, format=format) is not None for d in devices):
            resolve_backend(backend, devices[-1], block_size, format=format)


def decoder_config(config: Any) -> PreTrainedConfig:
    """The part of a model's config that describes the layers which hold keys: a multimodal model's text part, an
    encoder-decoder model's decoder.

    Raises:
        TypeError: this is no config. The message says how to get one.
    """
    if isinstance(config, PreTrainedConfig):
        return config.get_text_config(decoder=True)
    if config is None:
        what = "it got none"
    elif isinstance(config, type):
        what = f"it got the class {config.__name__} instead of an object"
    elif isinstance(config, str):
        what = f"it got the name {config!r}; without a model, AutoConfig.from_pretrained({config!r}) has its config"
    elif isinstance(config, dict):
        what = "it got a dict; AutoConfig.for_model(**values) makes a config of one with a model_type"
    elif isinstance(getattr(config, "config", None), PreTrainedConfig):
        what = f"it got the {type(config).__name__} itself"
    else:
        what = f"it got {_shown(config)}"
    raise TypeError(
        "PagedInt8Cache needs the model's config, which says how many layers there are and which have a window, and "
        f"{what}. Make it with PagedInt8Cache(model.config)"
    )


def checked_device(device: Any) -> torch.device:
    """The device, which this machine has.

    Raises:
        TypeError: this is no device.
        ValueError: this machine lacks it.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kinds = ["cpu"] + ([accelerator.type] if accelerator is not None else [])
    have = f"this machine has {' and '.join(kinds)}"
    try:
        asked = torch.device(device)
    except TypeError as error:
        raise TypeError(f"device must be a torch.device or its name, got {_shown(device)}; {have}") from error
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; {have}") from error
    count = 1 if accelerator is None else torch.accelerator.device_count()
    if asked.type not in (*kinds, "meta") or (asked.type == kinds[-1] and (asked.index or 0) >= count):
        raise ValueError(f"there is no device {str(asked)!r} here; {have}" + (f", {count} of it" if count > 1 else ""))
    return asked


def checked_integer(name: str, value: Any) -> int:
    """An option that is an integer of any library, as Python's own.

    Raises:
        TypeError: it is none.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        would_do = f"; {name}={int(value)} would do" if isinstance(value, float) and value.is_integer() else ""
        raise TypeError(f"{name} must be an integer, got {_shown(value)}{would_do}") from None


def _limit(name: str, value: Any) -> int | None:
    if value is None:
        return None
    limit = checked_integer(name, value)
    if limit < 1:
        raise ValueError(f"{name} must be at least 1, got {limit}; None sets no limit")
    return limit


def checked_bytes(name: str, value: Any) -> int | None:
    """A limit in bytes as an integer.

    Args:
        name: of the option.
        value: an integer, a text such as ``"8GiB"``, or None for no limit.

    Raises:
        TypeError, ValueError: anything else, or less than a byte.
    """
    if isinstance(value, str):
        try:
            value = parse_bytes(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return _limit(name, value)


def _writable_folder(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a folder or None, got {_shown(value)}; None takes the system's temporary one")
    if not os.fspath(value):
        raise ValueError(f"{name} is empty; None takes the system's temporary folder")
    folder = os.path.abspath(os.path.expanduser(value))  # it is used whenever the cache grows
    try:
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f"{name}: no file can be made in {folder!r}: {error.strerror}") from error


def _switch(name: str, value: Any) -> bool:
    # NumPy's own boolean is no subclass of Python's.
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
