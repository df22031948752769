"""`make test-matrix`: what it counts, resumes and writes. No environment is made and no suite run here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import matrix

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good"/><testcase classname="tests.a" name="left_out"><skipped/></testcase>
<testcase classname="tests.b" name="bad[1]"><failure/></testcase>
<testcase classname="tests.b" name="broken"><error/></testcase>
</testsuite></testsuites>"""
COUNTS = {"passed": 1, "failed": 2, "skipped": 1, "failures": ["tests.b.bad[1]", "tests.b.broken"]}
MACHINE = {"python": "3.10.1", "torch": "2.11.0", "transformers": "5.18.0", "accelerate": "1.10.0", "triton": "3.6.0"}
RECORD = MACHINE | {"instruction_set": "avx2", "workers": 1, "threads": 1, "load": 0, "seconds": 7}


def test_outcomes_are_read_from_pytests_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(JUNIT, encoding="utf-8")
    assert matrix.counts(tmp_path / "report.xml") == COUNTS


def test_busy_loops_end_with_the_block() -> None:
    with matrix.busy(2) as loops:
        assert [loop.poll() for loop in loops] == [None, None]
    assert all(loop.poll() is not None for loop in loops)


def test_an_interpreter_that_is_there_is_found_and_another_is_not() -> None:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = matrix.interpreter(here)
    assert found is not None
    assert subprocess.run([found, "--version"], capture_output=True, text=True).stdout.startswith(f"Python {here}.")
    assert matrix.interpreter("3.99") is None


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run ``main`` over rows whose suites are a function's results; returns what was run and the exit status."""
    ran: list[str] = []
    results: dict[str, dict[str, Any]] = {}

    def run(name: str, folder: Path, arguments: list[str], upgrade: bool) -> dict[str, Any]:
        ran.append(name)
        return dict(results[name])

    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr(matrix, "digest", lambda: "abc")

    def call(*arguments: str, **outcomes: dict[str, Any]) -> tuple[list[str], int]:
        results.update(outcomes)
        ran.clear()
        files = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
        status = matrix.main([*files, *arguments])
        return list(ran), status

    return call


def test_rows_that_passed_are_not_run_again_until_the_sources_change(rows, monkeypatch, tmp_path: Path) -> None:
    good = RECORD | {"passed": 5, "failed": 0, "skipped": 1, "failures": []}
    assert rows("--rows", "oldest", "avx2", oldest=good, avx2={"problem": "no | Python"}) == (["oldest", "avx2"], 1)
    table = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert "| avx2 | not run: no \\| Python |" in table
    assert (
        "| oldest | 3.10.1 | 2.11.0 | 5.18.0 | 1.10.0 | 3.6.0 | avx2 | 1 x 1 | 0 | all tests | 5 | 0 | 1 | 7 |" in table
    )
    assert rows("--rows", "oldest", "avx2", avx2=good) == (["avx2"], 0)
    assert rows("--rows", "oldest", "avx2") == ([], 0)
    assert rows("--rows", "oldest", "--pytest", "tests/a.py") == (["oldest"], 0)
    assert "`tests/a.py`" in (tmp_path / "a.md").read_text(encoding="utf-8")
    monkeypatch.setattr(matrix, "digest", lambda: "abd")
    assert rows("--rows", "avx2") == (["avx2"], 0)
    assert rows("--rows", "avx2", "--again") == (["avx2"], 0)


def test_failures_are_named_and_make_the_exit_status_1(rows, tmp_path: Path) -> None:
    assert rows("--rows", "newest", newest=RECORD | COUNTS) == (["newest"], 1)
    assert "* newest: `tests.b.bad[1]`" in (tmp_path / "a.md").read_text(encoding="utf-8")
    assert rows("--rows", "newest") == ([], 1)


def test_the_committed_table_is_that_of_the_committed_results() -> None:
    if not matrix.JSON.exists():
        pytest.skip("make test-matrix has not been run")
    records = json.loads(matrix.JSON.read_text(encoding="utf-8"))
    assert matrix.MARKDOWN.read_text(encoding="utf-8") == matrix.as_markdown(records)
