"""Read what a GPU's compiler made of a kernel: registers, spills, and the instructions of its main loop."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton


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
#: 8 TB/s, 148, 1.93 GHz.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared_memory=164 * 1024, bytes_per_cycle_needed=13.1),
    "sm_90": Multiprocessor(shared_memory=228 * 1024, bytes_per_cycle_needed=14.5),
    "sm_100": Multiprocessor(shared_memory=228 * 1024, bytes_per_cycle_needed=28.0),
}

#: Instruction classes by the opcode's beginning; the first that matches counts.
CLASSES = {
    "tensor core": r"[IHQDO]MMA|[QHI]GMMA|UTC.*MMA",
    "conversion": r"I2F|F2I|F2F|HADD2\.F32|PRMT|I2I",
    "memory": r"LD|ST|ATOM|RED|CCTL",
    "barrier": r"BAR|DEPBAR|WARPSYNC|SYNCS|ARRIVES|MEMBAR",
    "shuffle": r"SHFL",
    "control": r"BRA|EXIT|CALL|RET|BSSY|BSYNC|NOP|JMP|YIELD",
    "float": r"F(ADD|MUL|FMA|MNMX|SEL|SETP|SET|CHK|RND)|H(ADD|MUL|FMA)|MUFU",
    "integer": r"",
}
SPILL = re.compile(r"(LDL|STL)\b")
GLOBAL_LOAD = re.compile(r"LDG\.E(?:\.\w+)*?(?:\.(64|128|U8|U16|S8|S16))?(?:\.\w+)*$")
WIDTHS = {None: 4, "64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


@dataclass
class Program:
    """Opcodes of a disassembled kernel, in order, and where its backward branches lead."""

    opcodes: list[str] = field(default_factory=list)
    loops: list[tuple[int, int]] = field(default_factory=list)

    @staticmethod
    def parse(sass: str) -> Program:
        """Parse the output of ``nvdisasm -c``."""
        program, labels, branches = Program(), {}, []
        for line in sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(program.opcodes)
            elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*?);", line):
                if target := re.search(r"`\((\.L_x_\d+)\)", instruction[2]):
                    branches.append((target[1], len(program.opcodes)))
                program.opcodes.append(instruction[1])
        program.loops = [(labels[t], at) for t, at in branches if t in labels and labels[t] < at]
        return program

    def main_loop(self) -> list[str]:
        """Opcodes of the loop with the most matrix products, or else the most memory instructions."""

        def work(loop: tuple[int, int]) -> tuple[int, int]:
            count = Counter(class_of(opcode) for opcode in self.opcodes[loop[0] : loop[1] + 1])
            return count["tensor core"], count["memory"]

        if not self.loops:
            raise ValueError("the kernel has no loop")
        first, last = max(self.loops, key=work)
        return self.opcodes[first : last + 1]


def class_of(opcode: str) -> str:
    return next(name for name, pattern in CLASSES.items() if re.match(pattern, opcode))


def load_widths(opcodes: list[str]) -> dict[int, int]:
    """Bytes per thread of each global load -> how many such loads."""
    found = Counter(WIDTHS[match[1]] for opcode in opcodes if (match := GLOBAL_LOAD.match(opcode)))
    return dict(sorted(found.items()))


def tool(name: str, *arguments: str) -> str:
    """Output of a binary tool that comes in the triton wheel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def audit_cubin(kernel: Any, multiprocessor: Multiprocessor) -> dict[str, Any]:
    """Figures of a kernel that triton compiled for an NVIDIA chip.

    The main loop is counted whole, with the parts that a branch skips most of the time, so the count is an upper bound.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        program = Program.parse(tool("nvdisasm", "-c", file.name))
    resources = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if resources is None:
        raise ValueError(f"cannot read the resource usage of cuobjdump: {usage!r}")
    registers, stack, local = map(int, resources.groups())
    warps, shared_memory = kernel.metadata.num_warps, kernel.metadata.shared
    loop = program.main_loop()
    counts = Counter(class_of(opcode) for opcode in loop)
    return {
        "registers": registers,
        "stack_bytes": stack + local,
        "spill_instructions": sum(bool(SPILL.match(opcode)) for opcode in program.opcodes),
        "spill_instructions_in_loop": sum(bool(SPILL.match(opcode)) for opcode in loop),
        "shared_memory_bytes": shared_memory,
        "warps": warps,
        "blocks_per_multiprocessor": multiprocessor.resident_blocks(registers, shared_memory, warps),
        "loop_instructions": len(loop),
        "loop_by_class": {name: counts[name] for name in CLASSES if counts[name]},
        "loop_loads_by_bytes_per_thread": load_widths(loop),
    }


def audit_hsaco(kernel: Any) -> dict[str, Any]:
    """Registers and spills of a kernel that triton compiled for an AMD chip."""
    found = dict(re.findall(r"\.(\w+):\s*(\d+)", kernel.asm["amdgcn"]))
    return {
        "vector_registers": int(found["vgpr_count"]),
        "scalar_registers": int(found["sgpr_count"]),
        "spills": int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"]),
        "stack_bytes": int(found["private_segment_fixed_size"]),
        "shared_memory_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }
