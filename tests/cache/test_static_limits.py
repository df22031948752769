"""A preallocated cache at its limits: the last token that fits, the first that does not, and what it cannot hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_int8_paged import CacheFullError, PagedInt8Cache
from tests.models import random_ids, tiny_model

from .conftest import BACKENDS

GREEDY = {"do_sample": False, "pad_token_id": 0}


def ready(name: str = "llama", **changes):
    model = tiny_model(name, **changes)
    model.set_attn_implementation("int8_paged")
    return model


def static(model, batch: int = 2, length: int = 50, **options) -> PagedInt8Cache:
    return PagedInt8Cache(model.config, max_batch_size=batch, max_cache_len=length, **options)


def contents(cache: PagedInt8Cache) -> list[torch.Tensor]:
    """Copies of every tensor that a step writes to."""
    tensors = []
    for layer in cache.layers:
        memory = layer.room.memory
        tensors += [*memory.tensors[:4], memory.lens, memory.length, *memory.first_tokens.tensors]
    return [tensor.clone() for tensor in tensors]


def assert_unchanged(cache: PagedInt8Cache, before: list[torch.Tensor]) -> None:
    assert all(torch.equal(old, new) for old, new in zip(before, contents(cache), strict=True))


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def fill(cache: PagedInt8Cache, tokens: int = 20, batch: int = 2, heads: int = 2, dim: int = 16) -> None:
    for layer in range(len(cache.layers)):
        cache.update(rows(batch, heads, tokens, dim), rows(batch, heads, tokens, dim), layer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["growing", "preallocated"])
def test_generate_refuses_before_it_starts_what_cannot_fit(kind: str, name: str, backend: str):
    model = ready(name)
    options: dict[str, Any] = {"max_cache_len": 50, "backend": backend}
    options |= {"max_batch_size": 2} if kind == "preallocated" else {}
    cache = PagedInt8Cache(model.config, **options)
    with pytest.raises(
        CacheFullError, match=r"need 51 tokens per sequence, but max_cache_len is 50.*max_new_tokens by 1"
    ):
        model.generate(random_ids(2, 40), past_key_values=cache, max_new_tokens=12, **GREEDY)
    assert int(cache.get_seq_length()) == 0
    expected = model.generate(
        random_ids(2, 40), past_key_values=PagedInt8Cache(model.config, backend=backend), max_new_tokens=11, **GREEDY
    )
    # The last token is never stored.
    tokens = model.generate(random_ids(2, 40), past_key_values=cache, max_new_tokens=11, **GREEDY)
    assert torch.equal(tokens, expected)
    assert int(cache.get_seq_length()) == 50


@pytest.mark.parametrize("kind", ["growing", "preallocated"])
def test_prompt_lookup_drafts_beyond_the_end(kind: str):
    """Whether it does depends on the text; where it might not fit, it is refused before it starts."""
    model, prompt = ready("llama"), random_ids(1, 9).repeat(1, 4)
    for length in range(44, 57):
        options: dict[str, Any] = {"max_batch_size": 1} if kind == "preallocated" else {}
        cache = PagedInt8Cache(model.config, max_cache_len=length, **options)
        lookup: dict[str, Any] = {"max_new_tokens": 11, "prompt_lookup_num_tokens": 8, **GREEDY}
        if length < 36 + 10 + 7:
            with pytest.raises(CacheFullError, match=rf"drafts beyond the end need 53 .* lower .* by {53 - length} or"):
                model.generate(prompt, past_key_values=cache, **lookup)
            assert int(cache.get_seq_length()) == 0
        else:
            model.generate(prompt, past_key_values=cache, **lookup)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_an_eager_step_that_does_not_fit_raises_and_writes_nothing(name: str, tokens: int, backend: str):
    model = ready(name)
    cache = static(model, length=45, backend=backend)
    with torch.no_grad():
        model(random_ids(2, 45 - tokens + 1), past_key_values=cache)
        before = contents(cache)
        with pytest.raises(CacheFullError, match="46 tokens per sequence asked for, but max_cache_len is 45"):
            model(random_ids(2, tokens), past_key_values=cache)
    assert_unchanged(cache, before)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("tokens", [1, 3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "cpu"])
def test_a_compiled_step_that_does_not_fit_is_nan_and_writes_nothing(name: str, tokens: int, backend: str):
    """For every attention implementation, as all values are NaN. A step that fits afterwards is right."""
    model = ready(name, num_hidden_layers=1)
    for implementation in ("int8_paged", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = static(model, length=45, backend=backend)
        torch._dynamo.reset()
        # transformers' own masks of several rows break the graph in 5.18, those of `StaticCache` too.
        whole = implementation == "int8_paged" or tokens == 1
        step = torch.compile(model.forward, fullgraph=whole, dynamic=False, backend="eager")
        with torch.no_grad():
            model(random_ids(2, 45 - tokens + 1), past_key_values=cache)
            before = contents(cache)
            positions = torch.arange(46 - tokens, 46).expand(2, -1)
            logits = step(random_ids(2, tokens), past_key_values=cache, position_ids=positions, use_cache=True).logits
            assert logits.isnan().all()
            assert_unchanged(cache, before)
            assert int(cache.get_seq_length()) == 46 - tokens
            cache.crop(-1)
            ids, positions = random_ids(2, tokens, seed=5), positions - 1
            logits = step(ids, past_key_values=cache, position_ids=positions, use_cache=True).logits
            assert int(cache.get_seq_length()) == 45
            cache.crop(-tokens)
            # Of several rows the compiled step reads dense keys, the eager one the blocks. The C kernels' arithmetic is
            # up to 6.7e-5 of the logits' spread off per layer (against float64); the model has one.
            eager = model(ids, past_key_values=cache).logits
            torch.testing.assert_close(logits, eager, rtol=0, atol=6.7e-5 * float(eager.max() - eager.min()))


def test_the_host_counts_again_after_compiled_steps():
    model = ready(num_hidden_layers=1)
    cache = static(model, length=24, backend="reference")
    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        model(random_ids(2, 20), past_key_values=cache)
        for position in (20, 21):
            step(random_ids(2, 1), past_key_values=cache, position_ids=torch.full((2, 1), position), use_cache=True)
        model(random_ids(2, 2), past_key_values=cache)
        with pytest.raises(CacheFullError, match="25 tokens"):
            model(random_ids(2, 1), past_key_values=cache)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((2, 1, 1, 16), (2, 1, 1, 16), "holds 2 KV heads of width 16"),
        ((2, 4, 1, 16), (2, 4, 1, 16), "holds 2 KV heads of width 16"),
        ((2, 2, 1, 32), (2, 2, 1, 32), "holds 2 KV heads of width 16"),
        ((2, 2, 1, 16), (2, 2, 1, 8), "holds 2 KV heads of width 16"),
        ((2, 2, 2, 16), (2, 2, 1, 16), "must have the same sequences, heads and tokens"),
        ((2, 2, 1, 16), (2, 1, 1, 16), "must have the same sequences, heads and tokens"),
        ((1, 2, 1, 16), (1, 2, 1, 16), r"holds 2 sequences, but keys of 1 came.*reset\(\)"),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_states_of_another_model_are_refused_and_the_step_taken_back(keys, values, message, layer, backend):
    cache = static(ready(), backend=backend)
    fill(cache)
    before = contents(cache)
    if layer == 1:
        if "sequences, but" in message:
            message = r"interrupted, crop\(-1\) goes back to the 20 tokens"
        cache.update(rows(2, 2, 1, 16), rows(2, 2, 1, 16), 0)
    with pytest.raises(ValueError, match=message):
        cache.update(rows(*keys), rows(*values), layer)
    length = [int(x) for x in (cache.layers[0].get_seq_length(), cache.layers[1].get_seq_length())]
    assert length == [20, 20]
    if layer == 0:
        assert_unchanged(cache, before)


@pytest.mark.parametrize(
    ("keys", "values"),
    [((2, 2, 5, 16), (2, 2, 4, 16)), ((2, 2, 5, 16), (2, 1, 5, 16)), ((2, 2, 5, 16), (1, 2, 5, 16))],
)
def test_first_values_that_do_not_fit_the_keys_are_refused(keys, values):
    cache = static(ready())
    with pytest.raises(ValueError, match="must have the same sequences, heads and tokens"):
        cache.update(rows(*keys), rows(*values), 0)
    assert cache.get_seq_length() == 0


def test_more_layers_than_the_cache():
    cache = static(ready(num_hidden_layers=2))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="layer 2 was updated, but the cache was made for a model with 2"),
    ):
        ready()(random_ids(1, 5), past_key_values=cache)
    assert int(cache.get_seq_length()) == 0


def test_a_forward_pass_that_leaves_layers_out():
    cache, model = static(ready()), ready(num_hidden_layers=2)
    with torch.no_grad():
        model(random_ids(1, 5), past_key_values=cache)
        with pytest.raises(ValueError, match="updated only 2 of the cache's 3 attention layers"):
            model(random_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_an_interrupted_step_is_refused_until_it_is_taken_back(name: str, tokens: int, backend: str):
    model, ids = ready(name), random_ids(2, tokens, seed=4)
    logits = []
    for interrupted in (False, True):
        cache = static(model, length=80, backend=backend)
        with torch.no_grad():
            model(random_ids(2, 46), past_key_values=cache)
            if interrupted:
                hook = model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model(ids, past_key_values=cache)
                hook.remove()
                with pytest.raises(ValueError, match=rf"updated only 1 of .*crop\(-{tokens}\) .* 46 tokens.*reset\(\)"):
                    model(ids, past_key_values=cache)
                cache.crop(-tokens)
                assert [int(layer.get_seq_length()) for layer in cache.layers] == [46] * 3
            logits.append(model(ids, past_key_values=cache).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_any_pair_of_float_dtypes_is_stored_and_may_change(first, backend):
    cache, grown = (
        static(ready(), backend=backend, center_keys=False),
        static(ready(), backend=backend, center_keys=False),
    )
    parts = [(20, first), (1, first[::-1]), (18, (torch.float16, torch.float32))]
    for tokens, (k_dtype, v_dtype) in parts:
        for layer in range(3):
            k, v = rows(2, 2, tokens, 16, dtype=k_dtype), rows(2, 2, tokens, 16, dtype=v_dtype)
            keys, values = cache.update(k, v, layer)
            assert (keys.dtype, values.dtype) == (k_dtype, v_dtype)
            grown.update(k.float(), v.float(), layer)
    for got, expected in zip(cache.layers, grown.layers, strict=True):
        assert torch.equal(got.keys.float(), expected.keys.to(got.keys.dtype).float())
        assert torch.equal(got.values.float(), expected.values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_reset_any_batch_up_to_the_largest_and_other_shapes(backend):
    model = ready()
    cache = static(model, batch=4, length=60, backend=backend)
    for batch in (2, 1, 3, 4):
        ids = random_ids(batch, 20, seed=batch)
        fresh = static(model, batch=4, length=60, backend=backend)
        expected = model.generate(ids, past_key_values=fresh, max_new_tokens=8, **GREEDY)
        assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=8, **GREEDY), expected)
        with torch.no_grad(), pytest.raises(ValueError, match=r"max_batch_size is 4|use one cache per batch"):
            model(random_ids(5, 1), past_key_values=cache)
        cache.reset()
    fill(cache, heads=4, dim=32)
    assert cache.layers[2].keys.shape == (2, 4, 60, 32)
    cache.reset()
    for layer in range(3):
        cache.update(rows(3, 2, 4, 16, dtype=torch.bfloat16), rows(3, 2, 4, 16, dtype=torch.bfloat16), layer)
    assert cache.layers[2].values.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["growing", "preallocated"])
def test_inference_mode_first_and_outside_it_later(kind):
    model, ids = ready(), random_ids(2, 20)
    logits = []
    for first in (torch.no_grad, torch.inference_mode):
        cache = static(model) if kind == "preallocated" else PagedInt8Cache(model.config)
        with first():
            model(ids, past_key_values=cache)
        with torch.no_grad():
            logits.append(model(ids[:, :1], past_key_values=cache).logits)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
        with torch.inference_mode():
            model(ids[:, :1], past_key_values=cache)
    assert torch.equal(*logits)
