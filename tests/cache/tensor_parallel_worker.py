"""One process of the tensor-parallel test: generates with a model split over all processes, and writes its tokens.

torchrun --nproc-per-node 2 tensor_parallel_worker.py MODEL_FOLDER OUTPUT_FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hf_int8_paged import PagedInt8Cache


def main(model_folder: str, output_folder: str) -> None:
    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(model_folder, tp_plan="auto", attn_implementation="int8_paged").eval()
    ids = torch.randint(1, 128, (2, 37), generator=torch.Generator().manual_seed(0))
    cache = PagedInt8Cache(model.config)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, past_key_values=cache, **options)
    heads = cache.layers[0].keys.shape[1]
    torch.save({"tokens": tokens, "heads": heads}, Path(output_folder) / f"rank_{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
