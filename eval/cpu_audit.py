"""Static audit of the CPU backend's decode attention: what the inner loops issue per 64 bytes of K or V.

Compiles the C files as setup.py does, once per instruction set of x86 and for 64-bit Arm's, disassembles them and
counts the innermost loops of both products, the shortest way through each: what is taken only when a run of prefetches
ends is left out. Vector operations are those that an arithmetic unit executes; loads, broadcasts from memory and moves
that renaming removes need none; on Arm a broadcast from memory does.

    python eval/cpu_audit.py --json docs/cpu_audit.json

`make cpu-audit` does this. It needs GCC or Clang (CC), objdump, an x86 processor, and for NEON a cross compiler
with its objdump (ARM_CC, Debian: gcc-aarch64-linux-gnu).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
#: Instruction sets: bytes of a register, and dot product instructions per register of K or V and query row.
SETS = {"avx2": (32, 2), "avxvnni": (32, 2), "avx512vnni": (64, 2), "neon": (16, 2)}
DOT = re.compile(r"vpmaddwd|vpdpbusd|sdot")
#: Classes by the beginning of the mnemonic; the first that matches counts.
CLASSES = {
    "multiply": r"vpmadd|vpdp",
    "add": r"vpadd",
    "shift": r"vps[rl]",
    "logic": r"vpxor|vpand|vpternlog",
    "broadcast": r"vpbroadcast|vbroadcast",
    "prefetch": r"prefetch",
    "move": r"vmov",
    "scalar": r"",
}
VECTOR_OPERATIONS = ("multiply", "add", "shift", "logic")
#: The same for Arm, by the beginning of mnemonic and operands.
ARM_CLASSES = {
    "multiply": r"sdot",
    "broadcast": r"ld\dr|dup",
    "move": r"(ld|st)\w+ \{?[vq]|mov[ai]? v",
    "add": r"add v",
    "logic": r"\w+ v",
    "prefetch": r"prfm",
    "scalar": r"",
}
ARM_VECTOR_OPERATIONS = ("multiply", "broadcast", "add", "logic")
#: Units of a core for registers of 32 bytes: of all vector operations, of multiplications, and of multiplications and
#: shifts together. From Agner Fog's instruction tables (https://www.agner.org/optimize/).
UNITS = {
    "Zen 2": {"vector": 4, "multiply": 1, "multiply_shift": 3},
    "Zen 3 to 5": {"vector": 4, "multiply": 2, "multiply_shift": 4},
    "Skylake to Alder Lake": {"vector": 3, "multiply": 2, "multiply_shift": 2},
}
#: Units of a core for registers of 16 bytes, each of which takes SDOT, and instructions that it takes in per cycle.
#: From Arm's software optimization guides and, for Apple, https://dougallj.github.io/applecpu/firestorm.html.
ARM_UNITS = {
    "Cortex-A76, Neoverse N1": {"vector": 2, "instructions": 4},
    "Neoverse V1, Apple M1": {"vector": 4, "instructions": 8},
}


@dataclass
class Instruction:
    address: int
    mnemonic: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a jump leads."""
        if not re.match(r"j\w+$|b(\.\w+)?$|cbn?z$|tbn?z$", self.mnemonic):
            return None
        return int(self.operands.split(" <")[0].split(",")[-1], 16)

    @property
    def kind(self) -> str:
        return next(name for name, beginning in CLASSES.items() if re.match(beginning, self.mnemonic))

    @property
    def arm_kind(self) -> str:
        text = f"{self.mnemonic} {self.operands}"
        return next(name for name, beginning in ARM_CLASSES.items() if re.match(beginning, text))


def compiler_of(isa: str) -> list[str]:
    variable, usual = ("ARM_CC", "aarch64-linux-gnu-gcc") if isa == "neon" else ("CC", "gcc")
    return shlex.split(os.environ.get(variable, usual))


