"""`eval/drift.py`: the slope and its interval, and what is compared."""

from __future__ import annotations

import json
from pathlib import Path

import drift
import pytest
import torch

from ..models import LOGIT_ROUNDING, random_ids, tiny_model

pytest.importorskip("scipy", reason="needs the extra `eval` (scipy)")


@pytest.mark.parametrize("per_1000", [0.0, 0.5])
def test_the_interval_covers_the_true_slope(per_1000: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(60):
        noise = torch.randn(2000, generator=generator, dtype=torch.float64)
        values = per_1000 * torch.arange(2000, dtype=torch.float64) / 1000 + noise
        found = drift.slope(values, 20)
        hits += found["low"] <= per_1000 <= found["high"]
    assert 52 <= hits <= 60  # 57 expected; fewer than 52 in one of 70 tries


def test_a_trend_without_noise_is_found_exactly() -> None:
    found = drift.slope(3e-3 * torch.arange(500, dtype=torch.float64), 10)
    assert found["per_1000_tokens"] == pytest.approx(3.0)


def test_the_dense_model_is_asked_about_the_tokens_that_were_generated() -> None:
    model, prompt = tiny_model("llama"), random_ids(1, 30)
    model.set_attn_implementation("int8_paged")
    tokens, logits = drift.generate(model, prompt, 25)
    model.set_attn_implementation("sdpa")
    dense = drift.teacher_forced(model, prompt, tokens)
    assert torch.equal(logits.argmax(-1), tokens)
    whole = model(torch.cat([prompt, tokens[None]], dim=1)).logits[0, 29:-1]
    assert torch.allclose(dense, whole, rtol=0, atol=LOGIT_ROUNDING)
    # The first logits come from the prompt itself, which was not quantized; the others differ a little.
    assert torch.allclose(logits[0], dense[0], rtol=0, atol=LOGIT_ROUNDING)
    assert LOGIT_ROUNDING < (logits[1:] - dense[1:]).abs().mean() < 0.2


def test_a_run_writes_figures_and_picture(model_folder, text_file, tmp_path: Path, run_script) -> None:
    run_script(
        drift, "--model", model_folder, "--text-file", text_file, "--device", "cpu", "--prompt", 20, "--tokens", 40,
        "--prompts", 2,
        "--stretches", 4, "--json", tmp_path / "drift.json", "--picture", tmp_path / "drift.png",
    )  # fmt: skip
    results = json.loads((tmp_path / "drift.json").read_text(encoding="utf-8"))["results"]
    assert results["tokens"] == 40
    assert results["per_1000_tokens"] == pytest.approx(sum(results["slopes_of_each_prompt"]) / 2)
    assert results["low"] <= results["per_1000_tokens"] <= results["high"]
    assert (tmp_path / "drift.png").stat().st_size > 10_000
