"""`eval/throughput.py` and `eval/batching_centers.py` on a tiny model: what is served, and at which budget."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import batching_centers
import pytest
import throughput
from _trace import TraceOptions, trace_of

from tests.models import random_ids

OPTIONS = TraceOptions(40, 100.0, 32, 3, 8, 40, 12, seed=0)


def test_a_trace_is_drawn_once_and_for_all() -> None:
    text = random_ids(5000)
    trace = trace_of(OPTIONS, text)
    assert trace == trace_of(OPTIONS, text)
    assert trace != trace_of(OPTIONS._replace(seed=1), text)
    assert [x.second for x in trace] == sorted(x.second for x in trace)
    assert trace[0].second == 0
    assert len({tuple(x.prompt[:32]) for x in trace}) == 3
    assert all(3 <= x.new_tokens <= 12 for x in trace)
    assert max(len(x.prompt) + x.new_tokens for x in trace) <= OPTIONS.longest
    assert 2 <= sum(len(x.prompt) > 40 for x in trace) <= 20


def test_all_contestants_serve_the_whole_trace_at_equal_bytes(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    text.write_text("A text of some length, from which prompts are cut. " * 200)
    sizes = {"requests": 8, "rate": 200, "shared": 32, "short": 8, "long": 40, "new-tokens": 8, "page-size": 16}
    arguments = ["--model", str(tiny_model_folder), "--text-file", str(text), "--rounds", "2", "--budgets", "3", "6"]
    for name, value in sizes.items():
        arguments += [f"--{name}", str(value)]
    outputs = ["--json", str(tmp_path / "out.json"), "--picture", str(tmp_path / "out.png")]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments, "--device", "cpu", *outputs])
    throughput.main()
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["contestant"] for row in result["rows"]] == 2 * [throughput.OWN, throughput.INT8, throughput.STATIC]
    for row in result["rows"]:
        assert row["nbytes"] <= row["budget"] * 1.05
        assert len(row["seconds"]) == 2
        assert row["requests_per_second"] > 0
    own, int8, _ = result["rows"][:3]
    assert int8["slots"] > 3 * own["slots"], "float32 keys and values take almost four times the bytes"
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_centres_are_compared(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text"
    text.write_text("Every window is a piece of this. " * 30)
    arguments = ["--model", str(tiny_model_folder), "--text-file", str(text), "--window", "96", "--windows", "2"]
    arguments += ["--calibration", "32", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["batching_centers.py", *arguments])
    batching_centers.main()
    centres = json.loads((tmp_path / "out.json").read_text())["centres"]
    assert set(centres) == {"own prompt", "another text", "drawn tokens", "no centre"}
    assert all(0 < row["kld"] < 0.1 and row["top_1"] > 0.5 for row in centres.values())
