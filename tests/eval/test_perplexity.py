"""`eval/perplexity.py`: windows, the decode-style score, resumption, several processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import perplexity
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from hf_int8_paged import PagedInt8Cache

from ..models import LOGIT_ROUNDING, TIPPED, FakeQuantizedCache, random_ids, tiny_model
from ..processes import HANGS
from .conftest import EVAL

#: A score is the difference of a logit and of a mean of logits.
NLL_ROUNDING = 2 * LOGIT_ROUNDING
SETTINGS = ("--window", 60, "--stride", 25, "--prompt", 9, "--device", "cpu")


@pytest.mark.parametrize("tokens", [3, 17, 100, 131, 200])
@pytest.mark.parametrize(("window", "stride"), [(100, 100), (100, 50), (50, 13), (20, 1), (300, 300)])
def test_windows_score_every_token_once_after_as_much_context_as_fits(tokens: int, window: int, stride: int) -> None:
    prompt = 5
    scored: list[int] = []
    for planned in perplexity.plan_windows(tokens, window, stride, prompt):
        first = planned.begin + planned.prompt + 1
        assert 0 <= planned.begin < planned.end <= tokens
        assert planned.end - planned.begin <= window
        assert planned.scored == planned.end - first > 0
        scored += range(first, planned.end)
    assert scored == sorted(set(scored))
    unscored = set(range(tokens)) - set(scored)
    if stride == window:  # no overlap: the prompt of each window is lost
        assert unscored <= {t for t in range(tokens) if t % window <= prompt}
    elif stride <= window - prompt - 1:
        assert unscored == set(range(min(tokens, prompt + 1)))


@pytest.mark.parametrize("chunk", [1, 3, 16, 40])
def test_a_dense_cache_scores_as_one_forward_pass_does(chunk: int) -> None:
    model, ids = tiny_model("llama"), random_ids(2, 51)
    nll = perplexity.score(model, DynamicCache(config=model.config), ids, 7, chunk)
    logits = model(ids).logits[:, 7:-1].double()
    want = torch.nn.functional.cross_entropy(logits.mT, ids[:, 8:], reduction="none")
    torch.testing.assert_close(nll, want, rtol=0, atol=NLL_ROUNDING)


def test_the_int8_score_reads_quantized_keys_and_values() -> None:
    """A single pass over the window would give the dense score."""
    model, ids = tiny_model("llama"), random_ids(2, 51)
    dense = perplexity.score(model, DynamicCache(config=model.config), ids, 7, 1)
    fake_quantized = perplexity.score(model, FakeQuantizedCache(model.config), ids, 7, 1)
    model.set_attn_implementation("int8_paged")
    int8 = perplexity.score(model, PagedInt8Cache(model.config), ids, 7, 1)
    effect = (fake_quantized - dense).abs().mean()
    assert effect > 10 * NLL_ROUNDING
    assert (int8 - fake_quantized).abs().mean() < TIPPED * effect


def test_prints_and_stores_both_perplexities(model_folder, text_file, tmp_path, run_script, capsys) -> None:
    target = tmp_path / "out" / "result.json"
    run_script(perplexity, "--model", model_folder, "--text-file", text_file, *SETTINGS, "--json", target)
    printed = capsys.readouterr().out
    result = json.loads(target.read_text())
    for name in ("dynamic", "int8"):
        assert f"{name}: perplexity {result['results'][name]['perplexity']:.4f} over 265 tokens" in printed
        assert result["results"][name]["tokens"] == 275 - 9 - 1
    assert "fed 1 at a time after a prompt of 9 or more" in printed
    assert result["command"].startswith("python perplexity.py --model")
    assert {"torch", "transformers", "hf-int8-paged", "python"} <= set(result["versions"])
    assert {"processor", "cores", "threads", "device"} <= set(result["machine"])

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval().requires_grad_(False)
    ids = torch.tensor([[int(word[1:]) for word in text_file.read_text().split()]])
    total = 0.0
    for w in perplexity.plan_windows(275, 60, 25, 9):
        logits = model(ids[:, w.begin : w.end]).logits[0, w.prompt : -1].double()
        total += float(
            torch.nn.functional.cross_entropy(logits, ids[0, w.begin + w.prompt + 1 : w.end], reduction="sum")
        )
    assert result["results"]["dynamic"]["perplexity"] == pytest.approx(math.exp(total / 265), rel=NLL_ROUNDING)


@pytest.fixture
def plain(model_folder, text_file, tmp_path, run_script) -> dict:
    """Results of one window after the other in one process."""
    run_script(perplexity, "--model", model_folder, "--text-file", text_file, *SETTINGS, "--json", tmp_path / "1.json")
    return json.loads((tmp_path / "1.json").read_text())["results"]


def same(got: dict, want: dict, rel: float) -> bool:
    return all(
        got[name]["tokens"] == want[name]["tokens"]
        and got[name]["perplexity"] == pytest.approx(want[name]["perplexity"], rel=rel)
        for name in want
    )


def test_batched_windows_score_alike(model_folder, text_file, tmp_path, run_script, plain) -> None:
    target = tmp_path / "batched.json"
    run_script(
        perplexity, "--model", model_folder, "--text-file", text_file, *SETTINGS, "--batch-size", 4, "--json", target
    )
    batched = json.loads(target.read_text())["results"]
    assert batched["dynamic"]["perplexity"] == pytest.approx(plain["dynamic"]["perplexity"], rel=NLL_ROUNDING)
    # Windows of a batch share one key centre, so that their roundings are others, of the same size: in each of the two
    # runs a mean of scores is off by no more than the scores are on average.
    model, ids = tiny_model("llama"), random_ids(2, 51)
    dense, quantized = (
        perplexity.score(model, kind(config=model.config), ids, 7, 1) for kind in (DynamicCache, FakeQuantizedCache)
    )
    effect = float((quantized - dense).abs().mean())
    assert batched["int8"]["perplexity"] == pytest.approx(plain["int8"]["perplexity"], rel=2 * effect)


def test_a_killed_run_goes_on_where_it_stopped(
    model_folder, text_file, tmp_path, run_script, plain, monkeypatch
) -> None:
    journal, target = tmp_path / "run.jsonl", tmp_path / "resumed.json"
    arguments = ("--model", model_folder, "--text-file", text_file, *SETTINGS, "--journal", journal, "--json", target)
    run_script(perplexity, *arguments)
    lines = journal.read_text().splitlines(keepends=True)
    # Killed in the middle of writing its fourth record.
    journal.write_text("".join(lines[:4]) + lines[4][:20])
    scored: list[torch.Tensor] = []
    original = perplexity.score

    def counting_score(*arguments) -> torch.Tensor:
        scored.append(original(*arguments))
        return scored[-1]

    monkeypatch.setattr(perplexity, "score", counting_score)
    run_script(perplexity, *arguments)
    assert len(scored) == len(lines) - 4
    assert same(json.loads(target.read_text())["results"], plain, 1e-12)
    run_script(perplexity, *arguments)
    assert len(scored) == len(lines) - 4
    with pytest.raises(ValueError, match="was made with other settings"):
        run_script(perplexity, *arguments, "--chunk", 2)


@pytest.mark.slow
def test_two_processes_give_the_same_number(model_folder, text_file, tmp_path, plain) -> None:
    target = tmp_path / "two.json"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    arguments = ["--model", model_folder, "--text-file", text_file, *SETTINGS, "--json", target]
    result = subprocess.run(
        [*launch, "--mixed_precision=no", "--dynamo_backend=no", str(EVAL / "perplexity.py"), *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("int8: perplexity") == 1
    assert same(json.loads(target.read_text())["results"], plain, 1e-6)


@pytest.mark.parametrize("streaming", [(), ("--streaming",)], ids=["whole", "streamed"])
def test_reads_any_text_dataset(model_folder, tmp_path, run_script, streaming, capsys) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"body": f"w{i} w{i + 1} w{i + 2}"} for i in range(1, 100)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = ("--dataset", folder, "--config", "", "--column", "body", "--max-tokens", 50, *streaming)
    run_script(perplexity, "--model", model_folder, *dataset, *SETTINGS)
    assert "50 tokens of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stride", 61), "--stride 61 is larger than --window 60"),
        (("--prompt", 59), "--prompt 59 leaves no token"),
        (("--chunk", 0), "must be at least 1, got 0"),
        (("--cache", "fp4"), "invalid choice"),
    ],
)
def test_impossible_settings(model_folder, text_file, run_script, capsys, arguments, message) -> None:
    with pytest.raises(SystemExit):
        run_script(perplexity, "--model", model_folder, "--text-file", text_file, *SETTINGS, *arguments)
    assert message in capsys.readouterr().err


def test_a_text_too_short_to_score(model_folder, text_file, run_script) -> None:
    with pytest.raises(SystemExit, match="has 9 tokens: none is left"):
        run_script(perplexity, "--model", model_folder, "--text-file", text_file, *SETTINGS, "--max-tokens", 9)
