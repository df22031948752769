"""The tests of operations once more by the Triton kernels under their interpreter."""

from __future__ import annotations

import pytest

from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_triton import in_another_python


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.skipif(INTERPRETED, reason="this process interprets the kernels itself")
@pytest.mark.parametrize("file", ["two_readers", "state_machine", "decoding_matrix", "operations", "sink_tokens"])
def test_interpreted(file: str, capsys: pytest.CaptureFixture) -> None:
    path = f"tests/cache/test_{file}.py"
    run = in_another_python(["-m", "pytest", "-q", "-k", "triton", path], TRITON_INTERPRET="1")
    assert run.returncode == 0
    assert " passed" in run.stdout
    with capsys.disabled():
        print(*(line for line in run.stdout.splitlines() if "sequences" in line), sep="\n")
