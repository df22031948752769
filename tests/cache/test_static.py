"""The preallocated cache: the same tokens, eager and compiled; no graph break, no recompilation, no dense copy."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hf_int8_paged import CacheFullError, PagedInt8Cache
from hf_int8_paged.kernels import Scoring, alloc_paged_int8_layer, reference
from hf_int8_paged.seam import masks, operators
from tests.models import random_ids, tiny_model, tipped_roundings

GREEDY = {"do_sample": False, "pad_token_id": 0}


def ready(name: str, **changes):
    model = tiny_model(name, **changes)
    model.set_attn_implementation("int8_paged")
    return model


def static(model, batch: int = 2, length: int = 128, **options) -> PagedInt8Cache:
    return PagedInt8Cache(model.config, max_batch_size=batch, max_cache_len=length, **options)


def compiled_with(backend: str) -> CompileConfig:
    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=backend)  # type: ignore[arg-type]
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


SLOW_PROMPTS = [pytest.param(tokens, marks=pytest.mark.slow) for tokens in (1, 37)]


@pytest.mark.parametrize("implementation", ["int8_paged", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("prompt", [*SLOW_PROMPTS, 16, 70], ids=lambda n: f"prompt_of_{n}")
def test_the_preallocated_cache_generates_the_same_tokens(name, implementation, prompt):
    model, ids = ready(name), random_ids(2, prompt, seed=prompt)
    model.set_attn_implementation(implementation)
    # After a shorter first prompt only the growing cache centres its keys once there are 16 tokens.
    options = {"backend": "reference", "center_keys": prompt >= 16}
    growing, cache = PagedInt8Cache(model.config, **options), static(model, **options)
    expected = model.generate(ids, past_key_values=growing, max_new_tokens=30, **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=30, **GREEDY), expected)
    cache.reset()
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=30, **GREEDY), expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_left_padding_beams_chunks_and_turns(name):
    model = ready(name)
    ids = random_ids(2, 45, seed=3)
    ids[0, :9] = 0
    mask = (ids != 0).long()
    for options in ({"attention_mask": mask}, {"num_beams": 2}, {"prefill_chunk_size": 20}):
        batch = 2 * options.get("num_beams", 1)
        growing, ours = PagedInt8Cache(model.config, backend="reference"), static(model, batch, backend="reference")
        expected = model.generate(ids, past_key_values=growing, max_new_tokens=20, **GREEDY | options)
        ours = model.generate(ids, past_key_values=ours, max_new_tokens=20, **GREEDY | options)
        assert torch.equal(ours, expected), options
    cache, growing = static(model, backend="reference"), PagedInt8Cache(model.config, backend="reference")
    for turn in (random_ids(2, n, seed=n) for n in (20, 7, 30)):
        seen = [torch.empty(2, 0, dtype=torch.long)] * 2
        for i, each in enumerate((cache, growing)):
            past = int(each.get_seq_length())
            with torch.no_grad():
                seen[i] = model(turn, past_key_values=each).logits
            assert int(each.get_seq_length()) == past + turn.shape[1]
        assert (seen[0] - seen[1]).abs().max() < tipped_roundings(model)


def test_crop_takes_tokens_back():
    model, ids = ready("llama"), random_ids(1, 40, seed=2)
    ids = torch.cat([ids[:, :20]] * 3, dim=1)
    expected = model.generate(ids, past_key_values=PagedInt8Cache(model.config), max_new_tokens=20, **GREEDY)
    looked_up = model.generate(
        ids, past_key_values=static(model, 1), max_new_tokens=20, prompt_lookup_num_tokens=4, **GREEDY
    )
    assert torch.equal(looked_up, expected)


@pytest.mark.parametrize("name", ["llama", pytest.param("mistral", marks=pytest.mark.slow)])
def test_decoding_compiles_to_one_graph_and_never_again(name, monkeypatch):
    """200 tokens through ``generate``, fullgraph; the compiler drops the dense keys and values that nobody reads."""
    model, ids = ready(name), random_ids(2, 21, seed=9)
    expected = model.generate(
        ids, past_key_values=PagedInt8Cache(model.config, backend="reference"), max_new_tokens=200, **GREEDY
    )
    gathers: list[int] = []
    monkeypatch.setattr(reference, "gather", lambda *args: gathers.append(1))
    torch._dynamo.reset()
    counters.clear()
    tokens = model.generate(
        ids,
        past_key_values=static(model, length=256, backend="reference"),
        max_new_tokens=200,
        compile_config=compiled_with("aot_eager"),
        **GREEDY,
    )
    assert torch.equal(tokens, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]
    assert not counters["graph_break"]
    assert not gathers


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_forward_pass_compiled_by_hand_computes_the_same(name, monkeypatch):
    """Masks are made inside the graph then, while ``generate`` makes them before it."""
    monkeypatch.setattr(masks, "_needs_additive", {})
    model, prompt = ready(name), random_ids(2, 21, seed=9)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    steps: list[list[torch.Tensor]] = []
    for forward in (model.forward, compiled):
        cache = static(model, length=64, backend="reference")
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            steps.append(
                [
                    forward(ids, past_key_values=cache, position_ids=torch.full((2, 1), 21 + i), use_cache=True).logits
                    for i, ids in enumerate(random_ids(2, 4, seed=1).split(1, dim=1))
                ]
            )
    for want, got in zip(*steps):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.slow
def test_decoding_compiles_with_inductor(monkeypatch):
    """To one graph, whose operators work on the storages that the layers own: what backends know of them stays."""
    used, find = [], operators._storage
    monkeypatch.setattr(operators, "_storage", lambda *given: used.append(find(*given)) or used[-1])
    model, ids = ready("llama", num_hidden_layers=2), random_ids(2, 21, seed=9)
    expected = model.generate(ids, past_key_values=PagedInt8Cache(model.config), max_new_tokens=40, **GREEDY)
    torch._dynamo.reset()
    counters.clear()
    cache = static(model)
    tokens = model.generate(
        ids, past_key_values=cache, max_new_tokens=40, compile_config=compiled_with("inductor"), **GREEDY
    )
    assert torch.equal(tokens, expected)
    assert counters["stats"]["unique_graphs"] == 1
    owned = [layer.storage for layer in cache.layers]
    assert len(used) >= 2 * 2 * 39  # an append and an attention in both layers of every step
    assert all(any(storage is own for own in owned) for storage in used)


def flat_storage() -> tuple[list[torch.Tensor], str]:
    storage = alloc_paged_int8_layer(4, 16, 2, 32, backend="reference")
    for tensor in (storage.k, storage.v, storage.k_scales, storage.v_scales):
        tensor.fill_(1)
    return operators.flat_storage(storage)


def test_operators_declare_what_they_do():
    """Schema, fakes and mutations, by torch's own check."""
    storage, names = flat_storage()
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    lens = torch.tensor([5, 20], dtype=torch.int32)
    new = torch.randn(2, 2, 3, 32)
    where = [table, lens]
    torch.library.opcheck(operators.append, (*storage, [], names, [new, new], where))
    mask = torch.rand(2, 32) > 0.3
    query = torch.randn(2, 4, 1, 32)
    rows = torch.randn(2, 2, 3, 32)
    places = torch.tensor([[1, 0], [0, 2], [3, 4]], dtype=torch.int32)
    scoring = operators.flat_scoring(Scoring(0.2, 30.0, torch.randn(4), mask))
    for first_tokens in ([], [rows, rows.neg(), places]):
        torch.library.opcheck(operators.attend, (query, storage, names, where, 9, first_tokens, *scoring))
        torch.library.opcheck(operators.gather_dense, (storage, names, where, first_tokens, 32, torch.float32))


