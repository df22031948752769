"""Models split over processes and over devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels import KvCacheQuant, reference
from tests.models import random_ids, tiny_model
from tests.processes import run_two_processes


@pytest.mark.slow
def test_two_processes_with_half_of_the_heads_each_give_the_tokens_of_one(tmp_path):
    """Tensor parallelism over gloo on the CPU: each process holds one of two KV heads."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    worker = Path(__file__).with_name("tensor_parallel_worker.py")
    run_two_processes(worker, str(tmp_path / "model"), str(tmp_path))
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


def test_layers_on_two_devices_have_their_blocks_and_block_table_where_their_keys_are(monkeypatch):
    """Placement only, with `meta` as the second device: nothing is computed there, but everything that would be must be
    there. Whether results are right on two real devices is not tested, for want of them."""
    seen = []

    def spy(name):
        original = getattr(reference, name)

        def call(*args):
            storage = next(arg for arg in args if isinstance(arg, KvCacheQuant))
            if storage.device.type == "cpu":
                return original(*args)
            inside = (storage.k, storage.v, storage.k_scales, storage.v_scales, storage.key_center)
            tensors = [x for x in (*args, *inside) if isinstance(x, torch.Tensor)]
            seen.append((name, {x.device.type for x in tensors}, args))

        return call

    monkeypatch.setattr(reference, "append", spy("append"))
    monkeypatch.setattr(reference, "copy", spy("copy"))
    cache = PagedInt8Cache(tiny_model("llama").config)
    devices = ["cpu", "meta", "meta"]

    def step(batch: int, tokens: int) -> None:
        rows = torch.randn(batch, 2, tokens, 16, generator=torch.Generator().manual_seed(tokens))
        for layer, device in enumerate(devices):
            here = rows.to(device)
            keys, values = cache.update(here, here, layer)
            assert {keys.device.type, values.device.type, cache.layers[layer].keys.device.type} == {device}

    for tokens in (20, 1, 1, 30):
        step(2, tokens)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 0]))
    step(4, 1)
    assert [name for name, *_ in seen].count("append") == 2 * 5
    assert [name for name, *_ in seen].count("copy") == 2, "the shared last block is copied in each layer"
    assert all(where == {"meta"} for _, where, _ in seen)
    assert [cache.pool.storages.get(layer).k.device.type for layer in range(3)] == devices
    # The table is carried over once per step, and both layers there read the same copy.
    tables = [args[3] for name, _, args in seen if name == "append"]
    assert all(first is second for first, second in zip(tables[::2], tables[1::2]))
    # The layer on the CPU works as if it were alone.
    assert cache.layers[0].keys.clone().isfinite().all()
