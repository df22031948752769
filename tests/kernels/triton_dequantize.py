"""Int8 brought to float16 by its bits. test_triton.py runs this file under TRITON_INTERPRET=1, and `make test-gpu` on a
GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hf_int8_paged.kernels.triton.dequantize import bytes_to_half

from .conftest import on_the_device
from .helpers import device_of

pytestmark = on_the_device


@triton.jit
def half_kernel(out_ptr, in_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, bytes_to_half(tl.load(in_ptr + at)))


def test_all_bytes_become_their_numbers_on_triton() -> None:
    numbers = torch.arange(-128, 128, dtype=torch.int8, device=device_of("triton"))
    out = torch.full((256,), torch.nan, dtype=torch.float16, device=numbers.device)
    half_kernel[(1,)](out, numbers, SIZE=256)
    assert torch.equal(out, numbers.half())
