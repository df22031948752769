"""What this machine has, which backend serves which device, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
import warnings
from typing import Any

import torch

from ..kernels import BACKENDS, resolve_backend, why_unavailable
from ..kernels.cpu import library as cpu_library

_DEMO_MODULES = ("filelock", "gguf", "platformdirs", "rich")


def collect() -> dict[str, Any]:
    """Versions, devices with their backends, CPU instruction sets, and what is missing, as plain JSON types.

    ``devices`` has an entry for each kind of device that a backend is made for, present or not: ``backend`` is the
    one that serves it by default, ``unavailable`` says why each other one cannot.
    """
    names = ("hf-int8-paged", "torch", "transformers", "accelerate", "triton")
    cpu = _cpu_instruction_sets()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = [_device("cpu", 1, _processor_name())]
    if accelerator is not None:
        module, count = torch.get_device_module(accelerator), torch.accelerator.device_count()
        devices.append(_device(accelerator.type, count, str(module.get_device_name(0))))
    else:
        devices.append(_device("cuda", 0, None))
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}},
        "platform": f"{platform.system()} {platform.machine()}",
        "torch_threads": torch.get_num_threads(),
        "devices": devices,
        "cpu_instruction_sets": cpu,
        "missing": _missing(cpu, devices),
    }


def as_text(info: dict[str, Any]) -> str:
    """`collect`'s result for a person to read."""
    versions = {name: version or "not installed" for name, version in info["versions"].items()}
    lines = [f"{name:<14} {version}" for name, version in versions.items()]
    lines += [f"{'platform':<14} {info['platform']}, torch uses {info['torch_threads']} threads"]
    cpu = info["cpu_instruction_sets"]
    if cpu["available"]:
        others = [name for name in cpu["available"] if name != cpu["used"]]
        also = f" (also runs: {', '.join(others)}; {cpu_library.ISA_VARIABLE} chooses)" if others else ""
        lines += [f"{'CPU kernels':<14} {cpu['used']}{also}"]
    for device in info["devices"]:
        what = device["name"] if device["count"] == 1 else f"{device['count']} x {device['name']}"
        present = what if device["count"] else "none on this machine"
        lines += ["", f"{device['type']}: {present}"]
        lines += [f"  {'served by' if device['count'] else 'would be served by'} {device['backend']!r}"]
        lines += [f"  not by {name!r}: {reason}" for name, reason in device["unavailable"].items()]
        lines += [f"  on request by {name!r}" for name in device["on_request"]]
    lines += ["", "missing:" if info["missing"] else "nothing is missing"]
    lines += [f"  {item['what']}\n    -> {item['remedy']}" for item in info["missing"]]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cpu_instruction_sets() -> dict[str, Any]:
    """The instruction sets that the C kernels can use here, the one they do use, or the reason why they cannot run."""
    try:
        library = cpu_library.load()
    except ValueError as error:
        return {"used": None, "available": [], "problem": str(error)}
    if library.missing is not None:
        return {"used": None, "available": [], "problem": library.missing}
    available = library.isas()
    return {"used": library.isa, "available": available, "problem": None}


def _device(kind: str, count: int, name: str | None) -> dict[str, Any]:
    device = torch.device(kind)
    reasons = {backend: _why_unavailable(backend, device) for backend in BACKENDS}
    try:
        serving = resolve_backend(None, device).NAME
    except ValueError:
        # A forced instruction set that the processor lacks stops the cpu backend and so the choice.
        serving = None
    return {
        "type": kind,
        "count": count,
        "name": name,
        "backend": serving,
        "unavailable": {backend: reason for backend, reason in reasons.items() if reason is not None},
        "on_request": [backend for backend, reason in reasons.items() if reason is None and backend != serving],
    }


def _why_unavailable(backend: str, device: torch.device) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return why_unavailable(backend, device)
        except ValueError as error:
            return str(error)


def _missing(cpu: dict[str, Any], devices: list[dict[str, Any]]) -> list[dict[str, str]]:
    missing = []
    if cpu["problem"] is not None:
        what, _, remedy = cpu["problem"].rpartition("; ")
        missing.append({"what": f"the C kernels of the 'cpu' backend: {what}", "remedy": remedy})
    if _version("triton") is None and sys.platform == "linux":
        missing.append({"what": "triton, for GPUs", "remedy": "pip install 'triton>=3.6'"})
    demo = [name for name in _DEMO_MODULES if importlib.util.find_spec(name) is None]
    if demo:
        missing.append({"what": f"for the demo: {', '.join(demo)}", "remedy": "pip install 'hf-int8-paged[demo]'"})
    if devices[1]["count"] and devices[1]["backend"] == "reference":
        reason = "; ".join(devices[1]["unavailable"].values())
        missing.append(
            {"what": f"a fast backend for {devices[1]['type']}: {reason}", "remedy": "install what it names"}
        )
    return missing
