"""Simulates one multiprocessor: when its warps issue the instructions of a trace, cycle by cycle.

What an instruction waits for stands in its machine code (`Control`): a number of cycles, and scoreboards that slow
instructions set and that later ones wait for. Everything else is an assumption of `Assumptions`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from _sass import Instruction

#: Schedulers of a multiprocessor; a warp belongs to one of them, and each issues one instruction per cycle at most.
SCHEDULERS = 4
SCOREBOARDS = 6
#: Field of `Control` for "no scoreboard".
NONE = 7


class Control(NamedTuple):
    """The scheduling bits of an instruction, from Volta on (Jia et al., 2018, https://arxiv.org/abs/1804.06826)."""

    stall: int  # cycles until the warp's next instruction may be issued
    written: int  # scoreboard that is set until the result is there
    read: int  # scoreboard that is set until the operands have been read
    waits: int  # a bit per scoreboard that must be clear before the instruction is issued

    @staticmethod
    def decode(bits: int) -> Control:
        """From the upper 23 bits of an instruction: stall 4, yield 1, written 3, read 3, waits 6, reuse 4."""
        return Control(bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)


@dataclass(frozen=True)
class Assumptions:
    """What machine code does not tell. All times are in cycles."""

    memory_latency: float = 800
    #: Of all multiprocessors together; each gets its part of it, and lends none.
    share_of_peak_bandwidth: float = 0.92
    #: Of shared memory, shuffles, conversions, special functions and constants: until their scoreboard is clear.
    other_latency: int = 24
    #: Until a scoreboard is clear that guards operands.
    operands_read_after: int = 16
    #: From the last warp's arrival at a barrier until all go on.
    barrier: int = 20
    #: How long a scheduler's matrix unit is busy with a product of 16 x 32 with 32 x 8 bytes.
    tensor_core_busy: int = 8
    #: How long its unit for special functions and conversions is busy with those of a warp.
    special_busy: int = 8


class Step(NamedTuple):
    """One instruction of a trace."""

    control: Control
    latency: float  # until its scoreboard is clear; of a load from global memory besides what it waits for bandwidth
    bytes: float  # that a load of a warp brings from memory
    barrier: bool
    unit: int | None  # index of a unit that is busy with it
    busy: int


def step(instruction: Instruction, bits: int, warp_bytes: float, assumed: Assumptions) -> Step:
    """A trace's step. ``warp_bytes``: what a load brings from memory, without what several threads load alike."""
    kind, opcode = instruction.kind, instruction.opcode
    unit, busy = None, 0
    if kind == "tensor core":
        unit, busy = 0, assumed.tensor_core_busy
    elif opcode.startswith(("MUFU", "I2F.", "F2I", "F2F")):
        unit, busy = 1, assumed.special_busy
    loads = instruction.loads_global_memory
    latency = assumed.memory_latency if loads else assumed.other_latency
    return Step(Control.decode(bits), latency, warp_bytes if loads else 0, opcode.startswith("BAR.SYNC"), unit, busy)


@dataclass
class _Warp:
    trace: Sequence[Step]
    program: int
    scheduler: int
    at: int = 0
    boards: list[float] = field(default_factory=lambda: [0.0] * SCOREBOARDS)  # when each will be clear

    def ready(self, earliest: float) -> float:
        """When the scoreboards that the next instruction waits for are clear, and it is ``earliest`` at least."""
        waits = self.trace[self.at].control.waits
        return max([earliest, *(clear for board, clear in enumerate(self.boards) if waits >> board & 1)])


def simulate(
    programs: Sequence[Sequence[Step]], warps: int, resident: int, bytes_per_cycle: float, assumed: Assumptions
) -> float:
    """Cycles until one multiprocessor has finished its programs.

    Args:
        programs: the trace of each, which all of its warps execute.
        warps: of a program.
        resident: programs that are there at the same time; the others start as these end.
        bytes_per_cycle: the multiprocessor's part of the memory's bandwidth.
        assumed: all else.
    """
    queue: list[tuple[float, int, _Warp]] = []
    scheduler_free = [0.0] * SCHEDULERS
    unit_free = [[0.0] * 2 for _ in range(SCHEDULERS)]
    memory_free = 0.0
    arrived: dict[int, list[_Warp]] = {}
    running: dict[int, int] = {}
    order = started = 0
    end = 0.0

    def push(time: float, warp: _Warp) -> None:
        nonlocal order
        order += 1
        heapq.heappush(queue, (time, order, warp))

    def start(time: float) -> None:
        nonlocal started
        if started < len(programs):
            arrived[started], running[started] = [], warps
            for number in range(warps):
                push(time, _Warp(programs[started], started, (started * warps + number) % SCHEDULERS))
            started += 1

    for _ in range(resident):
        start(0.0)
    while queue:
        time, _, warp = heapq.heappop(queue)
        now = warp.trace[warp.at]
        units = unit_free[warp.scheduler]
        possible = max(time, scheduler_free[warp.scheduler], 0.0 if now.unit is None else units[now.unit])
        if possible > time:
            push(possible, warp)
            continue
        scheduler_free[warp.scheduler] = time + 1
        if now.unit is not None:
            units[now.unit] = time + now.busy
        control = now.control
        if control.written != NONE:
            ready = time + now.latency
            if now.bytes:
                memory_free = max(memory_free, time) + now.bytes / bytes_per_cycle
                ready = memory_free + now.latency
            warp.boards[control.written] = max(warp.boards[control.written], ready)
        if control.read != NONE:
            ready = time + assumed.operands_read_after
            warp.boards[control.read] = max(warp.boards[control.read], ready)
        warp.at += 1
        end = max(end, time + 1)
        if warp.at == len(warp.trace):
            running[warp.program] -= 1
            if not running[warp.program]:
                start(time + 1)
        elif now.barrier:
            arrived[warp.program].append(warp)
            if len(arrived[warp.program]) == running[warp.program]:
                for each in arrived[warp.program]:
                    push(each.ready(time + assumed.barrier), each)
                arrived[warp.program] = []
        else:
            push(warp.ready(time + max(control.stall, 1)), warp)
    return end
