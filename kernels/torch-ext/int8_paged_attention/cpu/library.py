"""Finds and loads the C library of the CPU backend, and chooses its instruction set."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .records import RECORDS

#: Set it to an instruction set's name to use that one and no other.
ISA_VARIABLE = "HF_INT8_PAGED_CPU_ISA"
ISA_NAMES = ("avx512vnni", "avxvnni", "avx2", "neon", "portable")
#: Set it to the path of another build of the library, one with sanitizers for instance.
LIBRARY_VARIABLE = "HF_INT8_PAGED_CPU_LIBRARY"
PATH = Path(__file__).with_name("_int8_paged_cpu.so")
REMEDY = "install GCC or Clang and reinstall hf-int8-paged"


class Library:
    """The C functions, or the reason why there are none (``missing``)."""

    append: Callable[[bytes, bytes], int]
    decode: Callable[[bytes, bytes], int]
    extend: Callable[[bytes, bytes], int]
    gather: Callable[[bytes, bytes], int]
    copy: Callable[[bytes, int, int, int], int]
    hadamard: Callable[[int, int, int, int], None]

    def __init__(self, path: Path) -> None:
        self.missing: str | None = None
        try:
            # CDLL, not PyDLL: other Python threads run while a kernel does.
            self._c = ctypes.CDLL(str(path))
        except OSError as error:
            reason = str(error) if path.exists() else "its C library was not built, as no compiler was found"
            self.missing = f"{reason}; {REMEDY}"
            return
        wrong = self._wrong_records()
        if wrong is not None:
            self.missing = f"{path} was built from other sources: {wrong}; reinstall hf-int8-paged"
            return
        size, pointer, struct = ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p
        self.append = self._function("append", size, struct, struct)
        self.decode = self._function("decode", size, struct, struct)
        self.extend = self._function("extend", size, struct, struct)
        self.gather = self._function("gather", size, struct, struct)
        self.copy = self._function("copy", size, struct, pointer, pointer, size)
        self.hadamard = self._function("hadamard", None, pointer, pointer, size, size)
        self._isa = self._function("isa", struct, size)
        self._select_isa = self._function("select_isa", size, struct)
        self._function("set_threads", None, pointer, pointer)(*_torch_threads())
        self.select_isa(os.environ.get(ISA_VARIABLE) or None)

    def _wrong_records(self) -> str | None:
        """What is wrong with the sizes of the structs that Python packs, if anything is."""
        try:
            size_of = self._function("record_size", ctypes.c_int64, ctypes.c_int64)
        except AttributeError:
            return "it does not tell the sizes of its records"
        for i, (name, record) in enumerate(RECORDS.items()):
            if size_of(i) != record.size:
                return f"its {name} has {size_of(i)} bytes, and {record.size} are packed"
        return None

    def _function(self, name: str, result: type | None, *arguments: type) -> Callable:
        function = getattr(self._c, f"int8_paged_{name}")
        function.restype, function.argtypes = result, arguments
        return function

    def isas(self) -> list[str]:
        """Instruction sets that this processor has, the fastest first."""
        names = (self._isa(i) for i in range(len(ISA_NAMES)))
        return [name.decode() for name in names if name is not None]

    def select_isa(self, name: str | None) -> None:
        """Use one instruction set, None the fastest. ``ValueError`` if the processor lacks it."""
        have = self.isas()
        wanted = have[0] if name is None else name
        if not self._select_isa(wanted.encode()):
            what = "this processor lacks" if wanted in ISA_NAMES else "there is no"
            raise ValueError(f"{what} instruction set {wanted!r} ({ISA_VARIABLE}); available: {', '.join(have)}")
        self.isa = wanted


def load() -> Library:
    """The library beside this file, or the one that ``HF_INT8_PAGED_CPU_LIBRARY`` names.

    Raises:
        ValueError: ``HF_INT8_PAGED_CPU_ISA`` names an instruction set that the processor lacks.
    """
    return Library(Path(os.environ.get(LIBRARY_VARIABLE) or PATH))


def _torch_threads() -> tuple[int | None, int | None]:
    """Addresses of libtorch's functions that share work among its threads, None where it has none."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    try:
        libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        functions = libtorch.torch_parallel_for, libtorch.torch_get_num_threads
    except (OSError, AttributeError):
        return None, None
    parallel_for, thread_count = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    return parallel_for, thread_count
