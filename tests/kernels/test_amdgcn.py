"""AMD's machine code: loops and barriers counted by hand."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "eval"))

#: A loop around another one, whose block BB0_2 stands before its head, as LLVM places them.
ASSEMBLY = """
kernel:                                 ; @kernel
; %bb.0:
	s_load_dwordx4 s[40:43], s[0:1], 0x38
	.loc	2 73 16 is_stmt 1               ; schedule.py:73:16
	s_cbranch_execz .LBB0_4
.LBB0_1:                                ; =>This Loop Header: Depth=1
	s_barrier
	s_branch .LBB0_3
.LBB0_2:                                ;   in Loop: Header=BB0_3 Depth=2
	s_barrier
	v_mfma_i32_16x16x32_i8 v[0:3], v[4:5], v[6:7], v[0:3]
.LBB0_3:                                ;   Parent Loop BB0_1 Depth=1
	global_load_dwordx4 v[8:11], v[12:13], off
	s_waitcnt vmcnt(0)
	s_barrier
	s_cbranch_scc1 .LBB0_2
; %bb.5:
	global_store_dword v[0:1], v2, off
	s_cbranch_scc0 .LBB0_1
.LBB0_4:
	s_endpgm
"""


def test_the_main_loop_and_its_barriers() -> None:
    from _amdgcn import parse

    program = parse(ASSEMBLY)
    assert len(program.instructions) == 13
    loop = program.main_loop()
    assert loop == [4, 5, 6, 7, 8, 9]
    assert [each.opcode for each in program.select(loop)] == [
        "BAR.SYNC", "HMMA", "LDG.E", "s_waitcnt", "BAR.SYNC", "BRA",
    ]  # fmt: skip
