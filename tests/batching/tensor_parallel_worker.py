"""One process of the tensor-parallel test: serves a batch with a model split over all processes, and writes its tokens.

torchrun --nproc-per-node 2 tensor_parallel_worker.py MODEL_FOLDER OUTPUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from hf_int8_paged.batching import PagedInt8BatchingManager


def main(model_folder: str, output_folder: str) -> None:
    dist.init_process_group("gloo")
    served = dist.new_group()  # beside the engine's own messages, which its threads exchange meanwhile
    model = AutoModelForCausalLM.from_pretrained(model_folder, tp_plan="auto", attn_implementation="int8_paged").eval()
    manager = PagedInt8BatchingManager(
        model,
        GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1),
        ContinuousBatchingConfig(page_size=16, num_blocks=24, max_batch_tokens=64, safety_margin=0.0),
    )
    manager.warmup()
    manager.start()
    tokens: dict[int, list[int]] = {}
    if manager.is_tp_driver:
        prompts = torch.load(Path(output_folder) / "prompts.pt")
        names = manager.add_requests(prompts)
        while len(tokens) < len(prompts):
            result = manager.get_result(timeout=3600)
            assert result is not None
            assert result.error is None, result.error
            if result.is_finished():
                tokens[names.index(result.request_id)] = result.generated_tokens
    dist.barrier(served)  # whoever stops first stops all
    storage = manager.cache.cache_allocators["full_attention"].storages[0]  # type: ignore[attr-defined]
    manager.stop(keep_for_next_session=True)
    torch.save({"tokens": tokens, "heads": storage.num_kv_heads}, Path(output_folder) / f"rank_{dist.get_rank()}.pt")
    dist.barrier(served)
    manager.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
