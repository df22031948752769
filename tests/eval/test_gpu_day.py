"""`eval/gpu_day.py` and its measurements, without a GPU: sections that fail, and every line on the CPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import _gpu_measurements
import gpu_day
import pytest
import torch
from _latency_race import Case

ROOT = Path(__file__).parents[2]
WRITES = "import json, pathlib; print('begins'); pathlib.Path({part!r}).write_text(json.dumps([1, 2]));"


class Scripted(gpu_day.Section):
    """A section whose process writes two results and then does as told."""

    def __init__(self, then: str, seconds: int = 60) -> None:
        super().__init__(seconds)
        object.__setattr__(self, "then", then)

    def command(self, name: str, part: Path, dry_run: bool) -> list[str]:
        return [sys.executable, "-c", WRITES.format(part=str(part)) + self.then]


@pytest.mark.parametrize(
    ("section", "status"),
    [
        (Scripted("pass"), "passed"),
        (Scripted("raise SystemExit(3)"), "failed with exit status 3"),
        (Scripted("import os; os.abort()"), f"failed with exit status {-signal.SIGABRT}"),
        (Scripted("import time; print('waits', flush=True); time.sleep(600)", seconds=5), "ended after its 5 seconds"),
    ],
    ids=["passes", "fails", "crashes", "hangs"],
)
def test_a_section_is_recorded_however_it_ends(section: gpu_day.Section, status: str) -> None:
    record = gpu_day.run("name", section, dry_run=False)
    assert record["status"] == status
    assert record["results"] == [1, 2]
    assert "begins" in record["output"] or status.endswith(str(-signal.SIGABRT))


def test_after_a_crash_the_next_section_goes_on_and_the_file_has_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"first": Scripted("import os; os.abort()"), "second": Scripted("pass")}
    monkeypatch.setattr(gpu_day, "SECTIONS", {"bench": sections})
    path = tmp_path / "day.json"
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "bench", "--dry-run", "--json", str(path)])
    written: list[int] = []
    write = gpu_day.write_json

    def counted(where: Path, what: dict[str, Any]) -> None:
        written.append(len(what["sections"]))
        write(where, what)

    monkeypatch.setattr(gpu_day, "write_json", counted)
    with pytest.raises(SystemExit) as end:
        gpu_day.main()
    assert end.value.code == 1
    assert written == [1, 2], "after each section"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["dry_run"]
    assert [each["section"] for each in result["sections"]] == ["first", "second"]
    assert [each["results"] for each in result["sections"]] == [[1, 2], [1, 2]]


def test_all_sections_together_take_eight_minutes_at_most() -> None:
    assert sum(each.seconds for part in gpu_day.SECTIONS.values() for each in part.values()) <= 8 * 60
    assert list(gpu_day.SECTIONS) == ["tests", "bench"]
    assert gpu_day.SECTIONS["bench"].keys() == _gpu_measurements.MEASUREMENTS.keys()


def test_an_unknown_section_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "bench", "--only", "kernel"])
    with pytest.raises(SystemExit):
        gpu_day.main()
    assert "there is no section 'kernel'; there are kernels, flex, model" in capsys.readouterr().err


def test_a_measurement_stands_beside_what_was_predicted_for_that_chip() -> None:
    predictions = json.loads(_gpu_measurements.PREDICTIONS.read_text(encoding="utf-8"))["predictions"]
    row = next(row for row in predictions if (row["gpu"], row["batch"], row["tokens"]) == ("H100", 1, 8192))
    result: dict[str, Any] = {"contestants": {"int8": {"median_ms": 0.03}}}
    case = Case(1, 8, 4, 128, 8192)
    found = _gpu_measurements.beside_prediction(dict(result), "sm_90", case)
    assert found["prediction"] == row
    assert found["measured_us"] == pytest.approx(30)
    assert found["measured_over_predicted"] == pytest.approx(30 / (row["split_kernel"] + row["join_kernel"]))
    assert "prediction" not in _gpu_measurements.beside_prediction(dict(result), "sm_75", case)


def test_on_a_gpu_the_demo_model_is_loaded_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that a dry run leaves out."""
    loaded: list[Any] = []

    def load(*given: Any) -> tuple[str, str]:
        loaded.append(given)
        return "model", "tokenizer"

    monkeypatch.setattr(_gpu_measurements, "load_model", load)
    assert _gpu_measurements.demo_model(torch.device("cuda")) == "model"
    ((arguments, device),) = loaded
    assert (arguments.dtype, arguments.gguf_file, device.type) == ("float16", None, "cuda")


@pytest.mark.slow
def test_a_dry_run_executes_every_measurement(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    command = [sys.executable, "eval/gpu_day.py", "bench", "--dry-run", "--json", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    kernels, flex, model = (each["results"] for each in json.loads(path.read_text(encoding="utf-8"))["sections"])
    assert len(kernels) == len(flex) == 4
    for result in (*kernels, *flex):
        assert {"int8", "sdpa_fp16", "flash_fp16", "copy"} <= result["contestants"].keys()
        assert result["prediction"]["gpu"] == "H100"
    assert all("flex_fp16" in result["contestants"] for result in flex)
    assert {row["cache"] for row in model} >= {"DynamicCache", "PagedInt8Cache", "PagedInt8Cache, compiled"}


@pytest.mark.slow
def test_a_dry_run_finds_tests_for_every_section(tmp_path: Path) -> None:
    command = [sys.executable, "eval/gpu_day.py", "tests", "--dry-run"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("passed") == len(gpu_day.SECTIONS["tests"])
