"""The simulator of a multiprocessor, on traces whose times are known by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "eval"))

from _decode_trace import phases  # noqa: E402
from _sass import Instruction, Program  # noqa: E402
from _warp_simulator import NONE, Assumptions, Control, Step, simulate, step  # noqa: E402

ASSUMED = Assumptions(memory_latency=500, other_latency=30, operands_read_after=10, barrier=20)
BANDWIDTH = 16.0  # bytes per cycle


def plain(stall: int = 1, waits: int = 0) -> Step:
    return Step(Control(stall, NONE, NONE, waits), 30, 0.0, False, None, 0)


def load(board: int, size: float, stall: int = 1) -> Step:
    return Step(Control(stall, board, NONE, 0), 500, size, False, None, 0)


def product(busy: int) -> Step:
    return Step(Control(1, NONE, NONE, 0), 30, 0.0, False, 0, busy)


BARRIER = Step(Control(1, NONE, NONE, 0), 30, 0.0, True, None, 0)


def cycles(*traces: list[Step], warps: int = 1, resident: int = 8) -> float:
    return simulate(traces, warps, resident, BANDWIDTH, ASSUMED)


@pytest.mark.parametrize(
    ("upper_half", "control"),
    [
        # LDG.E.128 R36, desc[UR18][R130.64+0x340]
        (0x000EAA000C1E1D00, Control(5, 2, NONE, 0)),
        # IMMA.16832.S8.S8.SAT R68, R16.reuse.ROW, R36.COL, RZ, after a load that sets scoreboard 2
        (0x044FEC0000445CFF, Control(6, NONE, NONE, 0b100)),
        # IMMA.16832.S8.S8.SAT R48, R20.ROW, R50.COL, R36
        (0x000FE20000445C24, Control(1, NONE, NONE, 0)),
    ],
)
def test_the_scheduling_bits_of_an_instruction(upper_half: int, control: Control) -> None:
    assert Control.decode(upper_half >> 41) == control


def test_stalls_of_one_warp_add_up() -> None:
    assert cycles([plain(4)] * 10) == 9 * 4 + 1
    assert cycles([plain(4)] * 10, warps=4) == 9 * 4 + 1, "four schedulers, one warp each"


def test_a_scheduler_issues_one_instruction_per_cycle() -> None:
    assert cycles([plain(1)] * 10, warps=8) == 20
    assert cycles([plain(2)] * 10, warps=8) == 20, "one warp issues while the other one waits"


def test_a_use_waits_for_its_load_and_another_instruction_does_not() -> None:
    assert cycles([load(0, 160), plain(waits=1)]) == 160 / BANDWIDTH + 500 + 1
    assert cycles([load(0, 160), plain(waits=2)]) == 2


def test_independent_loads_share_one_latency_and_the_bandwidth() -> None:
    assert cycles([*[load(0, 160)] * 10, plain(waits=1)]) == 10 * 160 / BANDWIDTH + 500 + 1


def test_dependent_loads_take_a_latency_each() -> None:
    trip = [load(0, 16), plain(waits=1)]
    # Each is asked for one cycle after the use of the one before it.
    assert cycles(trip * 3) == 3 * (16 / BANDWIDTH + 500 + 1)


def test_two_programs_hide_each_others_latency() -> None:
    trace = [load(0, 16), plain(waits=1)] * 20
    alone, both = cycles(trace), cycles(trace, trace)
    assert both < 1.01 * alone
    assert cycles(trace, trace, resident=1) == 2 * alone


def test_all_warps_wait_at_a_barrier() -> None:
    # Eight warps, two per scheduler: the last ones arrive in cycle 1, all go on in cycle 21.
    assert cycles([BARRIER, plain()], warps=8) == 1 + 20 + 2


def test_a_busy_matrix_unit_delays_the_other_warp_only() -> None:
    assert cycles([product(8)], warps=8) == 8 + 1
    assert cycles([product(8), *[plain()] * 3], warps=4) == 4


def test_kinds_of_instructions() -> None:
    bits = 0x000EAA000C1E1D00 >> 41
    assert step(Instruction("LDG.E.128", "R36, [R2.64]"), bits, 512, ASSUMED)[1:] == (500, 512, False, None, 0)
    assert step(Instruction("LDS.128", "R36, [R2]"), bits, 512, ASSUMED)[1:] == (30, 0, False, None, 0)
    assert step(Instruction("BAR.SYNC.DEFER_BLOCKING", "0x0"), bits, 0, ASSUMED).barrier
    assert step(Instruction("IMMA.16832.S8.S8.SAT", "R0, R4.ROW, R8.COL, RZ"), bits, 0, ASSUMED)[4:] == (0, 8)
    assert step(Instruction("MUFU.EX2", "R0, R1"), bits, 0, ASSUMED)[4:] == (1, 8)


def test_a_kernel_is_cut_around_its_main_loop() -> None:
    lines = [
        "MOV R4, RZ",
        ".L_x_0:",
        "LDG.E R5, [R2.64]",
        ".L_x_1:",
        "LDG.E.128 R12, [R2.64]",
        "LDG.E R6, [R2.64]",
        "IMMA.16832.S8.S8.SAT R8, R24.ROW, R40.COL, RZ",
        "@P0 BRA `(.L_x_1)",
        "STG.E [R2.64], R8",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    ]
    program = Program.parse("\n".join(line if line[0] == "." else f" /*0000*/ {line} ;" for line in lines))
    program.controls = [Control(1, NONE, NONE, 0).stall | NONE << 5 | NONE << 8] * len(program.instructions)
    parts = phases(program, 100.0, ASSUMED)
    assert [len(part) for part in parts] == [1, 1, 4, 2, 1]
    assert [each.bytes for each in parts.loop] == [80.0, 20.0, 0, 0], "by their widths, 16 and 4"
    assert len(parts.trace([3, 0])) == 1 + (1 + 3 * 4 + 2) + (1 + 2) + 1
    assert [each.bytes for each in phases(program, None, ASSUMED).loop] == [512, 128, 0, 0]


def test_committed_predictions() -> None:
    from gpu_predictions import GPUS, WORKLOADS, assumptions

    committed = json.loads((ROOT / "docs" / "gpu_predictions.json").read_text(encoding="utf-8"))
    assert committed["assumptions"] == json.loads(json.dumps(assumptions()))
    rows = committed["predictions"]
    assert [(row["gpu"], row["batch"], row["tokens"]) for row in rows] == [
        (gpu.name, *workload) for gpu in GPUS for workload in WORKLOADS
    ]
    for row in rows:
        assert row["at_peak_bandwidth"] < row["microseconds_from"] <= row["microseconds"] <= row["microseconds_to"]


@pytest.mark.slow
def test_a_longer_latency_of_memory_never_makes_it_faster() -> None:
    from gpu_predictions import GPUS, predict

    row = predict(GPUS[1], 1, 8192)
    assert row["at_peak_bandwidth"] < row["microseconds_from"] <= row["microseconds"] <= row["microseconds_to"]
    assert row["split_kernel"] > 0
    assert row["join_kernel"] > 0
