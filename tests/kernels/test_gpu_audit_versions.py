"""The decode kernel under several releases of Triton: what is committed, and how a release is judged."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "eval"))

ROW = {
    "triton": "3.7.1",
    "chip": "sm_90",
    "head_dim": 128,
    "barriers_in_loop": 0,
    "shared_memory_stores_in_loop": 0,
    "spill_instructions_in_loop": 0,
}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"barriers_in_loop": 35}, "35 barriers and 0 shared-memory stores"),
        ({"shared_memory_stores_in_loop": 1}, "0 barriers and 1 shared-memory stores"),
        ({"spill_instructions_in_loop": 2}, "2 spill instructions"),
        ({"spill_instructions_in_loop": 2, "head_dim": 256}, None),
        ({"triton": "3.6.0", "barriers_in_loop": 35, "shared_memory_stores_in_loop": 52}, None),
        ({"triton": "3.10.0", "barriers_in_loop": 35}, "triton 3.10.0, sm_90, head_dim 128: 35 barriers"),
    ],
)
def test_releases_that_should_keep_the_layout_are_judged(change: dict[str, Any], fault: str | None) -> None:
    from gpu_audit_versions import faults

    found = faults([ROW, ROW | change])
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


def test_the_committed_figures_say_from_which_release_on_the_layout_is_kept() -> None:
    from gpu_audit_versions import CHIPS, HEAD_DIMS, faults, release

    from hf_int8_paged.kernels.triton.device import LAYOUTS_KEPT

    rows = json.loads((ROOT / "docs" / "gpu_versions.json").read_text(encoding="utf-8"))["variants"]
    releases = list(dict.fromkeys(row["triton"] for row in rows))
    assert len(rows) == len(releases) * len(CHIPS) * len(HEAD_DIMS)
    assert faults(rows) == []
    before = [row for row in rows if release(row["triton"]) < LAYOUTS_KEPT]
    assert before, "no release is left to warn of"
    assert all(row["barriers_in_loop"] > 1 for row in before), "the warning has lost its reason"
    listed = re.search(r"TRITON \?= (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert listed
    assert set(listed[1].split()) <= set(releases)
