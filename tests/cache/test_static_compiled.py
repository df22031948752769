"""Compiled steps of a preallocated cache: of several tokens, by hand, and with nothing left behind between steps."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hf_int8_paged import PagedInt8Cache
from tests.models import LOGIT_ROUNDING, random_ids, tiny_model

GREEDY = {"do_sample": False, "pad_token_id": 0}


def ready(name: str = "llama", implementation: str = "int8_paged"):
    model = tiny_model(name, num_hidden_layers=2)
    model.set_attn_implementation(implementation)
    return model


def static(model, **options) -> PagedInt8Cache:
    return PagedInt8Cache(model.config, max_batch_size=2, max_cache_len=64, backend="reference", **options)


def growing(model, **options) -> PagedInt8Cache:
    return PagedInt8Cache(model.config, backend="reference", **options)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["int8_paged", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("chunk", [8, 20])
def test_a_prompt_compiled_in_chunks_gives_the_same_tokens(chunk, name, implementation):
    model, ids = ready(name, implementation), random_ids(2, 45, seed=9)
    options = {"center_keys": chunk >= 16}
    expected = model.generate(
        ids, past_key_values=growing(model, **options), max_new_tokens=8, prefill_chunk_size=chunk, **GREEDY
    )
    config = CompileConfig(dynamic=None, mode=None, backend="eager")
    config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    cache = static(model, **options)
    tokens = model.generate(
        ids, past_key_values=cache, max_new_tokens=8, prefill_chunk_size=chunk, compile_config=config, **GREEDY
    )
    assert torch.equal(tokens, expected)
    # Nothing else than the first layer's allocation, which serves all layers; it is counted once per frame around it.
    assert len(counters["graph_break"]) == 1
    assert all("_allocate_all" in reason for reason in counters["graph_break"])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["int8_paged", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["growing", "preallocated"])
def test_generate_with_a_forward_compiled_by_hand(kind, name, implementation):
    model, ids = ready(name, implementation), random_ids(2, 21, seed=9)
    expected = model.generate(ids, past_key_values=growing(model), max_new_tokens=6, **GREEDY)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    cache = (growing if kind == "growing" else static)(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=6, **GREEDY), expected)


@pytest.mark.slow
def test_a_growing_cache_within_a_forward_compiled_by_inductor():
    """The graph breaks in each layer twice, at `update` and at the attention function, and nowhere else."""
    model, ids = ready("llama"), random_ids(2, 21, seed=9)
    expected = model.generate(ids, past_key_values=growing(model), max_new_tokens=6, **GREEDY)
    torch._dynamo.reset()
    counters.clear()
    model.forward = torch.compile(model.forward)
    assert torch.equal(model.generate(ids, past_key_values=growing(model), max_new_tokens=6, **GREEDY), expected)
    places = ("_update_outside_graphs", "int8_paged_attention")
    assert len(counters["graph_break"]) == len(places)
    assert all(any(f"<function {place} " in reason for reason in counters["graph_break"]) for place in places)


def test_early_initialization_needs_no_graph_break():
    model, ids = ready(), random_ids(2, 7, seed=9)
    cache, eager = static(model), static(model)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        got, expected = (f(ids, past_key_values=c, use_cache=True).logits for f, c in ((step, cache), (model, eager)))
    # The same dense attention in another shape: float32 sums in another order, and of a first prompt no row is read as
    # it is stored, so that nothing tips.
    torch.testing.assert_close(got, expected, rtol=0, atol=LOGIT_ROUNDING)
    assert int(cache.get_seq_length()) == 7


def test_a_compiled_step_under_another_attention_leaves_nothing_behind():
    """The memory of a cache goes with the cache."""
    model = ready(implementation="sdpa")
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
    cache = static(model)
    with torch.no_grad():
        model(random_ids(2, 20), past_key_values=cache)
        step(random_ids(2, 1), past_key_values=cache, position_ids=torch.full((2, 1), 20), use_cache=True)
    memory = weakref.ref(cache.layers[-1].room.memory)
    del cache, step
    torch._dynamo.reset()
    gc.collect()
    assert memory() is None


def test_a_step_takes_only_what_its_own_update_returned():
    """Another thread traces a step between an update and its attention."""
    from hf_int8_paged.seam.views import layer_of, stands_for

    mine, other = (torch.zeros(2), torch.zeros(2)), (torch.zeros(2), torch.zeros(2))
    stands_for("mine", *mine)
    thread = threading.Thread(target=stands_for, args=("other", *other))
    thread.start()
    thread.join()
    assert layer_of(*mine) == "mine"
    assert layer_of(*other) == "other"
    assert layer_of(mine[0], other[1]) is None
