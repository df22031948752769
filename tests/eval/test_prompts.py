"""`eval/prompts.py`: what its contestants read, and what it compares."""

from __future__ import annotations

import prompts
import torch

from tests.models import random_ids, tiny_model


def test_both_caches_read_the_whole_prompt_whatever_the_chunk() -> None:
    model, ids = tiny_model("llama"), random_ids(1, 90)
    with torch.no_grad():
        want = model(ids).logits[0, -1]
    for chunk in (90, 40, 17):
        for name in prompts.CACHES:
            seconds, logits = prompts.read(model, name, ids, chunk)
            assert seconds > 0
            assert (logits - want).abs().max() < (1e-3 if name == "DynamicCache" else 0.5)


def test_a_race_has_a_time_of_each_round_and_the_divergence_of_the_end() -> None:
    result = prompts.race(tiny_model("llama"), random_ids(1, 90), 40, 3)
    assert [len(times) for times in result["seconds"].values()] == [3, 3]
    assert result["median_seconds"]["PagedInt8Cache"] > 0
    assert 0 < result["kld_of_the_last_token"] < 0.1
