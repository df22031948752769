"""Read what a GPU's compiler made of a kernel: registers, spills, and the instructions of its main loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from _amdgcn import parse as parse_amdgcn
from _memory_trips import outside, trips
from _sass import CLASSES, Program, load_widths, store_widths


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor, and the bytes it must take in per cycle for its chip's memory to be saturated."""

    shared_memory: int
    bytes_per_cycle_needed: float
    registers: int = 65536
    max_warps: int = 64
    max_blocks: int = 32

    def resident_blocks(self, registers: int, shared_memory: int, warps: int) -> int:
        """Blocks of ``warps`` warps that fit; each quarter of a multiprocessor gives its registers in units of 256."""
        warps_per_quarter = self.registers // 4 // (-(-registers * 32 // 256) * 256)
        reserved = 1024  # shared memory that the system takes per block
        return min(
            4 * warps_per_quarter // warps,
            self.shared_memory // (shared_memory + reserved),
            self.max_warps // warps,
            self.max_blocks,
        )


#: Memory bandwidth over multiprocessors and clock: A100 2.04 TB/s, 108, 1.41 GHz; H100 3.35 TB/s, 132, 1.75 GHz; B200
#: 8 TB/s, 148, 1.93 GHz. sm_103
#: (B300) is taken to be as sm_100.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared_memory=164 * 1024, bytes_per_cycle_needed=13.1),
    "sm_90": Multiprocessor(shared_memory=228 * 1024, bytes_per_cycle_needed=14.5),
    "sm_100": Multiprocessor(shared_memory=228 * 1024, bytes_per_cycle_needed=28.0),
    "sm_103": Multiprocessor(shared_memory=228 * 1024, bytes_per_cycle_needed=28.0),
}


def tool(name: str, *arguments: str) -> str:
    """Output of a binary tool that comes in the triton wheel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def disassemble(kernel: Any) -> tuple[Program, dict[str, int]]:
    """A kernel that triton compiled for an NVIDIA chip: its program, and what it takes of a multiprocessor."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        program = Program.parse(tool("nvdisasm", "-c", "-hex", file.name))
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if resources is None:
        raise ValueError(f"cannot read the resource usage of cuobjdump: {usage!r}")
    registers, stack, local = map(int, resources.groups())
    return program, {
        "registers": registers,
        "stack_bytes": stack + local,
        "spill_instructions": sum(each.spills for each in program.instructions),
        "shared_memory_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


def resident_blocks(resources: dict[str, int], multiprocessor: Multiprocessor) -> int:
    return multiprocessor.resident_blocks(resources["registers"], resources["shared_memory_bytes"], resources["warps"])


def audit_cubin(kernel: Any, multiprocessor: Multiprocessor) -> dict[str, Any]:
    """Figures of a kernel that triton compiled for an NVIDIA chip, and of its main loop.

    The main loop is counted whole, with the parts that a branch skips most of the time, so the count is an upper bound.
    """
    program, resources = disassemble(kernel)
    return resources | {
        "blocks_per_multiprocessor": resident_blocks(resources, multiprocessor),
        **loop_figures(program),
    }


def audit_whole(kernel: Any, multiprocessor: Multiprocessor) -> dict[str, Any]:
    """Figures of a kernel that triton compiled for an NVIDIA chip, which need not have a loop."""
    program, resources = disassemble(kernel)
    loops = program.loops()
    return resources | {
        "blocks_per_multiprocessor": resident_blocks(resources, multiprocessor),
        "instructions": sum(each.opcode != "NOP" for each in program.instructions),
        "instructions_without_slow_paths": len(program.usual_path()),
        "stores_by_bytes_per_thread": store_widths(program.instructions),
        "loops": len(loops),
        **(loop_figures(program) if loops else {}),
    }


def loop_figures(program: Program) -> dict[str, Any]:
    """What the main loop issues and waits for, and what lies outside of it."""
    in_loop = program.main_loop()
    loop, once = program.select(in_loop), outside(program, in_loop)
    waits = trips(loop)
    counts = Counter(each.kind for each in loop)
    return {
        "spill_instructions_in_loop": sum(each.spills for each in loop),
        "barriers_in_loop": sum(each.opcode.startswith("BAR.SYNC") for each in loop),
        "shared_memory_stores_in_loop": sum(each.opcode.startswith("STS") for each in loop),
        "loop_instructions": len(loop),
        "loop_by_class": {name: counts[name] for name in CLASSES if counts[name]},
        "loop_loads_by_bytes_per_thread": load_widths(loop),
        "dependent_trips": len(waits),
        "bytes_per_thread_by_trip": waits,
        "instructions_outside_loop": len(once),
        "barriers_outside_loop": sum(each.opcode.startswith("BAR.SYNC") for each in once),
    }


def audit_hsaco(kernel: Any) -> dict[str, Any]:
    """Registers and spills of a kernel that triton compiled for an AMD chip, and the barriers of its main loop."""
    program = parse_amdgcn(kernel.asm["amdgcn"])
    loop = program.select(program.main_loop())
    found = dict(re.findall(r"\.(\w+):\s*(\d+)", kernel.asm["amdgcn"]))
    return {
        "vector_registers": int(found["vgpr_count"]),
        "scalar_registers": int(found["sgpr_count"]),
        "spills": int(found["vgpr_spill_count"]),
        "scalars_kept_in_vector_registers": int(found["sgpr_spill_count"]),
        "stack_bytes": int(found["private_segment_fixed_size"]),
        "loop_instructions": len(loop),
        "barriers_in_loop": sum(each.opcode.startswith("BAR.SYNC") for each in loop),
        "shared_memory_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }
