"""What the compilers for GPUs make of the kernels for a past that is dequantized slice by slice (docs/gpu.md)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from hf_int8_paged.kernels import KvCacheQuant, Scoring, Tokens

pytest.importorskip("triton", reason="triton is not installed")
sys.path.append(str(Path(__file__).parents[2] / "eval"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels have no machine code"),
]
HEADS, GROUP, DIM, BLOCK_SIZE = 2, 4, 128, 16


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_slices_are_read_and_written_in_words_of_16_bytes(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from _machine_code import disassemble
    from _triton_offline import TARGETS, compiling_for

    from hf_int8_paged.kernels.triton import extend

    monkeypatch.setattr(extend, "serves", lambda *arguments: True)
    slots, batch, chunk = (HEADS, 5, BLOCK_SIZE), 1, 20
    k, v = (torch.zeros(*slots, DIM, dtype=torch.int8) for _ in range(2))
    scales = [torch.zeros(slots, dtype=torch.float16) for _ in range(2)]
    storage = KvCacheQuant(k, v, *scales, "triton", "v_transposed", "hadamard", torch.zeros(HEADS, DIM))
    lens = torch.full((batch,), 40, dtype=torch.int32)
    tokens = Tokens(torch.zeros(batch, 5, dtype=torch.int32), lens, lens)
    q, new = (torch.zeros(batch, heads, chunk, DIM, dtype=torch.bfloat16) for heads in (HEADS * GROUP, HEADS))
    with compiling_for(TARGETS[gpu]) as compiled:
        extend.launch_extend(torch.empty_like(q), q, storage, tokens, Scoring(DIM**-0.5), (new, new))
    assert [name for name, _ in compiled] == ["dequantize_kernel", "extend_kernel"]
    if gpu == "gfx942":
        assert all(kernel.asm["hsaco"] for _, kernel in compiled)
        return
    opcodes = [each.opcode for each in disassemble(compiled[0][1])[0].instructions]
    # 16 elements of K; 16 tokens of V and their scales.
    assert sum(opcode.startswith("LDG.E.128") for opcode in opcodes) == 4
    assert not any(opcode.startswith("LDG.E.U8") for opcode in opcodes)
    assert opcodes.count("STG.E.128") == 4  # 8 elements each
    assert not any(opcode.startswith(("LDL", "STL")) for opcode in opcodes), "spills"
