"""A step of the preallocated cache waits for no value of the device: traced with tensors that have none.

Reading a value (``item``, ``int``, ``if`` over a tensor) raises under `FakeTensorMode`. What the operators do inside is
traced by tests/kernels/test_triton.py with fake CUDA tensors; whole models index with integers, which torch refuses to
do on those where it was built without CUDA, so here the fakes are called CPU tensors.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels.triton import backend as triton_backend
from tests.models import tiny_model

#: Operators whose result has a shape that depends on values, or is a value.
WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "unique", "equal")


def traced_step(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a decode step of two layers calls each operator, and each of Triton's kernels."""
    monkeypatch.setattr(triton_backend, "unavailable", lambda *layer: None)
    kernels: Counter[str] = Counter()
    for kernel in ("append", "attend", "gather"):
        monkeypatch.setattr(triton_backend, kernel, lambda *_, kernel=kernel: kernels.update([kernel]))
    with FakeTensorMode(), torch.no_grad():
        model: Any = tiny_model(name, num_hidden_layers=2, head_dim=32)
        model.set_attn_implementation("int8_paged")
        cache: Any = PagedInt8Cache(model.config, max_batch_size=2, max_cache_len=128, backend="triton")
        first = torch.empty(2, 2, 1, 32)
        for layer in cache.layers:
            layer.lazy_initialization(first, first)
        mask = torch.ones(2, 128, dtype=torch.long) if masked else None
        ids = torch.ones(2, 1, dtype=torch.long)
        graph = make_fx(lambda ids: model(ids, past_key_values=cache, attention_mask=mask).logits)(ids)
    return kernels + Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_decode_step_reads_no_value(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = traced_step(name, masked, monkeypatch)
    assert called["append"] == called["attend"] == 2
    assert not called["gather"]
    assert called["aten.mm.default"]
    assert not [target for target in called if target.split(".")[-2:][0] in WAITING]


def test_the_trace_would_notice() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        make_fx(lambda x: x * int(x.sum()))(torch.ones(3))
