"""Compile Triton kernels for GPUs that this machine does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

#: What the kernels are compiled for where no GPU is at hand.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_103": GPUTarget("cuda", 103, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _OfflineDriver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"offline {self.target.arch}"  # key of the cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0


class Launch(NamedTuple):
    """With what a kernel would have been launched."""

    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the kernel's parameters


class _LaunchingDriver(_OfflineDriver):
    """As much of a Triton driver as launches ask for: it loads nothing, and notes what its launchers are given."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *arguments: ("module", object(), 32, 0, 1024),
        unload_module=lambda module: None,
    )

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.launched: list[tuple[Any, ...]] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            self.launched.append(arguments)

        return launch

    def get_current_device(self) -> str:
        return f"{self.target.arch} that is not there, {id(self)}"


@contextmanager
def launching_nothing(target: GPUTarget) -> Iterator[list[tuple[Any, ...]]]:
    """Inside, launching a Triton kernel compiles it for ``target`` and goes all the way to its launcher, which does
    nothing.

    Yields a list of what the launchers are given: three sizes of the grid, stream, loaded kernel, metadata, three
    places for hooks, and the kernel's arguments.
    """
    previous = driver._active
    machine = _LaunchingDriver(target)
    driver.set_active(machine)
    try:
        yield machine.launched
    finally:
        driver._active = previous


@contextmanager
def compiling_for(target: GPUTarget, launches: list[Launch] | None = None) -> Iterator[list[tuple[str, Any]]]:
    """Inside, launching a Triton kernel compiles it for ``target`` and runs nothing.

    Tensor arguments may live on the CPU: only their dtypes, strides and alignment count, and the launchers' own code
    chooses the constants. Yields a list that collects (kernel's name, compiled kernel) of every launch;
    ``launches`` collects the rest of it.
    """
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        compiled.append((self.__name__, kernel))
        if launches is not None:
            launches.append(Launch(tuple(kwargs["grid"]), dict(zip(self.arg_names, args)) | kwargs))
        return kernel

    previous = driver._active
    driver.set_active(_OfflineDriver(target))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = previous
