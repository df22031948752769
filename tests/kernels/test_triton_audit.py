"""The static audit's parser, and what the decode kernel's machine code must reach (docs/gpu.md)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "eval"))

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels have no machine code"
)

SASS = """
.text.copy:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0020*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0030*/              @P1  BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0050*/                   LDG.E.128.CONSTANT R12, desc[UR4][R2.64+0x10] ;
        /*0060*/                   LDG.E.U8 R16, desc[UR4][R2.64+0x20] ;
        /*0070*/                   IMMA.16832.S8.S8.SAT R8, R24.ROW, R40.COL, RZ ;
        /*0080*/                   I2FP.F32.S32 R9, R8 ;
        /*0090*/                   HADD2.F32 R9, -RZ, R8.H0_H0 ;
        /*00a0*/                   FFMA R9, R9, R9, R9 ;
        /*00b0*/                   IMAD.WIDE R2, R3, 0x4, R2 ;
        /*00c0*/                   STL [R1], R2 ;
        /*00d0*/             @!UP0 BRA `(.L_x_1) ;
        /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_2:
        /*00f0*/                   EXIT ;
"""


def test_the_main_loop_is_the_one_with_matrix_products() -> None:
    from _machine_code import Program, class_of, load_widths

    loop = Program.parse(SASS).main_loop()
    assert len(loop) == 10
    assert load_widths(loop) == {1: 1, 16: 2}
    assert [class_of(opcode) for opcode in loop] == [
        "memory", "memory", "memory", "tensor core", "conversion",
        "conversion", "float", "integer", "memory", "control",
    ]  # fmt: skip


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


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    """What ``make gpu-audit`` wrote."""
    return json.loads((ROOT / "docs" / "gpu_audit.json").read_text(encoding="utf-8"))


def test_the_readme_shows_the_committed_audit(committed: dict[str, Any]) -> None:
    from gpu_audit import summary

    assert summary(committed["variants"]) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert committed["command"] == "python eval/gpu_audit.py --json docs/gpu_audit.json"
    kinds = [tuple(row[name] for name in KIND) for row in committed["variants"]]
    assert len(kinds) == len(set(kinds)) == 4 * 3 * 3 * (2 * 2 + 1)


#: What tells variants apart.
KIND = ("chip", "head_dim", "group", "block_size", "dtype", "rotation", "integer")
#: chip, head_dim, group, rotation, least bytes per cycle and multiprocessor, whether three blocks must be resident
TABLE = [
    *((chip, 128, group, "hadamard", 50, True) for chip in ("sm_80", "sm_90") for group in (1, 4, 8)),
    *((chip, 128, 4, None, 50, True) for chip in ("sm_80", "sm_90")),
    *((chip, head_dim, 4, "hadamard", 35, False) for chip in ("sm_80", "sm_90", "sm_100") for head_dim in (64, 256)),
    ("sm_100", 128, 4, "hadamard", 35, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "head_dim", "group", "rotation", "least", "three_blocks"), TABLE)
def test_decode_keeps_its_headroom(
    chip: str,
    head_dim: int,
    group: int,
    rotation: str | None,
    least: float,
    three_blocks: bool,
    committed: dict[str, Any],
) -> None:
    from gpu_audit import audit, versions

    figures: dict[str, Any] = audit(chip, head_dim, group, rotation=rotation)
    if versions() == committed["versions"]:
        assert json.loads(json.dumps(figures)) in committed["variants"], "the kernel has changed: run make gpu-audit"
    assert figures["bytes_per_cycle"] >= least
    assert figures["kv_loads_narrower_than_16_bytes"] == 0
    assert figures["spill_instructions_in_loop"] == 0
    if three_blocks:
        assert figures["spill_instructions"] == figures["stack_bytes"] == 0
        assert figures["blocks_per_multiprocessor"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gfx942_has_no_spill(head_dim: int) -> None:
    from gpu_audit import audit

    figures = audit("gfx942", head_dim, 4)
    assert figures["spills"] == figures["stack_bytes"] == 0
    assert figures["vector_registers"] <= 256


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_extend_reads_no_single_bytes_and_does_not_spill_in_its_loop(chip: str, head_dim: int) -> None:
    from _machine_code import MULTIPROCESSORS, audit_cubin
    from _triton_offline import TARGETS, compiling_for

    from hf_int8_paged.kernels import FirstTokens, KvCacheQuant, Scoring, Tokens
    from hf_int8_paged.kernels.triton.extend import launch_extend

    slots = (2, 64, 16)
    k, v = (torch.empty(*slots, head_dim, dtype=torch.int8) for _ in range(2))
    scales = torch.empty(2, *slots, dtype=torch.float16)
    center = torch.zeros(2, head_dim)
    storage = KvCacheQuant(k, v, scales[0], scales[1], "triton", "v_transposed", "hadamard", center)
    q, new = (torch.empty(2, heads, 100, head_dim, dtype=torch.float16) for heads in (8, 2))
    table, lens = torch.empty(2, 64, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    with compiling_for(TARGETS[chip]) as compiled:
        rows = new[:, :, :1].contiguous()
        held = FirstTokens(rows, rows, lens, lens, lens, limit=1)
        launch_extend(torch.empty_like(q), q, storage, Tokens.at(table, lens), Scoring(0.1), (new, new), held)
    figures = audit_cubin(compiled[0][1], MULTIPROCESSORS[chip])
    assert 1 not in figures["loop_loads_by_bytes_per_thread"]
    assert figures["spill_instructions_in_loop"] == 0


def test_launchers_do_little_beside_the_launch() -> None:
    """Append and decode of one layer, up to the launchers' C code. The time that this takes is a budget of ``make
    bench``."""
    from eval._workloads import triton_layer_launching_nothing
    from tests.counting import operators, python_work

    with triton_layer_launching_nothing() as (layer, launched):
        layer()
        assert len(launched) == 3, "append, the splits of the context, and their joining"
        assert operators(layer).tensors_made == 1, "what the splits leave to be joined"
        calls, bytecodes = python_work(layer)
    # 1.4 times the 49 calls and 4,060 bytecodes of Python 3.11: other versions compile to other bytecodes. Where Triton
    # searches for the kernels it is 171 and 7,475.
    assert calls <= 69
    assert bytecodes <= 5684
