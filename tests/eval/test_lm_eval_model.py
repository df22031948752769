"""`eval/lm_eval_model.py`: a small local task through the harness's own command line, and what its logits are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ..models import LOGIT_ROUNDING, TIPPED, FakeQuantizedCache, random_ids
from ..processes import HANGS
from .conftest import EVAL

pytest.importorskip("lm_eval", reason="needs the extra `eval` (lm_eval)")

TASKS = {
    "tiny_choice": "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
    "metric_list:\n  - metric: acc\n",
    "tiny_text": "output_type: generate_until\ndoc_to_target: '{{choices[answer]}}'\n"
    "generation_kwargs:\n  until: ['never']\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n",
}


@pytest.fixture
def lm(model_folder: Path):
    from lm_eval_model import PagedInt8LM

    return lambda **options: PagedInt8LM(pretrained=str(model_folder), device="cpu", batch_size=2, **options)


def test_logits_are_those_of_decoding_with_the_quantized_cache(lm) -> None:
    ids = random_ids(2, 61)
    model = lm(cache="dynamic").model
    whole = model(ids).logits
    assert torch.allclose(lm(cache="dynamic")._model_call(ids), whole, rtol=0, atol=LOGIT_ROUNDING)
    fake = FakeQuantizedCache(model.config)
    want = torch.cat([model(chunk, past_key_values=fake).logits for chunk in ids.split(16, dim=1)], dim=1)
    got = lm()._model_call(ids)
    assert torch.allclose(got[:, :16], whole[:, :16], rtol=0, atol=LOGIT_ROUNDING)
    effect = (want - whole).square().mean().sqrt()
    # Logits that read no quantized keys would be the whole effect away.
    assert effect > 10 * LOGIT_ROUNDING
    assert (got - want).square().mean().sqrt() < TIPPED * effect


def test_an_unknown_cache_is_refused(lm) -> None:
    with pytest.raises(ValueError, match="int8, dynamic, got 'int4'"):
        lm(cache="int4")


@pytest.mark.slow
def test_the_harness_runs_local_tasks_offline(model_folder: Path, tmp_path: Path) -> None:
    words = torch.randint(1, 100, (6, 40), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [
        {"text": " ".join(f"w{i}" for i in row), "choices": [f"w{row[0]}", f"w{row[1]}"], "answer": row[2] % 2}
        for row in words
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    for name, rest in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
            f"test_split: test\ndoc_to_text: '{{{{text}}}}'\n{rest}",
            encoding="utf-8",
        )
    results = {}
    for cache in ("int8", "dynamic"):
        arguments = ["--model", "hf-int8-paged", "--model_args", f"pretrained={model_folder},cache={cache}"]
        arguments += ["--tasks", ",".join(TASKS), "--include_path", str(tmp_path), "--device", "cpu"]
        arguments += ["--output_path", str(tmp_path / cache), "--log_samples"]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, str(EVAL / "lm_eval_model.py"), *arguments],
            env={**os.environ, **offline, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=HANGS,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (path,) = (tmp_path / cache).rglob("results_*.json")
        results[cache] = json.loads(path.read_text(encoding="utf-8"))
    for name in TASKS:
        assert results["int8"]["n-samples"][name]["effective"] == len(lines)
    assert 0 <= results["int8"]["results"]["tiny_choice"]["acc,none"] <= 1
    (path,) = (tmp_path / "int8").rglob("samples_tiny_text*")
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(len(sample["resps"][0][0].split()) == 8 for sample in samples)
