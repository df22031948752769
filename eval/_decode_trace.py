"""Which instructions the programs of decode attention execute: its two kernels' phases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from _sass import Instruction, Program
from _warp_simulator import Assumptions, Step, step


class Phases(NamedTuple):
    """The parts of a kernel around its main loop, as steps of a warp.

    A kernel whose main loop stands in another one goes through ``head``, ``loop`` and ``tail`` for every segment.
    """

    before: list[Step]
    head: list[Step]
    loop: list[Step]  # one iteration
    tail: list[Step]
    after: list[Step]

    def trace(self, segments: Sequence[int]) -> list[Step]:
        """All steps of a program with so many iterations in each segment."""
        steps = list(self.before)
        for iterations in segments:
            steps += [*self.head, *self.loop * iterations, *self.tail]
        return steps + self.after


def phases(program: Program, loop_bytes: float | None, assumed: Assumptions) -> Phases:
    """Cut a kernel into its phases; slow paths of divisions are left out, masks of first and last tiles are not.

    Args:
        program: with its controls.
        loop_bytes: what a warp's loads of one iteration bring from memory, which are their parts of it by their widths;
            None: each brings as much as it fills of the registers. Loads outside of the loop count nothing.
        assumed: passed on to `step`.
    """
    main = program.main_loop()
    around = [loop for loop in program.loops() if set(main) < set(loop)]
    outer = min(around, key=len) if around else range(0, len(program.instructions))
    widths = sum(each.bytes_per_thread for each in program.select(main) if each.loads_global_memory)
    share = 32.0 if loop_bytes is None else loop_bytes / max(1, widths)

    def steps(indices: Iterator[int], bytes_per_byte: float) -> list[Step]:
        return [_step(program.instructions[at], program.controls[at], bytes_per_byte, assumed) for at in indices]

    path, inside = program.usual_path(), set(main)
    return Phases(
        before=steps((at for at in path if at < outer[0]), 0.0),
        head=steps((at for at in path if outer[0] <= at < main[0]), 0.0),
        loop=steps((at for at in path if at in inside), share),
        tail=steps((at for at in path if main[0] < at <= outer[-1] and at not in inside), 0.0),
        after=steps((at for at in path if at > outer[-1]), 0.0),
    )


def _step(instruction: Instruction, bits: int, bytes_per_byte: float, assumed: Assumptions) -> Step:
    return step(instruction, bits, instruction.bytes_per_thread * bytes_per_byte, assumed)
