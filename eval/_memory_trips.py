"""How often a kernel's main loop waits for memory, and what it keeps in flight meanwhile, read off its machine code.

A warp issues its instructions in order. A load makes the registers that it fills *pending*; the first instruction that
touches a pending register, to read it or to write something else there, waits. When it goes on, the loads before it are
taken to have arrived too: they were issued earlier than the wait began. Each such wait is one *dependent trip* to
memory, and an iteration takes at least as many latencies as it has trips, however few instructions it issues.
"""

from __future__ import annotations

from _sass import Instruction, Program


def trips(loop: list[Instruction]) -> list[int]:
    """The waits of one iteration, in order: how many bytes per thread are on their way when each begins.

    The loop's instructions are walked twice, in order, and the waits are those of the second time: the first one only
    brings the registers into the steady state.

    Everything counts as executed: predicated loads, whose registers are pending whether or not the predicate holds, and
    the masks of first and last tiles, which full tiles jump over. So the count is an upper bound, as that of the
    instructions is. Loads from shared and local memory are no trips, nor are asynchronous copies to shared memory,
    which fill no register.
    """
    pending: set[int] = set()
    on_their_way = 0
    waits: list[int] = []
    for _ in range(2):
        waits.clear()
        for instruction in loop:
            if not pending.isdisjoint(instruction.registers):
                waits.append(on_their_way)
                pending.clear()
                on_their_way = 0
            if instruction.loads_global_memory:
                pending |= instruction.loaded_registers
                on_their_way += instruction.bytes_per_thread
    return waits


def outside(program: Program, loop: list[int]) -> list[Instruction]:
    """What is executed once per program: all but the main loop and the padding behind the end."""
    inside = set(loop)
    return [each for at, each in enumerate(program.instructions) if at not in inside and each.opcode != "NOP"]


def bytes_in_flight(bytes_per_iteration: int, count: int, resident_programs: int) -> int:
    """Average bytes that one multiprocessor has on their way from memory.

    By Little's law, if every trip takes one latency and nothing else takes time: the bytes of an iteration of all
    resident programs over the trips of an iteration. ``bytes_per_iteration`` are those that leave memory, without what
    several threads load alike.
    """
    return round(bytes_per_iteration * resident_programs / max(1, count))
