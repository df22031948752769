"""`eval/bench.py`: the table that it makes of result files, and its exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import _common
import bench
import pytest
import torch

MACHINE = {"processor": "some processor", "instruction_set": "avx2", "threads": 2}
STEP = {"ms_quartile_1": 39.0, "ms_quartile_3": 41.0}


def of_model(ours_at_8000: float) -> dict[str, Any]:
    ms = {
        ("DynamicCache", 64): 40.0,
        ("DynamicCache", 8000): 80.0,
        ("PagedInt8Cache", 64): 40.0,
        ("PagedInt8Cache", 8000): ours_at_8000,
    }
    results = [{"batch": 1, "cache": name, "context": at, "ms": x, **STEP} for (name, at), x in ms.items()]
    slopes = [("DynamicCache", 5.0), ("PagedInt8Cache", (ours_at_8000 - 40) / 8)]
    return {
        "machine": MACHINE,
        "results": results,
        "slopes": [{"batch": 1, "cache": name, "ms_per_1000_tokens": x} for name, x in slopes],
    }


def verdicts(rows: Any) -> list[bool | None]:
    return [row.kept for row in rows]


def test_a_model_is_held_against_dynamic_cache_and_against_itself() -> None:
    assert verdicts(bench.model_rows(of_model(44.0))) == [True] * 4
    level, slope = list(bench.model_rows(of_model(48.0)))[2:]
    assert (level.kept, slope.kept) == (False, False)
    assert (level.ours, level.goal, level.beside) == ("1.20", "<= 1.12", "DynamicCache 2.00")
    assert slope.ours == "0.20"
    assert slope.beside == "ms per 1,000 tokens: DynamicCache 5.00, PagedInt8Cache 1.00"


@pytest.mark.parametrize(
    ("group", "share", "kept"), [(1, 0.69, False), (1, 0.71, True), (3, 0.56, True), (4, 0.54, False)]
)
def test_kernels_are_held_against_the_read_bandwidth(group: int, share: float, kept: bool) -> None:
    case = {"batch": 1, "kv_heads": 8, "group": group, "head_dim": 64, "context": 8192}
    times = {"contestants": {"int8": {"median_ms": 0.3}}, "speedup_over_sdpa_fp32": 5.0}
    (row,) = bench.kernel_rows({"results": [{"case": case, "share_of_read_bandwidth": share, **times}]})
    assert row.kept is kept
    assert row.what == f"1 x 8 KV heads x {group}, head_dim 64, 8192 tokens"


def test_what_has_no_goal_or_was_not_measured_has_no_verdict() -> None:
    budgets = [
        {"name": "one", "budget": 30, "measured": 31.0, "unit": "us"},
        {
            "name": "two",
            "budget": 30,
            "measured": None,
            "unit": "us",
            "verdict": "not measured: triton is not installed",
        },
    ]
    assert verdicts(bench.budget_rows({"budgets": budgets})) == [False, None]


def run_main(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--results", str(folder), "--no-run", *arguments])
    return bench.main()


@pytest.mark.parametrize(("ours", "status"), [(44.0, 0), (48.0, 1)])
def test_the_exit_status_tells_of_a_missed_goal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], ours: float, status: int
) -> None:
    first = next(benchmark for benchmark in bench.benchmarks(2) if benchmark.name == "model")
    (tmp_path / f"{first.result}.json").write_text(json.dumps(of_model(ours)))
    assert run_main(monkeypatch, tmp_path, "--only", "model", "growth") == status
    printed = capsys.readouterr().out
    assert f"{first.result}: some processor, avx2, 2 threads" in printed
    assert "growth: not measured" in printed
    assert ("MISSED" in printed) is bool(status)


def test_result_files_that_are_committed_can_be_read() -> None:
    for benchmark in bench.benchmarks(2):
        path = bench.FOLDER / "results" / f"{benchmark.result}.json"
        if path.exists():
            assert len(bench.table(benchmark, json.loads(path.read_text(encoding="utf-8")))) > 1


def test_a_script_that_fails_ends_the_run(tmp_path: Path) -> None:
    wrong = bench.Benchmark("growth", ["growth.py", "--tokens", "no number"], "growth", bench.growth_rows, {})
    with pytest.raises(SystemExit, match=r"python eval/growth\.py --tokens no number failed with exit status 2"):
        bench.run(wrong, tmp_path / "growth.json")


def test_timed_results_name_the_instruction_set_and_the_load_before_and_after(tmp_path: Path) -> None:
    made = _common.provenance(torch.device("cpu"), timed=True)
    _common.write_json(tmp_path / "timed.json", made)
    _common.write_json(tmp_path / "other.json", _common.provenance(torch.device("cpu")))
    timed, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("timed", "other"))
    assert timed["machine"]["instruction_set"] == bench.cpu.selected_isa()
    assert timed["machine"]["threads"] == torch.get_num_threads()
    assert timed["load_average_before"] == made["load_average_before"]
    assert "load_average_after" in timed
    assert not {"load_average_before", "load_average_after"} & set(other)
