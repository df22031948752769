"""What the machine executes where K and V become float16, and that its instructions compute the right numbers."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from hf_int8_paged.kernels.triton import dequantize
from hf_int8_paged.kernels.triton.backend import multiplies_int8
from hf_int8_paged.kernels.triton.dequantize import bytes_to_half
from hf_int8_paged.kernels.triton.tuning import Chip

sys.path.append(str(Path(__file__).parents[2] / "eval"))

compiled_only = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels have no machine code"
)


def execute(word: int) -> list[float]:
    """The four float16 that the instructions make of a word of four bytes."""
    registers = {"$2": word}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 16)

    for opcode, text in re.findall(r"^ +([\w.]+) (\$?\w+, .*);$", dequantize.FOUR_BYTES.value, re.MULTILINE):
        target, *sources = text.split(", ")
        values = [value(source) for source in sources] if opcode != ".reg" else []
        if opcode == "xor.b32":
            registers[target] = values[0] ^ values[1]
        elif opcode == "mov.b32":
            registers[target] = values[0]
        elif opcode == "prmt.b32":  # each digit of the selector, from the last, chooses a byte of both words
            both = values[0] | values[1] << 32
            chosen = [values[2] >> 4 * i & 15 for i in range(4)]
            registers[target] = sum((both >> 8 * byte & 255) << 8 * i for i, byte in enumerate(chosen))
        elif opcode == "sub.f16x2":
            halves = [np.array([number], np.uint32).view(np.float16) for number in values]
            registers[target] = int((halves[0] - halves[1]).view(np.uint32)[0])
        else:
            assert opcode == ".reg", opcode
    return [float(x) for name in ("$0", "$1") for x in np.array([registers[name]], np.uint32).view(np.float16)]


def test_the_instructions_are_exact_for_all_bytes_in_every_place() -> None:
    for first in range(-128, 128):
        numbers = [first, (first + 77) % 256 - 128, -first - 1, first // 2]
        word = int(np.array(numbers, np.int8).view(np.uint32)[0])
        assert execute(word) == numbers


@triton.jit
def half_kernel(out_ptr, in_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, bytes_to_half(tl.load(in_ptr + at)))


@compiled_only
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_103"])
def test_four_bytes_take_five_instructions(chip: str) -> None:
    from _machine_code import disassemble
    from _triton_offline import TARGETS, compiling_for

    with compiling_for(TARGETS[chip]) as compiled:
        half_kernel[(1,)](torch.empty(2048).half(), torch.empty(2048, dtype=torch.int8), SIZE=2048, num_warps=4)
    counts = Counter(each.opcode.split(".")[0] for each in disassemble(compiled[0][1])[0].instructions)
    words = 2048 // 128 // 4  # of a thread
    assert counts["PRMT"] == counts["HADD2"] + counts["HFMA2"] == 2 * words
    assert counts["I2F"] == counts["I2FP"] == 0


@compiled_only
@pytest.mark.parametrize("chip", ["sm_90", "sm_103"])
def test_decode_in_float16_converts_nothing_that_it_loads(chip: str) -> None:
    from _machine_code import disassemble
    from _offline_launches import decode

    kernel = next(kernel for name, kernel in decode(chip, 128, 4, integer=False) if name == "decode_kernel")
    program, _ = disassemble(kernel)
    counts = Counter(each.opcode.split(".")[0] for each in program.select(program.main_loop()))
    words = 64 * 2 * 128 // 32 // 4  # of K and V, of a thread in one iteration
    assert counts["I2F"] == counts["I2FP"] == 0
    assert 2 * words <= counts["PRMT"] <= 2.2 * words


def test_which_chips_multiply_in_float16() -> None:
    chips = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_103", "gfx942", "interpreter"]
    assert [name for name in chips if not multiplies_int8(Chip(name, 1))] == ["sm_75", "sm_103"]
