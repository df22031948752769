"""Lengths of a preallocated cache, whoever counts: the host, a compiled step, a CUDA graph; also layer by layer."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from hf_int8_paged import CacheFullError, PagedInt8Cache, static_layer
from hf_int8_paged.seam.attention import int8_paged_attention
from tests.models import random_ids, tiny_model

LAYERS, BATCH, DIM, LIMIT = 4, 2, 16, 96
_OPTIONS: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 2 * DIM,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "sliding_window": 20,
}
CONFIG = LlamaConfig(**_OPTIONS)
MODULE: Any = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)


def preallocated() -> PagedInt8Cache:
    """On the reference backend, all of whose work is operations on tensors, which `Graph` sees."""
    return PagedInt8Cache(CONFIG, max_batch_size=BATCH, max_cache_len=LIMIT, backend="reference")


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a `Graph` the cache believes that a CUDA graph is being captured."""
    monkeypatch.setattr(static_layer, "_is_captured", lambda x: isinstance(_get_current_dispatch_mode(), Graph))


def states(seed: int, tokens: int, heads: int) -> torch.Tensor:
    return torch.randn(BATCH, heads, tokens, DIM, generator=torch.Generator().manual_seed(seed))


class Inputs:
    """Keys, values and queries of every layer for a step of one token, at fixed addresses, as a graph reads them."""

    def __init__(self) -> None:
        self.of = [[states(0, 1, heads) for heads in (1, 1, 2)] for _ in range(LAYERS)]

    def become(self, position: int) -> None:
        for layer, tensors in enumerate(self.of):
            for kind, x in enumerate(tensors):
                x.copy_(states(1000 * position + 10 * layer + kind, 1, x.shape[1]))


def prompt(cache: PagedInt8Cache, tokens: int) -> None:
    for layer in range(LAYERS):
        keys, values, query = (states(7 + 10 * layer + kind, tokens, heads) for kind, heads in enumerate((1, 1, 2)))
        int8_paged_attention(MODULE, query, *cache.update(keys, values, layer), None)


def forward(cache: PagedInt8Cache, inputs: Inputs, layers: range) -> list[torch.Tensor]:
    """A step of some layers; returns what each attends to."""
    found = []
    for layer in layers:
        keys, values, query = inputs.of[layer]
        found.append(int8_paged_attention(MODULE, query, *cache.update(keys, values, layer), None)[0])
    return found


