"""The tests of operations once more by the Triton kernels under their interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_triton import in_another_python

FILES = [
    "two_readers", "state_machine", "decoding_matrix", "operations", "sink_tokens", "static_limits", "fuzz", "layouts",
    "save_load", "offloading",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.skipif(INTERPRETED, reason="this process interprets the kernels itself")
@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str, record_property: Callable[[str, str], None]) -> None:
    folder = {"fuzz": "kernels", "layouts": "kernels", "save_load": "persistence"}.get(file, "cache")
    arguments = ["-m", "pytest", "-q", "-k", "triton", f"tests/{folder}/test_{file}.py"]
    run = in_another_python(arguments, TRITON_INTERPRET="1", HF_INT8_PAGED_FUZZ="1000")
    assert run.returncode == 0
    assert " passed" in run.stdout
    for line in run.stdout.splitlines():
        if line.startswith("triton: "):
            record_property("counted", line)
