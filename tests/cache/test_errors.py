"""Mistakes that users make: a clear error, and a cache that is as it was before."""

from __future__ import annotations

import pytest
import torch

from hf_int8_paged import CacheFullError, PagedInt8Cache, PagedInt8Pool
from tests.models import random_ids, tiny_model


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def llama(**changes):
    model = tiny_model("llama", **changes)
    model.set_attn_implementation("int8_paged")
    return model


@torch.no_grad()
def filled(model, tokens: int = 20, batch: int = 2, **options) -> PagedInt8Cache:
    cache = PagedInt8Cache(model.config, **options)
    model(random_ids(batch, tokens), past_key_values=cache)
    return cache


def contents(cache: PagedInt8Cache) -> list[torch.Tensor]:
    return [part.clone() for layer in cache.layers for part in (layer.keys, layer.values)]


def assert_unchanged(cache: PagedInt8Cache, before: list[torch.Tensor]) -> None:
    assert all(torch.equal(now, then) for now, then in zip(contents(cache), before))
    assert {cache.get_seq_length(i) for i in range(len(cache.layers))} == {before[0].shape[2]}


@pytest.mark.parametrize("block_size", [0, -16, 8, 17, 100])
def test_a_block_size_that_is_no_multiple_of_16(block_size):
    with pytest.raises(ValueError, match=f"multiple of 16, got {block_size}"):
        PagedInt8Cache(llama().config, block_size=block_size)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match=r"unknown backend 'tritn'; choose one of reference, cpu, triton"):
        PagedInt8Cache(llama().config, backend="tritn")


def test_a_backend_that_cannot_serve_the_device_is_refused_when_the_cache_is_made(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend 'triton' cannot serve device 'cpu'.*working here: .*reference"):
        PagedInt8Cache(llama().config, backend="triton", device="cpu")


@pytest.mark.parametrize("option", ["max_cache_len", "max_tokens"])
def test_limits_below_one(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        PagedInt8Cache(llama().config, **{option: 0})


def test_an_unsupported_layer_type_is_named():
    config = llama().config
    config.layer_types = ["full_attention", "telepathic_attention", "full_attention"]
    with pytest.raises(NotImplementedError, match=r"layer 1 .*'telepathic_attention'"):
        PagedInt8Cache(config)


def test_float64_keys():
    cache = PagedInt8Cache(llama().config)
    with pytest.raises(ValueError, match=r"layer 0: .*float32, float16 or bfloat16, got torch.float64"):
        cache.update(rows(1, 2, 3, 16, dtype=torch.float64), rows(1, 2, 3, 16, dtype=torch.float64), 0)
    assert cache.get_seq_length() == 0
    cache.update(rows(1, 2, 3, 16), rows(1, 2, 3, 16), 0)
    assert cache.get_seq_length() == 3


def test_a_head_dim_over_1024():
    cache = PagedInt8Cache(llama().config)
    with pytest.raises(ValueError, match="head_dim must be between 1 and 1024, got 1032"):
        cache.update(rows(1, 2, 3, 1032), rows(1, 2, 3, 1032), 0)
    assert cache.get_seq_length() == 0
    assert cache.nbytes_used == 0


def test_a_batch_size_that_changes():
    model = llama()
    cache = filled(model, batch=2)
    before = contents(cache)
    with torch.no_grad(), pytest.raises(ValueError, match=r"holds 2 sequences, but keys of 3 came.*reset\(\)"):
        model(random_ids(3, 1), past_key_values=cache)
    assert_unchanged(cache, before)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((2, 4, 1, 16), (2, 4, 1, 16), "holds 2 KV heads of width 16"),
        ((2, 2, 1, 32), (2, 2, 1, 16), "holds 2 KV heads of width 16"),
        ((2, 2, 1, 16), (2, 2, 2, 16), "keys .2, 2, 1, 16. and values .2, 2, 2, 16."),
    ],
)
def test_keys_of_another_model(keys, values, message):
    cache = filled(llama())
    before = contents(cache)
    with pytest.raises(ValueError, match=message):
        cache.update(rows(*keys), rows(*values), 0)
    assert_unchanged(cache, before)


