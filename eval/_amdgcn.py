"""AMD machine code as Triton's compiler prints it, brought to a `_sass.Program`, whose loops are found alike."""

from __future__ import annotations

import re

from _sass import Instruction, Program

#: What counts in a loop, or decides where one is: AMD's names -> NVIDIA's for the same.
NAMES = {
    r"s_branch$": "BRA",
    r"s_cbranch": "BRA",
    r"s_endpgm": "EXIT",
    r"v_s?(mfma|wmma)": "HMMA",
    r"s_barrier": "BAR.SYNC",
    r"(buffer|global|flat)_load": "LDG.E",
    r"(buffer|global|flat)_store": "STG.E",
}
LABEL = re.compile(r"(\.LBB\w+):")
INSTRUCTION = re.compile(r"\s+([a-z]\w+)(?:\s+([^;]*?))?\s*(?:;.*)?$")


def parse(assembly: str) -> Program:
    """Registers are left out; an instruction that `NAMES` does not know keeps its name."""
    program, labels, branches = Program(), {}, []
    for line in assembly.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(program.instructions)
        elif found := INSTRUCTION.match(line):
            name = found[1]
            opcode = next((known for pattern, known in NAMES.items() if re.match(pattern, name)), name)
            if opcode == "BRA":
                branches.append((len(program.instructions), found[2]))
            program.instructions.append(
                Instruction(opcode, "`" if opcode == "BRA" else "", "@P" if name.startswith("s_cbranch") else "")
            )
    program.branches = [(at, labels[target]) for at, target in branches]
    return program
