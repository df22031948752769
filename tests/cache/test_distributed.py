"""Models split over processes and over devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_int8_paged import PagedInt8Cache
from tests.models import random_ids, tiny_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_with_half_of_the_heads_each_give_the_tokens_of_one(tmp_path):
    """Tensor parallelism over gloo on the CPU: each process holds one of two KV heads."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    worker = ROOT / "tests" / "cache" / "tensor_parallel_worker.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "model"), str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2)]
    model.set_attn_implementation("int8_paged")
    expected = model.generate(
        random_ids(2, 37),
        past_key_values=PagedInt8Cache(model.config),
        attention_mask=torch.ones(2, 37, dtype=torch.long),
        max_new_tokens=30,
        do_sample=False,
        pad_token_id=0,
    )
    for rank in ranks:
        assert rank["heads"] == 1
        assert torch.equal(rank["tokens"], expected)