def test_a_mistake_in_a_later_layer_takes_the_whole_step_back():
    cache = filled(llama())
    before = contents(cache)
    good, bad = rows(2, 2, 1, 16), rows(2, 2, 1, 8)
    cache.update(good, good, 0)
    with pytest.raises(ValueError, match="layer 1 holds"):
        cache.update(bad, bad, 1)
    assert_unchanged(cache, before)


def test_a_model_with_more_layers_than_the_cache():
    cache = PagedInt8Cache(llama(num_hidden_layers=2).config)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="layer 2 was updated, but the cache was made for a model with 2"),
    ):
        llama()(random_ids(1, 5), past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert cache.nbytes_used == 0


def test_a_model_with_fewer_layers_than_the_cache():
    cache, model = PagedInt8Cache(llama().config), llama(num_hidden_layers=2)
    with torch.no_grad():
        model(random_ids(1, 5), past_key_values=cache)
        with pytest.raises(ValueError, match="updated only 2 of the cache's 3 attention layers"):
            model(random_ids(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cache_len": 24}, "25 tokens per sequence asked for, but max_cache_len is 24; the cache still holds 24"),
        ({"max_tokens": 70}, "needs 6 blocks of 16 tokens, but max_tokens=70 allows 4"),
    ],
    ids=["max_cache_len", "max_tokens"],
)
def test_a_full_cache_says_so_and_stays_valid(options, message):
    model = llama()
    cache = filled(model, tokens=24, **options)
    if "max_tokens" in options:
        with torch.no_grad():
            model(random_ids(2, 8), past_key_values=cache)
    before = contents(cache)
    with torch.no_grad(), pytest.raises(CacheFullError, match=message):
        model(random_ids(2, 1), past_key_values=cache)
    assert_unchanged(cache, before)


def test_an_interrupted_forward_pass_is_noticed():
    cache = filled(llama())
    one = rows(2, 2, 1, 16)
    cache.update(one, one, 0)
    with pytest.raises(ValueError, match=r"updated only 1 of .* \(not layer 1\).*interrupted, crop\(-1\)"):
        cache.update(one, one, 0)
    cache.update(one, one, 1)
    with pytest.raises(ValueError, match=r"interrupted, crop\(-1\)"):
        cache.update(rows(2, 2, 2, 16), rows(2, 2, 2, 16), 2)


@pytest.mark.parametrize("operation", ["offload", "prefetch"])
def test_a_cache_made_without_offloading_refuses_it(operation):
    cache = filled(llama())
    for call in (getattr(cache.layers[0], operation), lambda: getattr(cache, operation)(0)):
        with pytest.raises(NotImplementedError, match=rf"{operation}: this cache was made without offloading=True"):
            call()


@pytest.mark.parametrize("operation", ["crop", "reorder_cache", "reset"])
def test_single_layers_cannot_be_changed(operation):
    """Layers share their block table: changed alone, a layer would not fit the others."""
    cache = filled(llama())
    before = contents(cache)
    arguments = {"crop": [-1], "reorder_cache": [torch.tensor([1, 0])], "reset": []}[operation]
    with pytest.raises(NotImplementedError, match=rf"call {operation}\(\) of the cache"):
        getattr(cache.layers[1], operation)(*arguments)
    assert_unchanged(cache, before)


def test_a_positive_crop():
    with pytest.raises(ValueError, match="minus the number of tokens to remove, got 3"):
        filled(llama()).crop(3)


def test_a_window_cannot_be_rolled_back_beyond_what_it_holds():
    model = tiny_model("mistral", sliding_window=20)
    model.set_attn_implementation("int8_paged")
    cache = filled(model, tokens=100)
    with torch.no_grad():
        for _ in range(30):
            model(random_ids(2, 1), past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"cannot go back to 90 tokens.*activate_past_recording"):
        cache.crop(-40)
    assert cache.get_seq_length() == 130


def test_a_pool_of_another_model():
    pool = PagedInt8Pool()
    first, second = (PagedInt8Cache(llama().config, pool=pool) for _ in range(2))
    first.update(rows(1, 2, 3, 16), rows(1, 2, 3, 16), 0)
    with pytest.raises(ValueError, match="layer 0 of this pool has 2 KV heads of widths 16 and 16"):
        second.update(rows(1, 4, 3, 16), rows(1, 4, 3, 16), 0)
    assert second.get_seq_length() == 0
    with pytest.raises(ValueError, match="belong to the pool"):
        PagedInt8Cache(llama().config, pool=pool, block_size=32)


@pytest.mark.parametrize("max_bytes", [None, 100 << 10])
def test_a_pool_of_a_model_whose_layers_have_other_windows(max_bytes):
    pool = PagedInt8Pool(max_bytes=max_bytes)
    mine, windows = llama(), tiny_model("mistral")
    windows.set_attn_implementation("int8_paged")
    cache, other = PagedInt8Cache(mine.config, pool=pool), PagedInt8Cache(windows.config, pool=pool)
    with torch.no_grad():
        mine(random_ids(2, 40), past_key_values=cache)
        before = contents(cache)
        with pytest.raises(ValueError, match="layer 0 of this pool holds tokens as one of full_attention"):
            windows(random_ids(2, 20), past_key_values=other)
        assert_unchanged(cache, before)
        del before
        cache.reset()
        windows(random_ids(2, 20), past_key_values=other)  # nothing is in the way then
        assert other.get_seq_length() == 20
        with pytest.raises(ValueError, match="layer 0 of this pool holds tokens as one of sliding_attention_20"):
            mine(random_ids(2, 40), past_key_values=cache)


def test_faulty_rows_reach_the_output_as_nan_and_only_where_they_are_seen():
    model = llama()
    cache = filled(model, batch=2)
    bad = rows(2, 2, 1, 16)
    bad[1, 0, 0, 3] = torch.inf
    for layer in range(3):
        cache.update(bad, bad, layer)
    with torch.no_grad():
        logits = model(random_ids(2, 1), past_key_values=cache).logits
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def test_a_faulty_row_of_the_first_prompt_stays_alone():
    """It must not reach the others through the mean of the keys."""
    cache = PagedInt8Cache(llama().config)
    keys = rows(2, 2, 20, 16)
    keys[0, 0, 3, 5] = torch.inf
    cache.update(keys, keys.nan_to_num(0.0, 0.0, 0.0), 0)
    stored = cache.layers[0].keys.clone()
    assert stored[0, 0, 3].isnan().all()
    assert stored.isnan().sum() == 16


def test_huge_and_zero_rows_stay_finite():
    cache = PagedInt8Cache(llama().config, rotation=None, center_keys=False, sink_tokens=0)
    huge = torch.full((1, 2, 3, 16), 3e38)
    zero = torch.zeros(1, 2, 3, 16)
    cache.update(huge, zero, 0)
    keys, values = cache.layers[0].keys.clone(), cache.layers[0].values.clone()
    assert torch.equal(keys, torch.full_like(keys, 127 * 65504.0))
    assert torch.equal(values, zero)


def test_a_view_that_outlived_its_tokens_refuses_to_be_read():
    cache = filled(llama())
    keys = cache.layers[0].keys
    cache.reset()
    with pytest.raises(RuntimeError, match="since dropped or moved"):
        keys.sum()


def test_a_pool_refuses_to_exceed_its_budget_before_any_group_grows():
    pool = PagedInt8Pool(max_tokens=64)
    pool.add_group("a", None)
    pool.add_group("b", None)
    with pytest.raises(CacheFullError, match="needs 5 blocks"):
        pool.ensure_free({"a": 2, "b": 5})
    assert pool.allocators["a"].num_blocks == 0