class Graph(TorchDispatchMode):
    """What was done to tensors, to be done to the same tensors again without Python, as a CUDA graph does it."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a graph cannot hold a number of the host"
        result = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.done:
            again = func(*args, **kwargs)
            for held, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(held, torch.Tensor) and held.data_ptr() != new.data_ptr():
                    held.copy_(new)


@pytest.mark.parametrize(
    ("first", "stop"), [(0, LAYERS), (0, 2), (2, LAYERS), (1, 3)], ids=["all", "first", "last", "middle"]
)
def test_layers_in_a_graph_beside_others(capturing: None, first: int, stop: int) -> None:
    """Some layers are captured by hand, the others run as Python; lengths are right for all, whoever begins a step."""
    cache, plain, inputs = preallocated(), preallocated(), Inputs()
    for each in (cache, plain):
        prompt(each, 21)
    graph, captured = Graph(), []
    for position in range(21, 50):
        inputs.become(position)
        found = forward(cache, inputs, range(first))
        if position == 25:
            with graph:
                captured = forward(cache, inputs, range(first, stop))
        elif position > 25:
            graph.replay()
        found += captured if position >= 25 else forward(cache, inputs, range(first, stop))
        found += forward(cache, inputs, range(stop, LAYERS))
        want = forward(plain, inputs, range(LAYERS))
        assert int(cache.get_seq_length()) == position + 1
        for layer in range(LAYERS):
            torch.testing.assert_close(found[layer], want[layer], rtol=0, atol=0, msg=f"{position} {layer}")
    assert [layer.length for layer in cache.layers] == [50] * LAYERS


def test_steps_in_python_after_captured_ones(capturing: None) -> None:
    """What was captured runs as Python too, and after a reset a prompt does."""
    cache, plain, inputs, graph = preallocated(), preallocated(), Inputs(), Graph()
    for length in (21, 30):
        prompt(cache, length)
        prompt(plain, length)
        for position in range(length, length + 6):
            inputs.become(position)
            want = forward(plain, inputs, range(LAYERS))
            if position == 21:
                with graph:
                    captured = forward(cache, inputs, range(LAYERS))
                found = captured
            elif position % 2:
                graph.replay()
                found = captured
            else:
                found = forward(cache, inputs, range(LAYERS))
            assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
        assert [layer.length for layer in cache.layers] == [length + 6] * LAYERS
        cache.reset()
        plain.reset()


def test_a_graph_that_does_not_fit_leaves_the_length(capturing: None) -> None:
    cache, inputs, graph = preallocated(), Inputs(), Graph()
    prompt(cache, LIMIT - 2)
    with graph:
        found = forward(cache, inputs, range(LAYERS))
    graph.replay()
    assert int(cache.get_seq_length()) == LIMIT
    before = [x.clone() for layer in cache.layers for x in layer.room.memory.tensors[:4]]
    graph.replay()
    assert all(x.isnan().all() for x in found)
    assert int(cache.get_seq_length()) == LIMIT
    after = [x for layer in cache.layers for x in layer.room.memory.tensors[:4]]
    assert all(torch.equal(x, y) for x, y in zip(before, after))
    with pytest.raises(CacheFullError, match=f"max_cache_len is {LIMIT}"):
        forward(cache, inputs, range(LAYERS))
    cache.crop(-3)
    graph.replay()
    assert int(cache.get_seq_length()) == LIMIT - 2
    assert not any(x.isnan().any() for x in found)


@pytest.mark.parametrize("compiled", [(0, 3), (1,)], ids=str)
def test_compiled_layers_beside_eager_ones(compiled: tuple[int, ...]) -> None:
    """As regional compilation leaves it: each of some decoder layers is a graph of its own."""
    model: Any = tiny_model("llama", num_hidden_layers=LAYERS, attn_implementation="int8_paged")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    ids = random_ids(2, 21)
    want = model.generate(ids, past_key_values=PagedInt8Cache(model.config, backend="reference"), **options)
    torch._dynamo.reset()
    for index in compiled:
        layer = model.model.layers[index]
        layer.forward = torch.compile(layer.forward, backend="eager", dynamic=False)
    cache = PagedInt8Cache(model.config, max_batch_size=2, max_cache_len=LIMIT, backend="reference")
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)
    assert [layer.length for layer in cache.layers] == [32] * LAYERS


def test_a_step_is_seen_layer_by_layer() -> None:
    """What a layer says of its length while others have had the step and it has not."""
    cache, inputs = preallocated(), Inputs()
    prompt(cache, 21)
    forward(cache, inputs, range(2))
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [22, 22, 21, 21]
    assert [layer.length for layer in cache.layers] == [22, 22, 21, 21]
    attended = int8_paged_attention(MODULE, inputs.of[3][2], cache.layers[3].keys, cache.layers[3].values, None)[0]
    cache.crop(-1)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [21] * LAYERS
    again = int8_paged_attention(MODULE, inputs.of[3][2], cache.layers[3].keys, cache.layers[3].values, None)[0]
    assert torch.equal(attended, again)


@pytest.mark.parametrize("tokens", [21, 30])
def test_a_step_that_a_compiled_layer_begins_is_no_earlier_one(tokens: int) -> None:
    """What layers in Python know of a step, its length and padding, is not that of a padded prompt before a reset."""
    model: Any = tiny_model("llama", num_hidden_layers=2, attn_implementation="int8_paged")
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    fresh, cache = (
        PagedInt8Cache(model.config, max_batch_size=2, max_cache_len=LIMIT, backend="reference") for _ in range(2)
    )
    padded = torch.ones(2, 21, dtype=torch.long)
    padded[0, :8] = 0
    model.generate(random_ids(2, 21), attention_mask=padded, past_key_values=cache, **options)
    cache.reset()
    scores: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    ids = random_ids(2, tokens, seed=3)
    want = model.generate(ids, past_key_values=fresh, **options, **scores).logits
    torch._dynamo.reset()
    model.model.layers[0].forward = torch.compile(model.model.layers[0].forward, backend="eager", dynamic=False)
    found = model.generate(ids, past_key_values=cache, **options, **scores).logits
    for x, y in zip(found, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * float(y.abs().max()))


@pytest.mark.parametrize("twin", ["fork", "deepcopy"])
def test_a_twin_made_in_inference_mode_is_written_to_outside_it(twin: str) -> None:
    cache, inputs = preallocated(), Inputs()
    with torch.inference_mode():
        prompt(cache, 21)
        other = cache.fork() if twin == "fork" else copy.deepcopy(cache)
    found, want = forward(other, inputs, range(LAYERS)), forward(cache, inputs, range(LAYERS))
    assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
