"""Reading machine code: instructions, registers, loops and trips to memory, counted by hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

sys.path.append(str(Path(__file__).parents[2] / "eval"))

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels have no machine code"
)


def sass(*lines: str) -> str:
    """As ``nvdisasm -c`` prints instructions and labels."""
    return "\n".join(
        line if line.startswith(".L_x_") else f"        /*{16 * at:04x}*/                   {line} ;"
        for at, line in enumerate(lines)
    )


TWO_LOOPS = sass(
    "LDC R1, c[0x0][0x28]",
    "@!P0 BRA `(.L_x_2)",
    ".L_x_0:",
    "LDG.E R5, desc[UR4][R2.64]",
    "@P1  BRA `(.L_x_0)",
    ".L_x_1:",
    "LDG.E.128 R8, desc[UR4][R2.64]",
    "LDG.E.128.CONSTANT R12, desc[UR4][R2.64+0x10]",
    "LDG.E.U8 R16, desc[UR4][R2.64+0x20]",
    "IMMA.16832.S8.S8.SAT R8, R24.ROW, R40.COL, RZ",
    "I2FP.F32.S32 R9, R8",
    "HADD2.F32 R9, -RZ, R8.H0_H0",
    "FFMA R9, R9, R9, R9",
    "IMAD.WIDE R2, R3, 0x4, R2",
    "STL [R1], R2",
    "@!UP0 BRA `(.L_x_1)",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    ".L_x_2:",
    "EXIT",
    ".L_x_3:",
    "BRA `(.L_x_3)",
    "NOP",
)


def test_the_main_loop_is_the_one_with_matrix_products() -> None:
    from _memory_trips import outside
    from _sass import Program, load_widths

    program = Program.parse(TWO_LOOPS)
    at = program.main_loop()
    assert at == list(range(4, 14))
    loop = program.select(at)
    assert load_widths(loop) == {1: 1, 16: 2}
    assert [each.kind for each in loop] == [
        "memory", "memory", "memory", "tensor core", "conversion",
        "conversion", "float", "integer", "memory", "control",
    ]  # fmt: skip
    assert [each.spills for each in loop].count(True) == 1
    assert [each.opcode for each in outside(program, at)] == [
        "LDC", "BRA", "LDG.E", "BRA", "BAR.SYNC.DEFER_BLOCKING", "EXIT", "BRA",
    ]  # fmt: skip


def test_a_loop_that_encloses_the_main_one_does_not_hide_it() -> None:
    """A persistent kernel: its outer loop has all products of the inner one, and more memory instructions."""
    from _sass import Program

    program = Program.parse(
        sass(
            "MOV R4, RZ",
            ".L_x_0:",
            "LDG.E R5, desc[UR4][R2.64]",
            ".L_x_1:",
            "HMMA.16816.F32 R8, R24, R40, R8",
            "@P0 BRA `(.L_x_1)",
            "STG.E desc[UR4][R2.64], R8",
            "@P1 BRA `(.L_x_0)",
            "EXIT",
        )
    )
    assert sorted(program.loops()) == [[1, 2, 3, 4, 5], [2, 3]]
    assert program.main_loop() == [2, 3]


def test_a_block_moved_behind_the_end_belongs_to_the_loop_it_returns_to() -> None:
    from _sass import Program

    program = Program.parse(
        sass(
            ".L_x_0:",
            "IMMA.16832.S8.S8.SAT R8, R24.ROW, R40.COL, RZ",
            "@P2 BRA `(.L_x_2)",
            ".L_x_1:",
            "FADD R8, R8, R9",
            "BRA P0, `(.L_x_0)",
            "EXIT",
            ".L_x_2:",
            "FMUL R9, R9, R9",
            "BRA `(.L_x_1)",
        )
    )
    assert program.main_loop() == [0, 1, 2, 3, 5, 6]


def test_the_usual_path_leaves_out_the_slow_path_of_a_division() -> None:
    from _sass import Program, store_widths

    program = Program.parse(
        sass(
            "FCHK P0, R3, R4",
            "BSSY B0, `(.L_x_0)",
            "@!P0 BRA `(.L_x_1)",
            "MOV R20, 0x50",
            "CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath)",
            ".L_x_1:",
            "BSYNC B0",
            ".L_x_0:",
            "@!P1 BRA `(.L_x_2)",  # jumps over no call
            "STG.E.U8 desc[UR4][R2.64], R8",
            ".L_x_2:",
            "STG.E.128 desc[UR4][R2.64], R8",
            "STG.E desc[UR4][R2.64], R8",
            "EXIT",
            "FMUL R5, R5, R5",  # the subroutine
            "RET.REL.NODEC R4",
        )
    )
    assert program.usual_path() == [0, 1, 2, 5, 6, 7, 8, 9, 10]
    assert store_widths(program.instructions) == {1: 1, 4: 1, 16: 1}


def test_a_kernel_without_a_loop_says_so() -> None:
    from _sass import Program

    with pytest.raises(ValueError, match="no loop"):
        Program.parse(sass("LDG.E R5, desc[UR4][R2.64]", "EXIT")).main_loop()


@pytest.mark.parametrize(
    ("instruction", "registers"),
    [
        ("LDG.E R5, desc[UR18][R2.64+0x10]", {5, 2, 3}),
        ("LDG.E.64 R6, desc[UR18][R2.64]", {6, 7, 2, 3}),
        ("LDG.E.128.CONSTANT R8, [R2.64]", {8, 9, 10, 11, 2, 3}),
        ("STG.E.128 desc[UR18][R4.64], R8", {4, 5, 8, 9, 10, 11}),
        ("LDS.U8 R7, [R9+UR4]", {7, 9}),
        ("STS.64 [R9], R10", {9, 10, 11}),
        ("LDSM.16.M88.4 R12, [R3]", {12, 13, 14, 15, 3}),
        ("IMMA.16832.S8.S8.SAT R68, R16.reuse.ROW, R36.COL, RZ", {68, 69, 70, 71, 16, 17, 18, 19, 36, 37}),
        ("HMMA.16816.F32 R8, R24, R40, R8", {8, 9, 10, 11, 24, 25, 26, 27, 40, 41}),
        ("HGMMA.64x16x16.F32 R24, R4, gdesc[UR4], R24, gsb0", {*range(24, 32), 4, 5, 6, 7}),
        ("IMAD.WIDE.U32 R34, R36.reuse, 0x10, RZ", {34, 35, 36}),
        ("IMAD.WIDE R34, R36, 0x10, R2", {34, 35, 36, 2, 3}),
        ("CS2R R14, SRZ", {14, 15}),
        ("FADD2 R4, R4.F32x2.HI_LO, -R6.F32x2.HI_LO", {4, 5, 6, 7}),
        ("FMUL2 R4, R8.F32x2.HI_LO, R16.F32", {4, 5, 8, 9, 16}),
        ("HADD2.F32 R20, -RZ, R16.H0_H0", {20, 16}),
        ("SHFL.BFLY PT, R21, R20, 0x1, 0x1f", {21, 20}),
        ("UIADD3 UR5, UR6, 0x1, URZ", set()),
    ],
)
def test_registers_of_wide_operands(instruction: str, registers: set[int]) -> None:
    from _sass import Instruction

    opcode, operands = instruction.split(" ", 1)
    assert Instruction(opcode, operands).registers == registers


def waits(*lines: str) -> list[int]:
    from _memory_trips import trips
    from _sass import Program

    return trips(Program.parse(sass(*lines)).instructions)


def test_loads_without_a_use_between_them_are_one_trip() -> None:
    assert waits("LDG.E R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]", "FADD R4, R4, R4", "FADD R11, R11, R11") == [20]


def test_an_address_from_memory_is_a_trip_of_its_own() -> None:
    assert waits("LDG.E.64 R4, [R2.64]", "LDG.E R6, [R4.64]", "FADD R7, R6, R6") == [8, 4]


def test_the_last_register_of_a_wide_load_is_waited_for() -> None:
    assert waits("LDG.E.128 R4, [R2.64]", "FADD R20, R8, R3", "FADD R20, R7, R3") == [16]
    assert waits("LDG.E.64 R4, [R2.64]", "FADD R20, R6, R7", "LDG.E R8, [R2.64]", "FADD R20, R5, R3") == [12]


def test_writing_a_pending_register_waits_too() -> None:
    assert waits("LDG.E R4, [R2.64]", "MOV R4, RZ") == [4]
    assert waits("LDG.E R4, [R2.64]", "LDG.E R4, [R2.64+0x10]", "FADD R5, R4, R4") == [4, 4]


def test_a_load_of_the_iteration_before_is_waited_for_in_the_next() -> None:
    """A software pipeline: the load at the end is used at the beginning of the next iteration."""
    assert waits("FADD R5, R4, R4", "LDG.E R4, [R2.64]") == [4]
    assert waits("FADD R5, R4, R4", "LDG.E R4, [R2.64]", "LDG.E R8, [R2.64]", "FADD R9, R8, R8") == [8]


def test_predicated_loads_are_trips_and_shared_memory_is_none() -> None:
    assert waits("@P0 LDG.E R4, [R2.64]", "FADD R5, R4, R4") == [4]
    assert waits("LDS R4, [R2]", "FADD R5, R4, R4", "LDL R6, [R1]", "FADD R7, R6, R6") == []


def test_bytes_in_flight_by_littles_law() -> None:
    from _memory_trips import bytes_in_flight

    assert bytes_in_flight(65536, 10, 3) == 19661
    assert bytes_in_flight(65536, 0, 1) == 65536


def test_resident_blocks_by_registers_and_by_shared_memory() -> None:
    from _machine_code import MULTIPROCESSORS

    h100 = MULTIPROCESSORS["sm_90"]
    assert h100.resident_blocks(168, 4096, warps=4) == 3  # 168 * 32 = 5376 = 21 * 256; 16384 / 5376 = 3.05
    assert h100.resident_blocks(169, 4096, warps=4) == 2
    assert h100.resident_blocks(32, 100 * 1024, warps=4) == 2
    assert h100.resident_blocks(16, 0, warps=1) == 32


@triton.jit
def copy_kernel(out_ptr, in_ptr, count, SIZE: tl.constexpr):
    at = tl.program_id(0) * count * SIZE + tl.arange(0, SIZE)
    for i in tl.range(0, count, loop_unroll_factor=1):
        tl.store(out_ptr + at + i * SIZE, tl.load(in_ptr + at + i * SIZE))


@triton.jit
def chase_kernel(out_ptr, in_ptr, count):
    at = tl.program_id(0)
    for _ in tl.range(0, count, loop_unroll_factor=1):
        at = tl.load(in_ptr + at)
        at = tl.load(in_ptr + at)
        at = tl.load(in_ptr + at)
    tl.debug_barrier()
    tl.store(out_ptr, at)


def test_a_copy_loop_counted_by_hand() -> None:
    """128 threads that copy 4,096 bytes per iteration: two loads and two stores of 16 bytes each, and no spill."""
    from _machine_code import MULTIPROCESSORS, audit_cubin
    from _triton_offline import TARGETS, compiling_for

    memory = torch.empty(2, 1 << 16, dtype=torch.int8)
    with compiling_for(TARGETS["sm_90"]) as compiled:
        copy_kernel[(4,)](memory[0], memory[1], 4, SIZE=4096, num_warps=4, num_stages=1, enable_fp_fusion=False)
    figures = audit_cubin(compiled[0][1], MULTIPROCESSORS["sm_90"])
    loads = figures["loop_loads_by_bytes_per_thread"]
    assert set(loads) == {16}
    iterations = loads[16] // 2  # ptxas may unroll
    assert loads[16] == 2 * iterations
    assert figures["loop_by_class"]["memory"] == 4 * iterations
    assert "tensor core" not in figures["loop_by_class"]
    assert figures["stack_bytes"] == figures["spill_instructions"] == 0
    assert figures["barriers_outside_loop"] == 0


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
def test_a_chain_of_three_loads_is_three_trips(chip: str) -> None:
    from _machine_code import MULTIPROCESSORS, audit_cubin
    from _triton_offline import TARGETS, compiling_for

    links, out = torch.empty(64, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    with compiling_for(TARGETS[chip]) as compiled:
        chase_kernel[(4,)](out, links, 1000, num_warps=4)
    figures = audit_cubin(compiled[0][1], MULTIPROCESSORS[chip])
    loads = figures["loop_loads_by_bytes_per_thread"]
    assert loads[4] % 3 == 0  # ptxas may unroll
    assert figures["bytes_per_thread_by_trip"] == [4] * loads[4]
    assert figures["dependent_trips"] == loads[4]
    assert figures["barriers_outside_loop"] == 1