def compiler(isa: str = "avx2") -> str:
    """Its name and version, in its own words."""
    command = [*compiler_of(isa), "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def disassemble(isa: str, folder: Path) -> dict[str, list[Instruction]]:
    """Functions of one instruction set's object file."""
    flags = runpy.run_path(str(ROOT / "setup.py"))["FLAGS"]
    source = ROOT / runpy.run_path(str(ROOT / "setup.py"))["SOURCES"] / f"isa_{isa}.c"
    built = folder / f"{isa}.o"
    objdump = "aarch64-linux-gnu-objdump" if isa == "neon" else "objdump"
    subprocess.run([*compiler_of(isa), *flags, "-Wno-psabi", "-fPIC", "-c", source, "-o", built], check=True)
    listing = subprocess.run([objdump, "-d", "--no-show-raw-insn", built], check=True, capture_output=True, text=True)
    functions: dict[str, list[Instruction]] = {}
    for line in listing.stdout.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            functions[head[1]] = current = []
        elif found := re.match(r"\s+([0-9a-f]+):\s+(?:\{vex\} )?([\w.]+)\s*(.*?)(?:\s+(?:#|//) .*)?$", line):
            current.append(Instruction(int(found[1], 16), found[2], found[3]))
    return functions


def flow(code: list[Instruction]) -> dict[int, list[int]]:
    """Which instructions may follow each one."""
    at = {instruction.address: i for i, instruction in enumerate(code)}
    after: dict[int, list[int]] = {}
    for i, instruction in enumerate(code):
        following = [] if instruction.mnemonic in ("jmp", "b", "ret") or i + 1 == len(code) else [i + 1]
        if instruction.target in at:
            following.append(at[instruction.target])
        after[i] = following
    return after


def shortest_way(after: dict[int, list[int]], start: int, end: int) -> list[int] | None:
    """The fewest instructions from one to another, both included."""
    before: dict[int, int] = {start: start}
    layer = [start]
    while layer and end not in before:
        following = []
        for i in layer:
            for j in after[i]:
                if j not in before:
                    before[j] = i
                    following.append(j)
        layer = following
    if end not in before:
        return None
    way = [end]
    while way[-1] != start:
        way.append(before[way[-1]])
    return way[::-1]


def inner_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops with dot products, by address: cycles that share no dot with a shorter one."""
    after = flow(code)
    cycles = []
    for i, instruction in enumerate(code):
        for j in after[i]:
            way = shortest_way(after, j, i) if j <= i and instruction.mnemonic not in ("jmp", "b") else None
            if way and any(DOT.match(code[k].mnemonic) for k in way):
                cycles.append(way)
    cycles.sort(key=len)
    taken: set[int] = set()
    found = []
    for way in cycles:
        dots = {k for k in way if DOT.match(code[k].mnemonic)}
        if not dots & taken:
            taken |= dots
            found.append(way)
    return [[code[k] for k in way] for way in sorted(found, key=min)]


def figures(isa: str, rows: int, loop: list[Instruction]) -> dict[str, Any]:
    register, dots_per_register = SETS[isa]
    arm = isa == "neon"
    counts = Counter(instruction.arm_kind if arm else instruction.kind for instruction in loop)
    size = sum(bool(DOT.match(x.mnemonic)) for x in loop) / (rows * dots_per_register) * register
    per_64 = {name: round(64 / size * counts[name], 2) for name in (ARM_CLASSES if arm else CLASSES) if counts[name]}
    vector = sum(per_64.get(name, 0) for name in (ARM_VECTOR_OPERATIONS if arm else VECTOR_OPERATIONS))
    multiply, shift = per_64["multiply"], per_64.get("shift", 0)
    work = {
        "instructions": 64 / size * len(loop),
        "vector": vector,
        "multiply": multiply,
        "multiply_shift": multiply + shift,
    }
    cores = {16: ARM_UNITS, 32: UNITS}.get(register, {})
    cycles = {core: max(work[unit] / count for unit, count in units.items()) for core, units in cores.items()}
    return {
        "isa": isa,
        "rows": rows,
        "bytes": int(size),
        "instructions": round(64 / size * len(loop), 2),
        "vector_operations": round(vector, 2),
        "stack": round(64 / size * sum(bool(re.search(r"\(%rsp|\[sp", x.operands)) for x in loop), 2),
        **per_64,
        "bytes_per_cycle_at_most": {core: round(64 / bound, 1) for core, bound in cycles.items()},
    }


def audit(isa: str, folder: Path) -> list[dict[str, Any]]:
    """Both products of every number of query rows that share a tile. Keys come first; behind them lie loops for what
    is left over, and the widest of those that follow is the one for values."""
    rows = []
    for name, code in sorted(disassemble(isa, folder).items()):
        if found := re.match(r"attend_rows_(\d)$", name):
            keys, *others = (figures(isa, int(found[1]), loop) for loop in inner_loops(code))
            rows.append({"product": "keys", **keys})
            rows.append({"product": "values", **max(others, key=lambda loop: loop["bytes"])})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("isa", "rows", "product", "instructions", "vector_operations", "stack")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(str(row[name]) for name in columns)} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for isa in SETS for row in audit(isa, Path(folder))]
    print(table(rows))
    if arguments.json:
        compilers = {"compiler": compiler(), "arm_compiler": compiler("neon")}
        head = {"command": shlex.join(["python", *sys.argv]), **compilers}
        lines = ",\n".join(json.dumps(row) for row in rows)
        arguments.json.write_text(json.dumps(head, indent=1)[:-2] + f',\n "loops": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
