"""What `update` takes of keys and values: any pair of float dtypes, nothing that does not fit. Nothing changes before
it has been checked. The same for growing and preallocated caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig

from hf_int8_paged import PagedInt8Cache
from tests.models import fake_quantize

LAYERS = 2
CONFIG = LlamaConfig(num_hidden_layers=LAYERS, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
KINDS: dict[str, Any] = {"growing": {}, "preallocated": {"max_batch_size": 2, "max_cache_len": 64}}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN: dict[str, Any] = {"rotation": None, "center_keys": False}

#: (keys, values) made of well-formed ones, ``[2, 2, 20, 16]``, and what the message says.
MISFITS: dict[str, tuple[Callable, str]] = {
    "values with fewer tokens": (lambda k, v: (k, v[:, :, 1:]), "same sequences, heads and tokens"),
    "values with fewer heads": (lambda k, v: (k, v[:, :1]), "same sequences, heads and tokens"),
    "values of fewer sequences": (lambda k, v: (k, v[:1]), "same sequences, heads and tokens"),
    "values on another device": (lambda k, v: (k, v.to("meta")), "on meta"),
    "float64": (lambda k, v: (k.double(), v), "float64"),
    "integers": (lambda k, v: (k, v.int()), "int32"),
    "three axes": (lambda k, v: (k[0], v[0]), r"\[2, \d+, 16\]"),
    "no heads": (lambda k, v: (k[:, :0], v[:, :0]), "at least one head"),
    "a list": (lambda k, v: (k.tolist(), v), "list"),
}
#: Of keys and values that are well formed, but not those of a layer that holds tokens.
STRANGERS: dict[str, tuple[Callable, str]] = {
    "more heads": (lambda k, v: (k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), "holds 2 KV heads"),
    "fewer heads": (lambda k, v: (k[:, :1], v[:, :1]), "holds 2 KV heads"),
    "narrower keys": (lambda k, v: (k[..., :8], v), "of width 16"),
    "wider values": (lambda k, v: (k, v.repeat(1, 1, 1, 2)), r"values 16"),
    "another device": (lambda k, v: (k.to("meta"), v.to("meta")), "came on meta"),
    "fewer sequences": (lambda k, v: (k[:1], v[:1]), "holds 2 sequences"),
}


def rows(tokens: int, seed: int = 0, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def filled(kind: str, tokens: int = 20) -> PagedInt8Cache:
    cache = PagedInt8Cache(CONFIG, sink_tokens=0, **PLAIN, **KINDS[kind])
    for layer in range(LAYERS):
        cache.update(rows(tokens), -rows(tokens), layer)
    return cache


def held(cache: PagedInt8Cache, layer: int, tokens: int) -> torch.Tensor:
    return cache.layers[layer].keys.clone()[:, :, :tokens]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_first_update_that_does_not_fit_changes_nothing(kind: str, misfit: str, layer: int) -> None:
    spoil, message = MISFITS[misfit]
    cache = PagedInt8Cache(CONFIG, sink_tokens=0, **PLAIN, **KINDS[kind])
    for index in range(layer):
        cache.update(rows(20), -rows(20), index)
    with pytest.raises((ValueError, TypeError), match=message):
        cache.update(*spoil(rows(20), -rows(20)), layer)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    for index in range(LAYERS):
        cache.update(rows(18, seed=1), -rows(18, seed=1), index)
    for index in range(LAYERS):
        assert torch.equal(held(cache, index, 18), fake_quantize(rows(18, seed=1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("misfit", [*MISFITS, *STRANGERS])
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_a_later_update_that_does_not_fit_changes_nothing(kind: str, misfit: str, tokens: int) -> None:
    spoil, message = (MISFITS | STRANGERS)[misfit]
    if misfit == "values with fewer tokens" and tokens == 1:
        message = "same sequences|0 tokens"
    cache = filled(kind)
    with pytest.raises((ValueError, TypeError), match=message):
        cache.update(*spoil(rows(tokens), -rows(tokens)), 0)
    assert int(cache.get_seq_length()) == 20
    for index in range(LAYERS):
        cache.update(rows(1, seed=1), -rows(1, seed=1), index)
    for index in range(LAYERS):
        expected = fake_quantize(torch.cat([rows(20), rows(1, seed=1)], dim=2))
        assert torch.equal(held(cache, index, 21), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_the_cache_lacks_is_refused(kind: str) -> None:
    cache = filled(kind)
    with pytest.raises(ValueError, match=r"layer 2 .* 2 layers"):
        cache.update(rows(1), rows(1), 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_an_interrupted_step_is_not_repeated_silently(kind: str, tokens: int) -> None:
    cache = filled(kind)
    cache.update(rows(tokens), rows(tokens), 0)  # and no layer 1
    with pytest.raises(ValueError, match=rf"crop\(-{tokens}\).* 20 tokens.*reset\(\)"):
        cache.update(rows(tokens), rows(tokens), 0)
    cache.crop(-tokens)
    for index in range(LAYERS):
        cache.update(rows(tokens, seed=1), -rows(tokens, seed=1), index)
    for index in range(LAYERS):
        expected = fake_quantize(torch.cat([rows(20), rows(tokens, seed=1)], dim=2))
        assert torch.equal(held(cache, index, 20 + tokens), expected)


def test_an_interrupted_first_prompt_is_not_repeated_silently() -> None:
    cache = PagedInt8Cache(CONFIG)
    cache.update(rows(20), rows(20), 0)
    with pytest.raises(ValueError, match=r"reset\(\) forgets its tokens"):
        cache.update(rows(20), rows(20), 0)
    cache.reset()
    assert cache.nbytes_used == 0


@pytest.mark.parametrize("chunk", [20, 70])
def test_a_long_chunk_that_fails_halfway_is_taken_back_in_a_model_with_windows(chunk: int) -> None:
    """The part of the chunk that the window passes is never stored; going back to before the chunk needs none of it."""
    config = MistralConfig(
        num_hidden_layers=LAYERS, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=12
    )
    cache = PagedInt8Cache(config, sink_tokens=0, **PLAIN)
    for layer in range(LAYERS):
        cache.update(rows(40), rows(40), layer)
    cache.update(rows(chunk, 1), rows(chunk, 1), 0)
    with pytest.raises(ValueError, match="same sequences"):
        cache.update(rows(chunk, 1), rows(1), 1)
    assert cache.get_seq_length() == 40
    for layer in range(LAYERS):
        assert torch.equal(cache.layers[layer].keys.clone(), fake_quantize(rows(40))[:, :, -11:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", DTYPES, ids=str)
@pytest.mark.parametrize("keys", DTYPES, ids=str)
def test_any_pair_of_float_dtypes_is_stored_exactly_as_its_own_rows(kind: str, keys: torch.dtype, values) -> None:
    """Under autocast, or with norms of another dtype, keys and values differ, and may change from step to step."""
    cache = PagedInt8Cache(CONFIG, sink_tokens=0, **PLAIN, **KINDS[kind])
    dense = DynamicCache(config=CONFIG)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step, tokens in enumerate((20, 1, 5, 18, 1)):
        of_step = (keys, values) if step % 2 == 0 else (values, keys)
        new = rows(tokens, seed=step).to(of_step[0]), -rows(tokens, seed=step).to(of_step[1])
        for layer in range(LAYERS):
            got = cache.update(*new, layer)
            expected = dense.update(*new, layer)
            if kind == "growing":  # a preallocated one answers in the dtype of the newest, as StaticCache's tensors do
                assert [x.dtype for x in got] == [x.dtype for x in expected]
                assert all(x.clone().dtype == x.dtype for x in got)
        parts.append(new)
    for layer in cache.layers:
        for index, stored in enumerate((layer.keys, layer.values)):
            images = torch.cat([fake_quantize(pair[index].float()) for pair in parts], dim=2)
            assert torch.equal(stored.clone().float()[:, :, :45], images.to(stored.dtype).float())


@pytest.mark.parametrize("keys", DTYPES, ids=str)
@pytest.mark.parametrize("values", DTYPES, ids=str)
def test_first_tokens_of_any_pair_of_dtypes_stay_exact(keys: torch.dtype, values: torch.dtype) -> None:
    cache = PagedInt8Cache(CONFIG, sink_tokens=2)
    new = rows(20).to(keys), -rows(20).to(values)
    for layer in range(LAYERS):
        cache.update(*new, layer)
    for layer in cache.layers:
        assert torch.equal(layer.keys[:, :, :2].clone(), new[0][:, :, :2].to(layer.keys.dtype))
        assert torch.equal(layer.values[:, :, :2].clone(), new[1][:, :, :2].to(layer.values.dtype))


def test_after_reset_another_model_s_keys_are_welcome() -> None:
    cache = filled("growing")
    cache.reset()
    wide = torch.randn(1, 4, 20, 32).to(torch.bfloat16)
    for layer in range(LAYERS):
        cache.update(wide, -wide, layer)
    for layer in cache.layers:
        assert layer.keys.dtype == torch.bfloat16
        assert torch.equal(layer.keys.clone(), fake_quantize(wide.float()).to(torch.bfloat16))
