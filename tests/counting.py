"""What a call does, counted: the same on a slow or busy machine, unlike the time that it takes."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Work(NamedTuple):
    """Python code that ran: entered functions (also of torch and the standard library), and executed bytecodes."""

    calls: int
    bytecodes: int


def python_work(call: Callable[[], object]) -> Work:
    """Functions entered and bytecodes executed by ``call``, itself included. What C code does is not seen."""
    # A collection in the middle would count what it calls: finalizers of what other tests have left.
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        return (_monitored if sys.version_info >= (3, 12) else _traced)(call)
    finally:
        if enabled:
            gc.enable()


def _traced(call: Callable[[], object]) -> Work:
    calls = bytecodes = 0

    def count(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal calls, bytecodes
        if event == "call":
            calls += 1
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            bytecodes += 1
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        call()
    finally:
        sys.settrace(before)
    return Work(calls, bytecodes)


def _monitored(call: Callable[[], object]) -> Work:
    """A trace function of Python 3.12 and 3.13 misses the bytecodes of a function that is traced for the first time."""
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined,unused-ignore]
    calls = bytecodes = 0

    def enter(*arguments: object) -> None:
        nonlocal calls
        calls += 1

    def execute(*arguments: object) -> None:
        nonlocal bytecodes
        bytecodes += 1

    events = monitoring.events
    callbacks = {events.PY_START: enter, events.PY_RESUME: enter, events.INSTRUCTION: execute}
    tool = monitoring.PROFILER_ID
    monitoring.use_tool_id(tool, __name__)
    try:
        for event, callback in callbacks.items():
            monitoring.register_callback(tool, event, callback)
        monitoring.set_events(tool, events.PY_START | events.PY_RESUME | events.INSTRUCTION)
        call()
    finally:
        monitoring.set_events(tool, events.NO_EVENTS)
        monitoring.free_tool_id(tool)
    return Work(calls, bytecodes)


class Operators(TorchDispatchMode):
    """Counts torch's operators, the tensors with memory of their own that they make, and copies to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()
        self.tensors_made = 0
        self.host_to_device = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        name = func.overloadpacket.__name__
        self.called[name] += 1
        given = [x for x in args if isinstance(x, torch.Tensor)]
        made = [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, torch.Tensor)]
        memory = {x.untyped_storage()._cdata for x in given}
        self.tensors_made += sum(x.untyped_storage()._cdata not in memory for x in made)
        if name in ("_to_copy", "copy_"):
            # `copy_` is given the tensor that it returns, and the source after it.
            self.host_to_device += given[-1].device.type == "cpu" and made[0].device.type != "cpu"
        return result


def operators(call: Callable[[], object]) -> Operators:
    """The torch operators that ``call`` runs."""
    with Operators() as counted:
        call()
    return counted
