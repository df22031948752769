"""What the machine code of the CPU backend's decode attention allows: `eval/cpu_audit.py`."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "eval"))

#: Vector operations per 64 bytes of K or V of AVX2 without VNNI: for each of two registers two that widen bytes, and
#: for each query row two products and two sums.
FLOOR = {rows: 2 * (2 + 4 * rows) for rows in (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    """What ``make cpu-audit`` wrote."""
    return json.loads((ROOT / "docs" / "cpu_audit.json").read_text(encoding="utf-8"))


def test_the_committed_audit_has_every_loop_once(committed: dict[str, Any]) -> None:
    assert committed["command"] == "python eval/cpu_audit.py --json docs/cpu_audit.json"
    loops = [(row["isa"], row["rows"], row["product"]) for row in committed["loops"]]
    assert len(loops) == len(set(loops)) == 2 * (4 + 3 + 4 + 3)


def test_avx2_is_at_the_floor_of_its_arithmetic(committed: dict[str, Any]) -> None:
    rows = [row for row in committed["loops"] if row["isa"] == "avx2"]
    assert [row["vector_operations"] for row in rows] == [FLOOR[row["rows"]] for row in rows]
    assert not any(row["stack"] for row in rows if row["product"] == "keys"), "sums are kept in registers"


def test_neon_multiplies_once_per_row_and_term(committed: dict[str, Any]) -> None:
    """Two terms of each query row times four registers; what else its vector units do is to broadcast the terms."""
    rows = [row for row in committed["loops"] if row["isa"] == "neon"]
    assert [row["multiply"] for row in rows] == [8 * row["rows"] for row in rows]
    assert all(row["vector_operations"] == row["multiply"] + row["broadcast"] for row in rows)
    assert not any(row["stack"] for row in rows if row["rows"] < 3), "sums are kept in registers"


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("objdump") or not shutil.which("gcc"),
    reason="the audit needs GCC and objdump, and counts x86 instructions",
)
def test_the_committed_audit_is_of_this_code(committed: dict[str, Any], tmp_path: Path) -> None:
    from cpu_audit import SETS, audit, compiler

    if compiler() != committed["compiler"]:
        pytest.skip(f"the audit was made with {committed['compiler']}")
    arm = shutil.which("aarch64-linux-gnu-gcc") and compiler("neon") == committed["arm_compiler"]
    sets = [isa for isa in SETS if arm or isa != "neon"]
    loops = [row for isa in sets for row in audit(isa, tmp_path)]
    expected = [row for row in committed["loops"] if row["isa"] in sets]
    assert json.loads(json.dumps(loops)) == expected, "the kernels have changed: run make cpu-audit"
