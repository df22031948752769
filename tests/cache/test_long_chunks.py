"""Long chunks over a past in blocks by the C kernels, under every instruction set of this processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hf_int8_paged.kernels.cpu import backend as cpu
from tests.kernels.conftest import backends_here

from .long_chunks import *  # noqa: F403
from .long_chunks import Kernel

if "cpu" not in backends_here():
    pytest.skip("no C compiler, so no C kernels", allow_module_level=True)


@pytest.fixture(params=cpu.isas())
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    before = cpu.selected_isa()
    cpu.select_isa(request.param)
    yield Kernel("cpu", cpu._LIBRARY, "extend")
    cpu.select_isa(before)
