"""Processes that tests start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

#: Seconds after which a process has hung. No measure of speed: what takes seconds on an idle machine ends well before
#: that on one that is a hundred times as slow.
HANGS = 3600


def run_two_processes(worker: Path, *arguments: str) -> None:
    """Run a script in two processes that form a group of torch.distributed, and see both end well."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *launch],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert result.returncode == 0, result.stderr[-3000:]
