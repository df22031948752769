"""Keys and values that the cache hands out: anyone may read them, and a write raises instead of being lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from hf_int8_paged import CacheFullError, PagedInt8Cache
from tests.models import fake_quantize

CONFIG = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
#: Rows stored as they come, so that a stored row is its fake-quantized image.
PLAIN: dict[str, Any] = {"rotation": None, "center_keys": False, "sink_tokens": 0}


def filled(tokens: int = 20, config: LlamaConfig = CONFIG, **options) -> tuple[PagedInt8Cache, torch.Tensor]:
    cache = PagedInt8Cache(config, **options)
    rows = torch.randn(2, 2, tokens, 16, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        cache.update(rows, -rows, layer)
    return cache, rows


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "zero_": lambda x: x.zero_(),
    "copy_": lambda x: x.copy_(torch.ones_like(x)),
    "item": lambda x: x.__setitem__((0, 0), 1.0),
    "slice of item": lambda x: x[0].__setitem__(0, 1.0),
    "part": lambda x: x[0].zero_(),
    "transposed": lambda x: x.transpose(1, 2).mul_(2),
    "unbind": lambda x: x.unbind(0)[1].add_(1),
    "detach": lambda x: x.detach().fill_(1),
    "data": lambda x: x.data.zero_(),
    "index_fill_": lambda x: x.index_fill_(0, torch.tensor([0]), 0.0),
    "out": lambda x: torch.add(torch.ones(2, 2, 20, 16), 1, out=x),
    "foreach": lambda x: torch._foreach_add_([x[0], x[1]], 1),
    "view of view": lambda x: x[:, :, None].expand(2, 2, 3, 20, 16)[0].zero_(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("values", [False, True], ids=["keys", "values"])
def test_a_write_to_keys_or_values_raises_and_names_what_to_use(write: str, values: bool) -> None:
    cache, _ = filled()
    layer = cache.layers[0]
    before = (layer.values if values else layer.keys).clone()
    with pytest.raises(RuntimeError, match=r"clone.*layer\.keys = tensor"):
        WRITES[write](layer.values if values else layer.keys)
    assert torch.equal(layer.values if values else layer.keys, before)


def test_what_is_read_is_an_ordinary_tensor() -> None:
    cache, rows = filled(**PLAIN)
    keys, stored = cache.layers[0].keys, fake_quantize(rows)
    assert type(keys + 0) is type(keys.clone()) is type(torch.cat([keys, keys])) is torch.Tensor
    assert torch.equal(keys[1, 0, 3:5], stored[1, 0, 3:5])
    assert torch.equal(torch.from_numpy(keys[0].numpy()), stored[0])
    assert keys[0, 0, 0].tolist() == stored[0, 0, 0].tolist()
    changed = keys.clone()
    changed[0] = 0
    changed.copy_(keys)
    assert torch.equal(changed, stored)


@pytest.mark.parametrize("values", [False, True], ids=["keys", "values"])
@pytest.mark.parametrize("sink_tokens", [0, 1, 3])
@pytest.mark.parametrize("sharing", ["alone", "fork", "beams"])
def test_an_assigned_tensor_is_stored_and_disturbs_nobody(values: bool, sink_tokens: int, sharing: str) -> None:
    cache, _ = filled(**PLAIN | {"sink_tokens": sink_tokens})
    if sharing == "beams":
        cache.reorder_cache(torch.tensor([1, 1]))
    fork = cache.fork()
    if sharing != "fork":
        del fork
    layer, other = cache.layers[0], cache.layers[1]
    kept = [x.clone() for x in (layer.keys if values else layer.values, other.keys, other.values)]
    new = torch.randn(2, 2, 20, 16, generator=torch.Generator().manual_seed(1))
    if values:
        layer.values = new
    else:
        layer.keys = new
    assert torch.equal(layer.values if values else layer.keys, fake_quantize(new))
    # Of the other half only first tokens change: they are read from the blocks now.
    assert torch.equal((layer.keys if values else layer.values)[:, :, sink_tokens:], kept[0][:, :, sink_tokens:])
    assert torch.equal(other.keys, kept[1])
    assert torch.equal(other.values, kept[2])
    if sharing == "fork":
        assert torch.equal(fork.layers[0].keys if values else fork.layers[0].values, kept[0])
    more = torch.randn(2, 2, 1, 16)
    for index in range(2):
        cache.update(more, more, index)
    assert torch.equal((layer.values if values else layer.keys)[:, :, :20], fake_quantize(new))


def test_a_tensor_that_does_not_fit_is_refused_before_anything_changes() -> None:
    cache, rows = filled(**PLAIN)
    layer = cache.layers[0]
    for wrong, message in (
        (rows[:, :, 1:], r"\[2, 2, 19, 16\].*crop"),
        (rows[:1], "batch_select_indices"),
        (rows.double(), "float64"),
        (rows.to("meta"), "on meta"),
        ([1.0], "list"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            layer.keys = wrong
    assert torch.equal(layer.keys, fake_quantize(rows))
    with pytest.raises(ValueError, match="holds no keys yet"):
        PagedInt8Cache(CONFIG).layers[0].keys = rows


def test_an_assignment_that_the_budget_forbids_changes_nothing() -> None:
    cache, rows = filled(**PLAIN, max_tokens=64)  # 2 sequences of 2 blocks: none is left for a fork of its own
    fork = cache.fork()
    with pytest.raises(CacheFullError):
        fork.layers[0].keys = rows.flip(0)
    for layer in (*fork.layers, *cache.layers):
        assert torch.equal(layer.keys, fake_quantize(rows))
