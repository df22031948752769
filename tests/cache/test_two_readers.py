"""Random sequences of operations: the kernels and float64 attention over dense views read the same blocks alike."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels import Scoring, why_unavailable
from hf_int8_paged.seam.views import PagedView
from tests.kernels.helpers import device_of
from tests.models import tiny_model

from .operation_sequences import OPERATIONS, OperationSequence
from .shadowed_cache import ShadowedCache
from .two_readers import Attention, assert_same_attention, visible_keys

#: Sequences per backend. The variable sets one number for every backend.
SEQUENCES = {"reference": 40, "cpu": 60, "triton": 6}
LENGTH = 6


def run_sequences(number: int, backend: str, record_property: Callable[[str, str], None]) -> None:
    """Batches of 1 to 5, windows, padding, forks, shared pools: after every operation each layer is read by both, and
    every update is compared with the fake-quantized dense cache."""
    counts: Counter[str] = Counter()
    for seed in range(number):
        try:
            counts += OperationSequence(seed, backend).run(LENGTH)
        except Exception as error:
            raise AssertionError(f"sequence of seed {seed} on {backend}: {error}") from error
        counts["sequences"] += 1
    record_property("counted", f"{backend}: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()))
    if counts["sequences"] >= 25:
        assert all(counts[name] for name in OPERATIONS)
    assert counts["readings"] >= 2 * LENGTH * counts["sequences"]


def test_random_sequences_of_operations(backend: str, record_property: Callable[[str, str], None]) -> None:
    run_sequences(int(os.environ.get("HF_INT8_PAGED_SEQUENCES", SEQUENCES[backend])), backend, record_property)


@pytest.mark.slow
@pytest.mark.skipif(why_unavailable("cpu", torch.device("cpu")) is not None, reason="needs a C compiler")
def test_five_hundred_random_sequences_of_operations(record_property: Callable[[str, str], None]) -> None:
    run_sequences(500, "cpu", record_property)


#: What another reader would see who is wrong in one thing: changes to keys, values and visible keys, in place.
FAULTS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "first tokens of other sequences": lambda k, v, visible: k[:, :, 0].copy_(k[[1, 2, 0], :, 0]),
    "one key for another": lambda k, v, visible: k[0, 0, 7].copy_(k[0, 0, 8]),
    "one value for another": lambda k, v, visible: v[2, 1, 20].copy_(v[2, 1, 21]),
    "scales one step off": lambda k, v, visible: v.mul_(1 + 1 / 127),
    "one token less": lambda k, v, visible: visible[..., -1].fill_(False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_small_faults_pass_the_bound(fault: str, backend: str) -> None:
    generator, device = torch.Generator().manual_seed(0), device_of(backend)
    cache = PagedInt8Cache(tiny_model("llama").config, backend=backend)
    for count in (40, 1):
        k, v, q = (torch.randn(3, heads, count, 16, generator=generator).to(device) for heads in (2, 2, 4))
        keys, values = cache.update(k, v, 0)
        for layer in (1, 2):
            cache.update(k, v, layer)
    assert isinstance(keys, PagedView)
    assert isinstance(values, PagedView)
    out = cache.layers[0].attend(q, Scoring(0.25), 41)
    dense = keys.dense().clone(), values.dense().clone(), visible_keys(1, 0, 41, None)
    assert_same_attention(out, keys, values, Attention(q, *dense, 0.25))
    FAULTS[fault](*dense)
    with pytest.raises(AssertionError, match="times the largest error that its arithmetic allows"):
        assert_same_attention(out, keys, values, Attention(q, *dense, 0.25))


def test_equal_prompts_of_which_only_the_first_is_padded(backend: str) -> None:
    """Found by the sequences: the first of equal prompts writes the blocks that they share, and it had given back those
    that to it were padding. What the others read there was stored with another centre, or not at all."""
    config, generator = tiny_model("llama").config, torch.Generator().manual_seed(0)
    cache = ShadowedCache(config, padding=(20, 0, 3), backend=backend)
    mask = torch.arange(40) >= torch.tensor(cache.padding)[:, None]
    cache._sequences.padding.leave(mask)
    for count in (40, 1):
        for layer in cache.layers:
            k, v = (torch.randn(1, 2, count, 16, generator=generator).repeat(3, 1, 1, 1) + 1 for _ in "kv")
            cache.update(k, v, layer.index)
    cache.check()
    assert cache.layers[0].room.group.table.allocator.num_used == 2 + 3
