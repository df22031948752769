"""`eval/bench_peers.py` and the scripts of `eval/peers/`, as far as they go without the peers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_peers
import pytest
from latency_model import slope

from ..processes import HANGS
from .conftest import EVAL

SCRIPTS = EVAL / "peers"
sys.path.append(str(SCRIPTS))

#: A peer's script that needs no peer: one millisecond per token, and one more per 1,000 tokens of context.
FAKE = """
from _turns import parse, take_turns, write
args = parse(__doc__)
turns = {("q8_0", n): lambda n=n: 0.001 + n / 1e6 for n in reversed(args.contexts)}
write(args.json, {"versions": {"fake": "1"}, "times": take_turns(turns, args.rounds)})
"""


def run_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *peers: bench_peers.Peer) -> dict[str, Any]:
    monkeypatch.setattr(bench_peers, "PEERS", peers)
    rows = [{"cache": "DynamicCache", "context": context, "ms": context / 100} for context in (64, 1064)]
    ours = {"versions": {}, "weights": "all of them", "caches": bench_peers.with_slopes(rows)}
    monkeypatch.setattr(bench_peers, "measure_transformers", lambda args: ours)
    monkeypatch.setattr(bench_peers, "gguf_file", lambda folder: folder / "model.gguf")
    arguments = ["--contexts", "1064", "64", "--rounds", "2", "--environments", tmp_path, "--json", tmp_path / "x.json"]
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *map(str, arguments)])
    bench_peers.main()
    return json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))


def test_peers_stand_beside_each_other_with_slopes(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(bench_peers, "install", lambda peer, environment: Path(sys.executable))
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    script = tmp_path / "with_nothing.py"
    script.write_text(FAKE, encoding="utf-8")
    result = run_main(monkeypatch, tmp_path, bench_peers.Peer("a fake", str(script), ()))
    assert result["machine"]["processor"]
    assert result["machine"]["threads"] == 2
    ours, fake = result["contestants"]
    assert ours["caches"][0]["ms_per_1000_tokens"] == pytest.approx(10)
    assert fake["versions"] == {"fake": "1"}
    assert set(fake["load_average"]) == {"before", "after"}
    [cache] = fake["caches"]
    assert [point["context"] for point in cache["points"]] == [64, 1064]
    assert cache["ms_per_1000_tokens"] == pytest.approx(1)
    assert f"| a fake | q8_0 | {bench_peers.GGUF_WEIGHTS} | 1.1 | 2.1 | 1.00 |" in capsys.readouterr().out


def test_the_slope_is_that_of_latency_model() -> None:
    points = [(8000, 9.0), (64, 2.0), (1024, 3.0)]
    rows = [{"cache": "f16", "context": context, "ms": ms} for context, ms in points]
    [found] = bench_peers.with_slopes(rows)
    assert found["ms_per_1000_tokens"] == slope(sorted(points)) == pytest.approx(7000 / 7936)


def test_a_peer_that_cannot_be_installed_is_skipped_with_pips_word(monkeypatch, tmp_path: Path, capsys) -> None:
    def no_network(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        status = "pip" in command
        return subprocess.CompletedProcess(command, status, "", "Looking\nERROR: No matching distribution found")

    monkeypatch.setattr(bench_peers.subprocess, "run", no_network)
    peer = bench_peers.Peer("a fake", "with_nothing.py", ("nothing==1",))
    said = "a fake was skipped, as nothing==1 could not be installed; pip's last line: ERROR: No matching distribution"
    result = run_main(monkeypatch, tmp_path, peer)
    assert result["contestants"][1]["skipped"].startswith(said)
    assert said in capsys.readouterr().out


def test_an_environment_is_made_again_for_other_versions(monkeypatch, tmp_path: Path) -> None:
    made: list[list[str]] = []

    def fake(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        made.append(command)
        bench_peers.interpreter(tmp_path).parent.mkdir(exist_ok=True)
        bench_peers.interpreter(tmp_path).touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(bench_peers.subprocess, "run", fake)
    for version, commands in (("1", 2), ("1", 2), ("2", 4)):
        bench_peers.install(bench_peers.Peer("a fake", "", (f"nothing=={version}",)), tmp_path)
        assert len(made) == commands


@pytest.mark.parametrize(("script", "module"), [("with_llama_cpp", "llama_cpp"), ("with_openvino", "openvino")])
def test_a_script_without_its_peer_says_so_and_does_not_fail(script: str, module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('no such thing')", encoding="utf-8")
    arguments = ["--gguf", str(tmp_path / "absent.gguf"), "--json", str(tmp_path / "result.json")]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=HANGS,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert list(result) == ["skipped"]
    assert "was skipped, as " in result["skipped"]
    assert "no such thing" in result["skipped"]
    assert result["skipped"] in done.stdout


def test_contestants_take_turns_and_the_first_turns_are_not_timed() -> None:
    from _turns import WARMUP, take_turns, token_ids

    calls = {"a": 0, "b": 0}

    def turn(name: str) -> float:
        calls[name] += 1
        assert abs(calls["a"] - calls["b"]) <= 1
        return calls[name]

    times = take_turns({(name, 64): lambda name=name: turn(name) for name in calls}, rounds=2)
    assert [(row["cache"], row["seconds"]) for row in times] == [(x, [WARMUP + 1, WARMUP + 2]) for x in "ab"]
    assert token_ids(64) == token_ids(100)[:64]
    assert max(token_ids(9000)) < 49_152, "SmolLM2's vocabulary"
