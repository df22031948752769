"""NVIDIA machine code as ``nvdisasm -c -hex`` prints it: instructions, the registers they touch, and loops."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import networkx

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
#: Bytes per thread of a load or store by its opcode's suffix, 4 without one.
WIDTHS = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
#: Registers of the operands (result, left, right, added) of matrix products, by the opcode's beginning.
MATRIX_REGISTERS = {
    "IMMA.16832": (4, 4, 2, 4),
    "IMMA.16816": (4, 2, 1, 4),
    "HMMA.16816.F32": (4, 4, 2, 4),
    "HMMA.16816": (2, 4, 2, 2),
    "HMMA.1688.F32": (4, 2, 1, 4),
}

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([^\s;]+)\s*(.*?)\s*;")
UPPER_HALF = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
BRANCH_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
REGISTER = re.compile(r"(?<![A-Za-z])R(\d+)(\S*)")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str = ""
    predicate: str = ""

    @property
    def kind(self) -> str:
        """Its class in `CLASSES`."""
        return next(name for name, pattern in CLASSES.items() if re.match(pattern, self.opcode))

    @property
    def spills(self) -> bool:
        """Whether it moves a register to or from the stack."""
        return self.opcode.startswith(("LDL", "STL"))

    @property
    def loads_global_memory(self) -> bool:
        return self.opcode.startswith(("LDG", "LD.E"))

    @property
    def bytes_per_thread(self) -> int:
        """What a load or store moves for one thread."""
        return next((WIDTHS[part] for part in self.opcode.split(".") if part in WIDTHS), 4)

    @cached_property
    def registers_by_operand(self) -> tuple[frozenset[int], ...]:
        """Vector registers of each operand; an operand of 8 or 16 bytes names the first of 2 or 4."""
        parts = [part.strip() for part in self.operands.split(",")]
        return tuple(
            frozenset(
                register
                for first, suffix in REGISTER.findall(part)
                for register in range(int(first), int(first) + self._count(at, len(parts), part, suffix))
            )
            for at, part in enumerate(parts)
        )

    def _count(self, at: int, operands: int, operand: str, suffix: str) -> int:
        """Consecutive registers of operand number ``at``."""
        opcode = self.opcode
        if operand.startswith(("[", "desc[")):
            return 2 if ".64" in suffix else 1  # an address
        if matrix := next((n for name, n in MATRIX_REGISTERS.items() if opcode.startswith(name)), None):
            return matrix[at]
        if accumulators := re.match(r"[QHI]GMMA\.64x(\d+)x", opcode):
            return int(accumulators[1]) // 2 if at == 0 or at == operands - 1 else 4
        if matrices := re.match(r"(?:LD|ST)SM.*\.([124])$", opcode):
            return int(matrices[1])
        if re.match(r"LD|ST|RED|ATOM", opcode):
            return max(1, self.bytes_per_thread // 4)
        wide = ".WIDE" in opcode and at in (0, operands - 1)
        pair = re.match(r"CS2R(?!\.32)|[FD](ADD|MUL|FMA)2$|D(ADD|MUL|FMA)|IADD\.64|MOV\.64", opcode)
        return 2 if wide or (pair and not suffix.endswith(".F32")) else 1

    @property
    def registers(self) -> frozenset[int]:
        """All vector registers that it reads or writes."""
        return frozenset().union(*self.registers_by_operand)

    @property
    def loaded_registers(self) -> frozenset[int]:
        """Those that a load fills: its first operand that names a register."""
        return next((registers for registers in self.registers_by_operand if registers), frozenset())


@dataclass
class Program:
    """A disassembled kernel's instructions, in order, and where its branches lead (indices of instructions)."""

    instructions: list[Instruction] = field(default_factory=list)
    branches: list[tuple[int, int]] = field(default_factory=list)  # from, to
    #: Of each instruction, the upper 23 of its 128 bits, which schedule it (`_warp_simulator.py`); empty without -hex.
    controls: list[int] = field(default_factory=list)

    @staticmethod
    def parse(sass: str) -> Program:
        """Parse the output of ``nvdisasm -c``, with or without ``-hex``."""
        program, labels, branches = Program(), {}, []
        for line in sass.splitlines():
            if label := LABEL.match(line):
                labels[label[1]] = len(program.instructions)
            elif found := INSTRUCTION.match(line):
                predicate, opcode, operands = found.groups()
                if target := BRANCH_TARGET.search(operands):
                    branches.append((len(program.instructions), target[1]))
                program.instructions.append(Instruction(opcode, operands, predicate or ""))
            elif upper := UPPER_HALF.match(line):
                program.controls.append(int(upper[1], 16) >> 41)
        program.branches = [(at, labels[target]) for at, target in branches if target in labels]
        return program

    @cached_property
    def _reached(self) -> networkx.DiGraph:
        """Which instruction may follow which; those only that can be reached otherwise than by a call."""
        graph = networkx.DiGraph(self.branches)
        graph.add_nodes_from(range(len(self.instructions)))
        for at, instruction in enumerate(self.instructions[:-1]):
            unconditional = not instruction.predicate and instruction.operands.startswith("`")
            jumps = instruction.opcode.startswith("BRA") and unconditional
            leaves = instruction.opcode.startswith(("EXIT", "RET")) and not instruction.predicate
            if not jumps and not leaves:
                graph.add_edge(at, at + 1)
        return graph.subgraph({0} | networkx.descendants(graph, 0))

    def usual_path(self) -> list[int]:
        """Indices of the instructions that are executed when no call is: a branch that jumps over a call and over no
        other branch, as over the slow path of a division, is taken. Loops count once, NOPs do not."""
        slow: set[int] = set()
        for at, target in self.branches:
            skipped = {instruction.opcode.split(".")[0] for instruction in self.instructions[at + 1 : target]}
            if self.instructions[at].opcode.startswith("BRA") and "CALL" in skipped and "BRA" not in skipped:
                slow.update(range(at + 1, target))
        return [at for at in sorted(self._reached) if at not in slow and self.instructions[at].opcode != "NOP"]

    def loops(self) -> list[list[int]]:
        """Natural loops: indices of the instructions of each, ascending. Those with the same head are one.

        A block that the compiler moved behind the kernel's end, and that jumps back into a loop, belongs to the loop.
        """
        graph = self._reached
        dominators = networkx.immediate_dominators(graph, 0)
        backwards = graph.reverse()
        loops: dict[int, set[int]] = {}
        for end, head in graph.edges:
            if _dominates(dominators, head, end):
                loop = loops.setdefault(head, {head})
                if end != head:
                    loop |= {end} | networkx.descendants(networkx.restricted_view(backwards, [head], []), end)
        return [sorted(loop) for loop in loops.values()]

    def main_loop(self) -> list[int]:
        """The loop that has the most matrix products, or else memory instructions, which are in no loop inside it."""
        loops = self.loops()
        if not loops:
            raise ValueError("the kernel has no loop")

        def own_work(loop: list[int]) -> tuple[int, int]:
            inner = set().union(*(other for other in loops if set(other) < set(loop)))
            count = Counter(self.instructions[at].kind for at in loop if at not in inner)
            return count["tensor core"], count["memory"]

        return max(loops, key=own_work)

    def select(self, indices: list[int]) -> list[Instruction]:
        return [self.instructions[at] for at in indices]


def _dominates(dominators: dict[int, int], head: int, at: int) -> bool:
    """Whether every way from the kernel's first instruction to ``at`` passes ``head``."""
    while at > 0 and at != head:
        at = dominators[at]
    return at == head


def load_widths(instructions: list[Instruction]) -> dict[int, int]:
    """Bytes per thread of each global load -> how many such loads."""
    found = Counter(each.bytes_per_thread for each in instructions if each.loads_global_memory)
    return dict(sorted(found.items()))


def store_widths(instructions: list[Instruction]) -> dict[int, int]:
    """Bytes per thread of each global store -> how many such stores."""
    found = Counter(each.bytes_per_thread for each in instructions if each.opcode.startswith(("STG", "ST.E")))
    return dict(sorted(found.items()))
