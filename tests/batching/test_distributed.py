"""A model split over two processes serves a batch as one does."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.processes import run_two_processes

from .alone import run
from .models import batching_model, manager_for, prompts


def test_two_processes_with_a_kv_head_each_give_the_tokens_of_one(tmp_path: Path) -> None:
    """Tensor parallelism over gloo on the CPU, with prefixes that are shared and requests that lose their blocks. Sums
    over heads are added in another order, so near ties may part."""
    model, asked = batching_model("llama: full attention"), prompts(16)
    model.save_pretrained(tmp_path / "model")
    torch.save(asked, tmp_path / "prompts.pt")
    worker = Path(__file__).with_name("tensor_parallel_worker.py")
    run_two_processes(worker, str(tmp_path / "model"), str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2)]
    assert [rank["heads"] for rank in ranks] == [1, 1]
    with manager_for(model, num_blocks=24, safety_margin=0.0) as manager:
        results, names = run(manager, asked)
    same = [ranks[0]["tokens"][i] == results[name].generated_tokens for i, name in enumerate(names)]
    assert sum(same) >= 15
