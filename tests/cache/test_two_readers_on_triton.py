"""The tests of operations once more by the Triton kernels under their interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_triton import in_another_python


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.skipif(INTERPRETED, reason="this process interprets the kernels itself")
@pytest.mark.parametrize("file", ["two_readers", "state_machine", "decoding_matrix", "operations", "sink_tokens"])
def test_interpreted(file: str, record_property: Callable[[str, str], None]) -> None:
    path = f"tests/cache/test_{file}.py"
    run = in_another_python(["-m", "pytest", "-q", "-k", "triton", path], TRITON_INTERPRET="1")
    assert run.returncode == 0
    assert " passed" in run.stdout
    for line in run.stdout.splitlines():
        if line.startswith("triton: "):
            record_property("counted", line)
