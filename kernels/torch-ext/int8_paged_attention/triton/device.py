"""Which GPU a Triton kernel runs on: always the one that holds the tensors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton

from .tuning import Chip

#: Triton decides when a kernel is defined whether it will be interpreted.
INTERPRETED = triton.knobs.runtime.interpret
#: The first release that leaves the decode kernel's order of operands alone; before it K and V pass through shared
#: memory (docs/gpu_versions.json).
LAYOUTS_KEPT = (3, 7)


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind a device; the interpreter has one multiprocessor. Warns, once, of a Triton that is slow on it."""
    if INTERPRETED:
        return Chip("interpreter", 1)
    properties = torch.get_device_module(device).get_device_properties(device)
    processors = getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
    if device.type != "cuda":
        return Chip(properties.name, processors)
    # AMD's names end in options of the chip, "gfx942:sramecc+:xnack-".
    name = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    if name:
        return Chip(name.split(":")[0], processors)
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < LAYOUTS_KEPT:
        warnings.warn(
            f"under triton {triton.__version__} decode attention passes K and V through shared memory, with a barrier "
            "at every step: its results are the same, but it is slower than it need be. torch 2.12 and newer bring "
            f"triton {'.'.join(map(str, LAYOUTS_KEPT))} or newer",
            stacklevel=2,
        )
    return Chip(f"sm_{properties.major}{properties.minor}", processors)


@functools.cache
def device_count(kind: str) -> int:
    """How many devices of a type this process has."""
    return torch.get_device_module(kind).device_count()


def launch_on(device: torch.device, launch: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Call ``launch`` while ``device`` is the current one: Triton launches on that one, in its stream.
    Nothing changes where it is current already, and with a single device nothing is asked."""
    if device.type in ("cuda", "xpu") and device_count(device.type) > 1:
        module = torch.get_device_module(device)
        if device.index != module.current_device():
            with module.device(device):
                return launch(*arguments, **options)
    return launch(*arguments, **options)
