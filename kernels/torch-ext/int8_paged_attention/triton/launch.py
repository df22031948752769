"""Launches of compiled kernels, without Triton's search for them.

`JITFunction.run` works out anew what each argument compiles to. Here a kind of launch is known by what Triton tells
apart; the first launch of a kind goes through `run`, later ones call the launcher of the kernel that it returned, as
`run` does in triton 3.6 to 3.9. Knobs that change later count for new kinds only. On other versions all launches go
through `run`, and so they do on AMD, whose kernels also depend on tensors' sizes, and where hooks want to see them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .device import INTERPRETED

#: Versions whose interface was read.
LAUNCHES_DIRECTLY = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)


class Compiled(NamedTuple):
    """What the launches of one kind need.

    Attributes:
        driver: of Triton, which loaded the kernel; ``None`` where launches go through `JITFunction.run`.
        run: the kernel's launcher.
        function: handle of the loaded kernel.
        metadata: what the launcher must know of it.
        constants: those of the kernel, in order.
    """

    driver: Any = None
    run: Any = None
    function: Any = None
    metadata: Any = None
    constants: tuple[Any, ...] = ()


#: By kind of launch. A process has few kinds: constants do not depend on lengths.
_COMPILED: dict[tuple[Any, ...], Compiled] = {}


def launch(kernel: JITFunction, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on the current device, which holds the tensors, in its current stream.

    Args:
        kernel: a jitted function whose constants are its last parameters.
        grid: one to three numbers of programs.
        arguments: all others, in order.
        constants: the constants, and options of the compiler.

    Raises:
        RuntimeError: a CUDA graph is being captured, and this kind of launch was not compiled. Nothing is launched.
    """
    if INTERPRETED:
        kernel[grid](*arguments, **constants)
        return
    kind = kind_of(kernel, arguments, constants)
    known = _COMPILED.get(kind)
    if known is None or (known.driver is not None and known.driver is not driver.active):
        refuse_in_a_capture(kernel)
        compiled = kernel[grid](*arguments, **constants)
        _COMPILED[kind] = remembered(kernel, compiled, arguments, constants)
    elif known.driver is None or watched(kernel):
        kernel[grid](*arguments, **constants)
    else:
        x, y, z = (*grid, 1, 1)[:3]
        stream = known.driver.get_current_stream(arguments[0].device.index)
        known.run(x, y, z, stream, known.function, known.metadata, None, None, None, *arguments, *known.constants)


def watched(kernel: JITFunction) -> bool:
    """Whether a hook wants to see each launch."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(kernel.pre_run_hooks or getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def kind_of(kernel: JITFunction, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton may compile anew for: constants, types, whether 16 divides an address or a whole number, whether a
    number is 1 or needs 64 bits. A kernel may be told to overlook some of it, which makes more kinds than kernels."""
    return (
        kernel,
        arguments[0].device,
        *constants.values(),
        *[
            (x.dtype if not x.data_ptr() & 15 else (x.dtype,))
            if isinstance(x, torch.Tensor)
            else (x == 1) + 2 * (not x & 15) + 4 * (x >> 31)
            if type(x) is int
            else type(x)
            for x in arguments
        ],
    )


def remembered(kernel: JITFunction, compiled: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Compiled:
    """What later launches of this kind need. Only a driver that launches has a launcher."""
    if not LAUNCHES_DIRECTLY or torch.version.hip is not None or not hasattr(compiled, "packed_metadata"):
        return Compiled()
    if not hasattr(driver.active, "launcher_cls"):
        return Compiled()
    own = tuple(constants[parameter.name] for parameter in kernel.params[len(arguments) :])
    return Compiled(driver.active, compiled.run, compiled.function, compiled.packed_metadata, own)


def refuse_in_a_capture(kernel: JITFunction) -> None:
    """Raise ``RuntimeError`` while a CUDA graph is being captured."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel.__name__} has not been compiled for such a call, and cannot be while a CUDA graph is captured; "
            "make the same call once before capturing it"
        )
