"""Long chunks over a past in blocks under Triton. tests/kernels/test_triton.py runs this file under TRITON_INTERPRET=1,
and `make test-gpu` on a GPU."""

from __future__ import annotations

import pytest

from hf_int8_paged.kernels.triton import backend as triton_backend
from hf_int8_paged.kernels.triton import long_chunks
from tests.kernels.conftest import on_the_device

from .long_chunks import *  # noqa: F403
from .long_chunks import Kernel

pytestmark = on_the_device


@pytest.fixture(params=[long_chunks.MOST_ROWS_FROM_INT8, 16], ids=["past_as_int8", "past_as_floats"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """The tests' chunks are as long as the kernel for int8 takes them, or longer."""
    monkeypatch.setattr(long_chunks, "MOST_ROWS_FROM_INT8", request.param)
    return Kernel("triton", triton_backend, "launch_extend")
