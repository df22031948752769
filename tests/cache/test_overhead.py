"""What a decode step does beside the kernels, counted: Python from ``update`` to the attention output.

The times behind these counts are budgets of ``make bench``: a test must not fail because a machine is slow or busy.
Bounds on Python are a third more than what Python 3.11 counts, which stands beside each: other versions compile to
other bytecodes (3.10 and 3.13 to 1 % and 9 % fewer), and torch's own functions differ. Bounds on kernels, operators and
tensors have no margin.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from eval._workloads import LAYERS, SHAPES, Step, layer_over_a_past
from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels import load_backend, why_unavailable
from tests.counting import Operators, operators, python_work

#: Of one layer in one step. Without the checks of every address, the guards of threads and the check of keys and values
#: it was 29 calls and 1,084 bytecodes.
MOST_CALLS, MOST_BYTECODES = 63, 2228  # counted: 48.0 and 1,668

needs_native_backend = pytest.mark.skipif(
    why_unavailable("cpu", torch.device("cpu")) is not None, reason="needs the native CPU backend (a C compiler)"
)


@needs_native_backend
@torch.no_grad()
def test_python_work_of_a_step_is_bounded() -> None:
    calls, bytecodes = python_work(Step())
    assert calls <= MOST_CALLS * LAYERS
    assert bytecodes <= MOST_BYTECODES * LAYERS


@needs_native_backend
@torch.no_grad()
def test_a_step_makes_one_tensor_per_layer_its_output() -> None:
    """That, and two for the whole step: the lengths before and after."""
    counted = operators(Step())
    assert counted.tensors_made <= LAYERS + 2
    # The output and its transposition in each layer; the lengths, and the new columns of the block table.
    assert sum(counted.called.values()) <= 2 * LAYERS + 4


@needs_native_backend
@torch.no_grad()
def test_a_step_launches_one_append_and_one_decode_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    step, launched = Step(), Counter[str]()
    backend = load_backend("cpu")

    def counting(name: str) -> Any:
        kernel = getattr(backend, name)

        def launch(*arguments: Any, **options: Any) -> Any:
            launched[name] += 1
            return kernel(*arguments, **options)

        return launch

    for name in ("append", "attend", "gather", "copy"):
        monkeypatch.setattr(backend, name, counting(name))
    step()
    assert launched == {"append": LAYERS, "attend": LAYERS}


@needs_native_backend
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), SHAPES)
def test_rotation_and_centring_add_no_operator_and_no_python(kv_heads: int, group: int, head_dim: int) -> None:
    """An append and a decode of one token over 500, with both and with neither: the kernels do it on the way."""
    plain, conditioned = (layer_over_a_past(kv_heads, group, head_dim, which) for which in (False, True))
    assert operators(conditioned).called == operators(plain).called
    assert python_work(conditioned) == python_work(plain)


@torch.no_grad()
def test_a_preallocated_step_counts_once_per_layer() -> None:
    """On the device: its lengths are one tensor. Nothing else is computed of them."""
    config = LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    cache = PagedInt8Cache(config, max_batch_size=2, max_cache_len=64)
    prompt, row = (torch.zeros(2, 2, tokens, 16) for tokens in (20, 1))

    def step(tokens: torch.Tensor) -> None:
        for layer in range(3):
            cache.update(tokens, tokens, layer)

    step(prompt)
    called = operators(lambda: step(row)).called
    assert called["add_"] == 3
    assert called["add"] == 0


class LaunchesNothing:
    """Stands for a device's kernels."""

    NAME = "nothing"

    def append(self, *arguments: Any) -> None:
        pass


def test_a_block_table_is_copied_to_the_device_when_a_block_was_added_and_nothing_else_ever() -> None:
    """On the meta device, which has no data; 40 steps after 20 tokens need blocks at lengths 33 and 49."""
    config = LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    cache: Any = PagedInt8Cache(config, sink_tokens=0)
    prompt, row = (torch.empty(1, 2, tokens, 16, device="meta") for tokens in (20, 1))
    for layer in cache.layers:
        layer.lazy_initialization(prompt, prompt)
        layer.room.backend = LaunchesNothing()
    copies = []
    for tokens in [prompt, *[row] * 40]:
        with Operators() as counted:
            for layer in range(3):
                cache.update(tokens, tokens, layer)
        if tokens is row:
            copies.append(counted.host_to_device)
    needed = [cache_length in (33, 49) for cache_length in range(21, 61)]
    assert copies == [int(one) for one in needed]
