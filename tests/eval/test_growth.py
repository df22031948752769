"""What `eval/growth.py` measures, on a model of a few thousand weights and with a clock of its own."""

from __future__ import annotations

import growth
import pytest
import torch

from tests.models import tiny_model


def test_every_growth_is_found_and_steps_stand_around_it() -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("int8_paged")
    steps, nbytes = growth.grow(model, 700)
    grew = [step.context for step in steps if step.grew]
    assert len(grew) > 4
    assert all(context % 16 == 0 for context in grew), "a pool is full when its last block is"
    for context in grew[1:]:
        timed = [step.context for step in steps]
        assert set(range(context - growth.BEFORE, context + growth.AFTER)) <= set(timed)
    assert nbytes > 0


def test_the_fastest_run_of_each_step_counts() -> None:
    def run(*ms: float) -> list[growth.Step]:
        return [growth.Step(100 + i, i == 6, x / 1e3) for i, x in enumerate(ms)]

    calm, busy = [10.0] * 14, [10.0] * 14
    calm[6], busy[6], busy[9] = 14.0, 12.0, 99.0
    (row,) = growth.growths([run(*calm), run(*busy)])
    assert row["context"] == 106
    assert row["growing_step_ms"] == pytest.approx(12)
    assert row["longest_step_ms"] == pytest.approx(12)
    assert row["longest_over_median"] == pytest.approx(1.2)


def test_both_ways_end_with_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("int8_paged")
    contexts = []
    for in_segments in growth.WAYS.values():
        monkeypatch.setattr(growth.cpu, "SEGMENTS", in_segments)
        torch.manual_seed(0)
        contexts.append([(step.context, step.grew) for step in growth.grow(model, 300)[0]])
    assert contexts[0] == contexts[1]
