"""`eval/latency.py`: cold sets, contestants, the result file and the picture."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import _latency_cuda
import _latency_race
import latency
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_int8_paged.kernels import gather_dense

CASE = _latency_race.Case(batch=2, kv_heads=2, group=3, head_dim=32, context=48)


def test_contestants_rotate_over_more_bytes_than_stay_in_the_cache() -> None:
    assert _latency_race.sets_for(bytes_read=10, cold_bytes=101) == 11
    assert _latency_race.sets_for(bytes_read=1000, cold_bytes=10) == 2
    calls: list[int] = []
    first, second, warm_up = (partial(calls.append, i) for i in range(3))
    contestant = _latency_race.Contestant([first, second], bytes_read=1, warm_up=warm_up)
    for _ in range(5):
        contestant.step()
    assert calls == [2, 0, 2, 1, 2, 0, 2, 1, 2, 0]
    assert len(contestant.times) == 5


@pytest.mark.parametrize("random_order", [False, True])
def test_the_int8_contestant_computes_the_attention_that_torch_computes(random_order: bool) -> None:
    q = torch.randn(2, 6, 1, 32)
    (call,) = _latency_race.int8_calls(CASE, 1, random_order=random_order, q=q)
    out, _, storage, tokens = call.args[:4]
    call()
    k, v = gather_dense(storage, tokens.block_table, tokens.context_lens)
    want = scaled_dot_product_attention(q.view(2, 2, 3, 32), k, v).view(2, 6, 1, 32)
    # 1e-4 of the largest value, as in tests/kernels/attention_oracle.py.
    torch.testing.assert_close(out, want, rtol=0, atol=1e-4 * float(v.abs().max()))
    assert storage.bytes_per_token * 2 * 48 == CASE.elements + 2 * CASE.elements // CASE.head_dim


def test_results_name_machine_versions_and_every_contestant(
    run_script: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(latency, "last_level_cache", lambda: 1 << 14)
    threads = torch.get_num_threads()
    numbers, picture = tmp_path / "latency.json", tmp_path / "latency.png"
    case = ("--case", 1, 2, 2, 32, 64)
    run_script(latency, "--rounds", 5, "--threads", 1, *case, *case, "--json", numbers, "--picture", picture)
    torch.set_num_threads(threads)
    content = json.loads(numbers.read_text())
    assert content["machine"]["instruction_set"]
    assert content["machine"]["threads"] == 1
    assert content["versions"]["torch"] == importlib.metadata.version("torch")
    assert len(content["results"]) == 2
    for result in content["results"]:
        ours = result["contestants"]["int8"]
        assert ours["min_ms"] <= ours["p10_ms"] <= ours["median_ms"] <= ours["p90_ms"]
        assert ours["sets"] * (2 * 64 * (64 + 4)) >= 4 << 14
        share = ours["gb_per_s"] / result["read_bandwidth_gb_per_s"]
        assert result["share_of_read_bandwidth"] == pytest.approx(share)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "batch 1, 2 KV heads, group 2, head_dim 32, context 64" in capsys.readouterr().out


def test_a_context_that_ends_inside_a_block_is_refused(run_script: Callable[..., None]) -> None:
    with pytest.raises(SystemExit):
        run_script(latency, "--case", 1, 2, 2, 32, 65)


def test_on_a_gpu_all_contestants_compute_the_same_attention_and_are_judged() -> None:
    """As far as a machine without one can tell: the contestants run on the CPU, and the clock is the CPU's."""
    flex = torch.nn.attention.flex_attention.flex_attention
    q = torch.randn(2, 6, 1, 32).half()
    found = _latency_cuda.contestants(CASE, 1 << 12, q, flex)
    dense = found["sdpa_fp16"][0][0]
    keys, values = dense.args[1:]
    attended = flex(q, keys, values, enable_gqa=True)
    # float16 has 11 bits, and rounds weights and outputs.
    torch.testing.assert_close(attended, dense().view(2, 6, 1, 32), rtol=0, atol=2**-9)
    contestants = {name: _latency_race.Contestant(*parts) for name, parts in found.items()}
    result = _latency_cuda.judged(CASE, latency.race(contestants, rounds=3))
    assert all(contestant.bytes_read * len(contestant.calls) >= 1 << 12 for contestant in contestants.values())
    assert {"speedup_over_sdpa_fp16", "speedup_over_flex_fp16", "share_of_read_bandwidth"} <= set(result)
    line = _latency_cuda.report(result)
    assert "\n    " in line
    assert "flex_fp16" in line
