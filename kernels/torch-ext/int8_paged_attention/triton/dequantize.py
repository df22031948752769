"""Int8 to float16 without conversions, for chips whose matrix unit multiplies float16 faster than int8."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

#: The interpreter executes no machine instructions.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
#: Four numbers: their highest bits flipped, each under the upper byte of float16 1024, less 1152.
FOUR_BYTES = tl.constexpr("""{
    .reg .b32 raised, offset;
    xor.b32 raised, $2, 0x80808080;
    mov.b32 offset, 0x64806480;
    prmt.b32 $0, raised, 0x64646464, 0x4140;
    prmt.b32 $1, raised, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, offset;
    sub.f16x2 $1, $1, offset;
}""")


@triton.jit
def bytes_to_half(x):
    """Int8 of any shape -> the same numbers in float16, exactly.

    ``x + 128``, which is ``x`` with its highest bit flipped, becomes the last eight bits of a float16 between 1024 and
    1280; 1152 is subtracted. On NVIDIA that takes five instructions for four numbers (Kim et al., 2022,
    https://arxiv.org/abs/2211.10017), where conversions take four, at a quarter of the rate, and permutations besides.
    """
    if is_cuda() and not INTERPRETED:
        half = tl.inline_asm_elementwise(FOUR_BYTES, "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4)
    else:
        raised = (x.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16) | 0x6400
        half = raised.to(tl.float16, bitcast=True) - 1152.0
    return half
