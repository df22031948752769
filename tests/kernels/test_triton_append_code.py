"""What the compilers for GPUs make of append: counted in its machine code (docs/gpu.md)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from hf_int8_paged.kernels import KvCacheQuant, Tokens

pytest.importorskip("triton", reason="triton is not installed")
sys.path.append(str(Path(__file__).parents[2] / "eval"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels have no machine code"),
]
HEADS, HEAD_DIM, BLOCK_SIZE = 2, 128, 16
#: Of 16 rows, each way through the kernel counted: 16 x 128 elements of K and as many of V.
MOST_INSTRUCTIONS = 2 * 600


def opcodes_of_append(gpu: str, new_tokens: int) -> list[str]:
    """The machine code of append for rotated, centred bfloat16 rows, without the padding behind it."""
    from _machine_code import disassemble
    from _triton_offline import TARGETS, compiling_for

    from hf_int8_paged.kernels.triton.append import launch_append

    slots = (HEADS, 5, BLOCK_SIZE)
    k, v = (torch.empty(*slots, HEAD_DIM, dtype=torch.int8) for _ in range(2))
    scales = [torch.empty(slots, dtype=torch.float16) for _ in range(2)]
    center = torch.zeros(HEADS, HEAD_DIM)
    storage = KvCacheQuant(k, v, *scales, "triton", "v_transposed", "hadamard", center)
    new = [torch.empty(1, HEADS, new_tokens, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2)]
    lens = torch.zeros(1, dtype=torch.int32)
    with compiling_for(TARGETS[gpu]) as compiled:
        launch_append(*new, storage, Tokens(torch.zeros(1, 9, dtype=torch.int32), lens, lens))
    program, _ = disassemble(compiled[0][1])
    return [each.opcode for each in program.instructions if each.opcode != "NOP"]


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100"])
def test_a_tile_of_values_is_transposed_and_stored_in_words_of_16_bytes(gpu: str) -> None:
    opcodes = opcodes_of_append(gpu, new_tokens=64)
    assert len(opcodes) <= MOST_INSTRUCTIONS
    assert opcodes.count("STG.E.128") == 1  # 16 tokens of an element of V, by each of 128 threads
    assert opcodes.count("STG.E.64") == 2  # 16 elements of a row of K in two runs
    assert opcodes.count("STG.E.U8") == 16  # those tokens one by one, where not all of a group are new
    assert not any(opcode.startswith(("LDL", "STL", "CALL")) for opcode in opcodes), "spills, or divisions"


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100"])
def test_a_single_token_calls_no_division(gpu: str) -> None:
    opcodes = opcodes_of_append(gpu, new_tokens=1)
    assert not any(opcode.startswith(("LDL", "STL", "CALL")) for opcode in opcodes)
