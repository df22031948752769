"""The tests of operations once more by the Triton kernels under their interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_triton import in_another_python

#: By name, the folder, the file, and which of its tests, where not all are.
FILES = {
    "two_readers": ("cache", "two_readers", "triton"),
    "state_machine": ("cache", "state_machine", "triton"),
    "decoding_matrix": ("cache", "decoding_matrix", "triton"),
    "operations": ("cache", "operations", "triton"),
    "sink_tokens": ("cache", "sink_tokens", "triton"),
    "static_limits": ("cache", "static_limits", "triton"),
    "fuzz": ("kernels", "fuzz", "triton"),
    "layouts": ("kernels", "layouts", "triton"),
    "save_load": ("persistence", "save_load", "triton"),
    "files_between_backends": ("persistence", "save_load", "triton and every_other and llama"),
    "offloading": ("cache", "offloading", "triton"),
    "layers_in_slots": ("cache", "offloading", "triton and copied and gemma2 and beams"),
}


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.skipif(INTERPRETED, reason="this process interprets the kernels itself")
@pytest.mark.parametrize("name", FILES)
def test_interpreted(name: str, record_property: Callable[[str, str], None]) -> None:
    folder, file, which = FILES[name]
    arguments = ["-m", "pytest", "-q", "-k", which, f"tests/{folder}/test_{file}.py"]
    run = in_another_python(arguments, TRITON_INTERPRET="1", HF_INT8_PAGED_FUZZ="1000")
    assert run.returncode == 0
    assert " passed" in run.stdout
    for line in run.stdout.splitlines():
        if line.startswith("triton: "):
            record_property("counted", line)