def test_scoring_comes_out_of_an_operator_as_it_went_in():
    """Whatever fields it has: a new option is one more field."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    for scoring in (Scoring(0.2), Scoring(0.5, 30.0, torch.randn(4), mask, 7), Scoring(0.1, None, None, mask)):
        tensors, numbers = operators.flat_scoring(scoring)
        assert all(x is None or isinstance(x, torch.Tensor) for x in tensors)
        again = operators._scoring(tensors, numbers)
        assert all(a is b or (a == b and type(a) is type(b)) for a, b in zip(again, scoring, strict=True))


def test_operators_find_the_storage_of_the_layer_that_owns_it():
    """What a backend knows of a storage is kept with the object: another one of the same tensors would begin anew."""
    owned = alloc_paged_int8_layer(4, 16, 2, 32, backend="reference", center_keys=True)
    operators.remember(owned)
    tensors, names = operators.flat_storage(owned)
    aliases = [x.detach() for x in tensors]
    assert operators._storage(aliases, names) is owned
    others = [*aliases[:2], aliases[2].clone(), *aliases[3:]]
    assert operators._storage(others, names).k_scales is others[2]
    assert operators._storage(aliases[:4], names).key_center is None
    assert names == "reference row_major None int8"
    assert operators._storage(aliases, "reference row_major hadamard int8").rotation == "hadamard"
    gone, address = weakref.ref(owned), owned.k.data_ptr()
    del owned
    gc.collect()
    assert gone() is None
    assert address not in operators._owned


def test_limits():
    model = ready("llama")
    with pytest.raises(ValueError, match="needs max_cache_len too"):
        PagedInt8Cache(model.config, max_batch_size=2)
    cache = static(model, batch=1, length=20)
    with torch.no_grad(), pytest.raises(ValueError, match="keys of 2 sequences came, but max_batch_size is 1"):
        model(random_ids(2, 5), past_key_values=cache)
    with torch.no_grad():
        model(random_ids(1, 18), past_key_values=cache)
        with pytest.raises(CacheFullError, match="21 tokens per sequence asked for, but max_cache_len is 20"):
            model(random_ids(1, 3), past_key_values=cache)
    assert cache.get_seq_length() == 18
    assert cache.nbytes_used == cache.nbytes_allocated


def test_a_preallocated_window_holds_its_window_only():
    model = ready("mistral", sliding_window=64)
    cache = static(model, length=2000)
    with torch.no_grad():
        model(random_ids(2, 500), past_key_values=cache)
    first_tokens = 3 * 2 * 2 * 2 * 16 * 4  # as they are, in float32
    assert cache.nbytes_allocated == 3 * 2 * (64 + 32) * 2 * (2 * 16 + 4) + first_tokens
