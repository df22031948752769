"""`make test-gpu` and `make bench-gpu` say so where there is no GPU, and fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "pytest", "-m", "gpu", "tests/gpu", "tests/kernels"],
        ["eval/gpu_day.py", "tests"],
        ["eval/gpu_day.py", "bench"],
        ["eval/latency.py", "--device", "cuda"],
        ["eval/latency_model.py", "--device", "cuda"],
    ],
    ids=["pytest", "test-gpu", "bench-gpu", "latency of kernels", "latency of a model"],
)
def test_without_a_gpu_they_say_so_and_fail(command: list[str]) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "no GPU was found" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
