"""A model split over two processes: transformers' tests of it, over gloo on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_two_processes

from ..models import batching_model, prompts
from .tensor_parallel_worker import PAUSES, PROMPTS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process says."""
    folder = tmp_path_factory.mktemp("parallel")
    batching_model("llama: full attention").save_pretrained(folder / "model")
    torch.save(prompts(PROMPTS), folder / "prompts.pt")
    worker = Path(__file__).with_name("tensor_parallel_worker.py")
    run_two_processes(worker, str(folder / "model"), str(folder))
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_processes_agree_and_a_seed_gives_the_same_again(ranks: list[dict[str, Any]], kind: str) -> None:
    first, again = ranks[0][kind]
    assert ranks[1][kind] == [first, again]
    assert first == again
    assert [len(tokens) for tokens in first.values()] == [10] * PROMPTS


def test_samples_are_no_greedy_tokens(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["sampled"][0] != ranks[0]["greedy"][0]


def test_a_request_is_cancelled_on_every_process(ranks: list[dict[str, Any]]) -> None:
    assert all(3 <= rank["cancelled after"] < 1000 for rank in ranks)


def test_processes_pause_together_and_lose_nothing(ranks: list[dict[str, Any]]) -> None:
    tokens, sums = ranks[0]["paused"]
    assert ranks[1]["paused"] == (tokens, sums)
    assert sums == [3.0] * PAUSES
    assert [len(own) for own in tokens.values()] == [40] * PROMPTS
