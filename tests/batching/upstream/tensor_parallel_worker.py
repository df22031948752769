"""One process of the tensor-parallel tests: serves batches, samples, cancels and pauses, and writes what came of it.

torchrun --nproc-per-node 2 tensor_parallel_worker.py MODEL_FOLDER OUTPUT_FOLDER
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from hf_int8_paged.batching import PagedInt8BatchingManager

PROMPTS = 6
PAUSES = 3


class Session:
    """A manager on every process, of which the first one asks.

    Attributes:
        results: tokens of all requests that have ended, by name; every process gets them.
    """

    def __init__(self, model: Any, group: Any, do_sample: bool = False, new: int = 10):
        self.group = group
        self.results: dict[str, list[int]] = {}
        self.manager = PagedInt8BatchingManager(
            model,
            GenerationConfig(max_new_tokens=new, do_sample=do_sample, eos_token_id=-1),
            ContinuousBatchingConfig(page_size=16, num_blocks=120, max_batch_tokens=64, seed=123),
            centers={},
        )
        self.manager.warmup()
        self.manager.start()

    def collect(self, count: int) -> dict[str, list[int]]:
        while len(self.results) < count:
            result = self.manager.get_result(timeout=3600)
            assert result is not None
            assert result.error is None, result.error
            if result.is_finished():
                self.results[result.request_id] = result.generated_tokens
        return dict(sorted(self.results.items()))

    def end(self) -> None:
        dist.barrier(self.group)  # whoever stops first stops all
        self.manager.stop()
        dist.barrier(self.group)
        self.manager.destroy()


def served(model: Any, group: Any, prompts: list[list[int]], do_sample: bool) -> dict[str, list[int]]:
    session = Session(model, group, do_sample)
    # Before the first step there is a request for each prompt, so that the same steps are taken every time.
    with session.manager.pause():
        session.manager.add_requests(prompts)
        dist.barrier(group)
    tokens = session.collect(PROMPTS)
    session.end()
    return tokens


def cancelled(model: Any, group: Any, prompt: list[int]) -> int:
    """How many tokens a request of 1,000 had when nobody had it any more."""
    session = Session(model, group, new=1000)
    if dist.get_rank() == 0:
        name = session.manager.add_request(prompt, streaming=True)
        assert name is not None
        for _ in range(3):
            assert session.manager.get_result(timeout=3600) is not None
        session.manager.cancel_request(name)
    processor: Any = session.manager.batch_processor
    for rank in range(2):
        while dist.get_rank() == rank and processor.has_pending_requests():
            time.sleep(0.001)
        dist.barrier(group)  # from the first one on, which has cancelled, no request comes
    assert not session.manager.cache.cache_allocators["full_attention"].block_table
    steps = session.manager.current_batch
    session.end()
    return steps


def paused(model: Any, group: Any, prompts: list[list[int]]) -> tuple[dict[str, list[int]], list[float]]:
    """Tokens, and what a sum over the processes was in each pause: none is in it alone."""
    session = Session(model, group, new=40)
    sums: list[float] = []

    def pause() -> None:
        time.sleep(0.2 * dist.get_rank())
        for _ in range(PAUSES):
            with session.manager.pause():
                probe = torch.full((4,), float(dist.get_rank() + 1))
                dist.all_reduce(probe, group=session.manager.distributed_helper.tp_group)
                sums.append(float(probe[0]))
            time.sleep(0.01)

    session.manager.add_requests(prompts)
    thread = threading.Thread(target=pause)
    thread.start()
    tokens = session.collect(PROMPTS)
    thread.join()
    session.end()
    return tokens, sums


def main(model_folder: str, output_folder: str) -> None:
    dist.init_process_group("gloo")
    group = dist.new_group()  # beside the engine's own messages, which its threads exchange meanwhile
    model = AutoModelForCausalLM.from_pretrained(model_folder, tp_plan="auto", attn_implementation="int8_paged").eval()
    prompts = torch.load(Path(output_folder) / "prompts.pt")
    said: dict[str, Any] = {
        "greedy": [served(model, group, prompts, do_sample=False) for _ in range(2)],
        "sampled": [served(model, group, prompts, do_sample=True) for _ in range(2)],
        "cancelled after": cancelled(model, group, prompts[0]),
        "paused": paused(model, group, prompts),
    }
    torch.save(said, Path(output_folder) / f"rank_{dist.get_rank()}.pt")
    dist.barrier(group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
