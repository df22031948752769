"""`eval/chunks.py`: contestants that compute the same, and the result file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import chunks
import pytest
import torch

CASE = chunks.Case(kv_heads=2, group=3, head_dim=32, past=70, chunk=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_contestants_compute_the_same_attention(dtype: torch.dtype) -> None:
    work = chunks.Work(CASE, dtype)
    want = work.gather_sdpa()
    assert torch.equal(work.sdpa(*work.dense()), want)
    # Of float32: sums of a hundred terms. In half precision SDPA rounds keys, values, weights and output.
    error = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert ((work.int8() - want).float().norm(dim=-1) <= error * want.float().norm(dim=-1)).all()
    assert work.dense_past_bytes == 2 * 2 * 70 * 32 * dtype.itemsize


def test_results_name_machine_load_and_every_contestant(
    run_script: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    threads = torch.get_num_threads()
    numbers = tmp_path / "chunks.json"
    sizes = ("--head-dims", 32, "--pasts", 40, 64, "--chunks", 17, "--heads", 1, 2)
    run_script(chunks, "--threads", 1, "--seconds", 0.01, *sizes, "--json", numbers)
    torch.set_num_threads(threads)
    content = json.loads(numbers.read_text())
    assert content["machine"]["instruction_set"]
    assert len(content["load_average_before"]) == len(content["load_average_after"]) == 3
    assert [result["case"]["past"] for result in content["results"]] == [40, 64]
    for result in content["results"]:
        times = result["contestants"]
        assert set(times) == {"int8", "sdpa", "gather_sdpa"}
        assert all(own["min_ms"] <= own["median_ms"] and own["calls"] >= 3 for own in times.values())
        assert result["speedup_over_sdpa"] == times["sdpa"]["median_ms"] / times["int8"]["median_ms"]
    assert content["memory"][0]["case"]["chunk"] == chunks.MEMORY_CHUNK
    assert "head_dim  32 past    40 chunk   17" in capsys.readouterr().out
