"""The tests of append, decode, gather and copy once more, for each instruction set of this processor but the fastest.

The fastest one serves the same tests in their own files.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from hf_int8_paged.kernels.cpu import backend as cpu

from . import test_append, test_decode, test_gather_copy
from .conftest import backends_here

if "cpu" not in backends_here():
    pytest.skip("no C compiler, so no C kernels", allow_module_level=True)


@pytest.fixture(params=cpu.isas()[1:])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.selected_isa()
    cpu.select_isa(request.param)
    yield "cpu"
    cpu.select_isa(before)


for _module in (test_append, test_decode, test_gather_copy):
    for _name, _test in vars(_module).items():
        if _name.startswith("test_") and "backend" in inspect.signature(_test).parameters:
            assert _name not in globals(), f"two tests are called {_name}"
            globals()[_name] = _test
