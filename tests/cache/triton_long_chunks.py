"""Long chunks over a past in blocks under Triton. tests/kernels/test_triton.py runs this file under TRITON_INTERPRET=1,
and `make test-gpu` on a GPU."""

from __future__ import annotations

import pytest

from hf_int8_paged.kernels.triton import backend as triton_backend
from tests.kernels.conftest import on_the_device

from .long_chunks import *  # noqa: F403
from .long_chunks import Kernel

pytestmark = on_the_device


@pytest.fixture
def kernel() -> Kernel:
    return Kernel("triton", triton_backend, "launch_extend")
