"""Batch operations with every kind of index, and on caches without tokens or sequences: as `DynamicCache` does them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Lfm2Config

from hf_int8_paged import PagedInt8Cache
from tests.models import tiny_model

CONFIG = tiny_model("llama").config
LAYERS = CONFIG.num_hidden_layers
#: Every head's row of sequence i has one value only, i + 1 or its negative, which quantization keeps.
BATCH, TOKENS = 3, 5


def states(batch: int, tokens: int, heads: int = 2, dim: int = 16, dtype=torch.float32) -> torch.Tensor:
    values = torch.arange(1.0, batch + 1)[:, None, None, None]
    return values.expand(batch, heads, tokens, dim).clone().to(dtype)


def append(cache, new: torch.Tensor) -> None:
    for layer in range(LAYERS):
        cache.update(new, -new, layer)


def pair(tokens: int = TOKENS, **options) -> tuple[PagedInt8Cache, DynamicCache]:
    ours, theirs = PagedInt8Cache(CONFIG, rotation=None, center_keys=False, **options), DynamicCache(config=CONFIG)
    if tokens:
        for cache in (ours, theirs):
            append(cache, states(BATCH, tokens))
    return ours, theirs


def assert_same(ours: PagedInt8Cache, theirs: DynamicCache) -> None:
    """Equal up to the scale's rounding to float16, one part in 2048."""
    assert int(ours.get_seq_length()) == theirs.get_seq_length()
    for mine, other in zip(ours.layers, theirs.layers):
        for kind in ("keys", "values"):
            dense = getattr(other, kind)
            if dense is None or not dense.numel():
                assert getattr(mine, kind) is None
            else:
                stored = getattr(mine, kind).clone()[:, :, : dense.shape[2]]
                torch.testing.assert_close(stored, dense, rtol=2**-11, atol=0)


SELECTIONS = [
    [2],
    (1,),
    [2, 0],
    (2, 0, 0, 1),
    [-1, 0],
    slice(1, None),
    slice(None, None, 2),
    slice(0, 0),
    [],
    np.array([1, 2]),
    np.array([True, False, True]),
    torch.tensor([2, 1]),
    torch.tensor([-3]),
    torch.tensor([1], dtype=torch.int32),
    torch.tensor([True, False, True]),
    [False, False, True],
    torch.tensor([False, False, False]),
]


@pytest.mark.parametrize("indices", SELECTIONS, ids=repr)
def test_selecting_sequences(indices):
    ours, theirs = pair()
    for cache in (ours, theirs):
        cache.batch_select_indices(indices)
    assert_same(ours, theirs)
    if kept := len(theirs.layers[0].keys):
        for cache in (ours, theirs):
            append(cache, states(kept, 2))
        assert_same(ours, theirs)
    else:
        append(ours, states(2, 4))  # no sequences are as after a reset
        assert ours.get_seq_length() == 4


@pytest.mark.parametrize(
    "indices", [[3], [-4], (0, 3), torch.tensor([5]), torch.tensor([0.5]), torch.tensor([True]), "ab", 1,
                torch.tensor(1), torch.tensor([[0, 1]]), None, {}], ids=repr
)  # fmt: skip
def test_no_such_sequence(indices):
    ours, theirs = pair()
    with pytest.raises(IndexError, match=r"cannot select the sequences .* of a cache that holds 3|has \d"):
        ours.batch_select_indices(indices)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "options", [{}, {"max_batch_size": BATCH, "max_cache_len": 32}], ids=["growing", "preallocated"]
)
@pytest.mark.parametrize(
    "beam_idx", [[2, 0, 1], (0, 0, 0), np.array([1, 1, 2]), torch.tensor([2, 2, 2]), torch.tensor([0, 1, 2]).int()],
    ids=repr,
)  # fmt: skip
def test_reordering_sequences(beam_idx, options):
    ours, theirs = pair(**options)
    ours.reorder_cache(beam_idx)
    theirs.reorder_cache(torch.as_tensor(beam_idx))
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "options", [{}, {"max_batch_size": BATCH, "max_cache_len": 32}], ids=["growing", "preallocated"]
)
@pytest.mark.parametrize(
    "beam_idx", [[3, 0, 0], [-1, 0, 1], [0.0, 1.0, 2.0], [True, False, True], [[0, 1, 2]]], ids=repr
)
def test_no_such_order(beam_idx, options):
    ours, theirs = pair(**options)
    for given in (beam_idx, torch.tensor(beam_idx)):
        with pytest.raises(IndexError, match=r"reorder_cache"):
            ours.reorder_cache(given)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "options", [{}, {"max_batch_size": BATCH, "max_cache_len": 32}], ids=["growing", "preallocated"]
)
def test_an_order_of_another_length(options):
    ours, theirs = pair(**options)
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([1, 2]))
    assert_same(ours, theirs)


@pytest.mark.parametrize("repeats", [0, 1, 3])
def test_repeating_sequences(repeats):
    ours, theirs = pair()
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(repeats)
    assert_same(ours, theirs)


@pytest.mark.parametrize(("repeats", "error"), [(-1, RuntimeError), (1.5, TypeError)])
def test_an_impossible_number_of_repeats(repeats, error):
    ours, theirs = pair()
    for cache in (ours, theirs):
        with pytest.raises(error):
            cache.batch_repeat_interleave(repeats)
    assert_same(ours, theirs)


OPERATIONS = [
    ("reorder_cache", torch.tensor([1, 0])),
    ("batch_select_indices", torch.tensor([1, 0, 2])),
    ("batch_repeat_interleave", 2),
    ("crop", -3),
    ("crop", 0),
    ("reset", None),
    ("activate_past_recording", None),
]


@pytest.mark.parametrize(
    "options", [{}, {"max_batch_size": BATCH, "max_cache_len": 32}], ids=["growing", "preallocated"]
)
@pytest.mark.parametrize("emptied", [False, True], ids=["never_used", "emptied"])
@pytest.mark.parametrize(("operation", "argument"), OPERATIONS, ids=str)
def test_operations_on_a_cache_without_tokens(operation, argument, emptied, options):
    ours, theirs = pair(TOKENS if emptied else 0, **options)
    for cache in (ours, theirs):
        if emptied:
            cache.reset()
        if cache is ours or operation != "crop":  # it changes nothing, and raises before transformers 5.23
            getattr(cache, operation)(*([] if argument is None else [argument]))
        append(cache, states(BATCH, 4))
    assert_same(ours, theirs)


def test_a_preallocated_cache_repeats_and_selects_up_to_its_batch_size():
    ours, theirs = pair(max_batch_size=2 * BATCH, max_cache_len=32)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(2)
    assert_same(ours, theirs)
    with pytest.raises(ValueError, match="12 sequences asked for, but max_batch_size is 6"):
        ours.batch_repeat_interleave(2)
    assert_same(ours, theirs)
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([5, 1]))
        append(cache, states(2, 4))
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "options", [{}, {"max_batch_size": BATCH, "max_cache_len": 32}], ids=["growing", "preallocated"]
)
@pytest.mark.parametrize(("batch", "tokens"), [(0, 4), (BATCH, 0), (0, 0)])
def test_an_update_without_sequences_or_tokens_is_none(batch, tokens, options):
    ours, theirs = pair(0, **options)
    new = torch.randn(batch, 2, tokens, 16)
    for layer in range(LAYERS):
        for mine, other in zip(ours.update(new, new, layer), theirs.update(new, new, layer)):
            assert mine.shape == other.shape
        assert int(ours.get_seq_length(layer)) == theirs.get_seq_length(layer) == 0
    append(ours, states(2, 5))
    assert int(ours.get_seq_length()) == 5


@pytest.mark.parametrize(
    "options", [{}, {"max_batch_size": BATCH, "max_cache_len": 32}], ids=["growing", "preallocated"]
)
def test_no_new_tokens_for_a_cache_that_has_some(options):
    ours, theirs = pair(**options)
    for layer in range(LAYERS):
        keys, values = ours.update(states(BATCH, 0), states(BATCH, 0), layer)
        assert torch.equal(keys.clone(), ours.layers[layer].keys.clone())
        assert torch.equal(values.clone(), ours.layers[layer].values.clone())
    assert_same(ours, theirs)
    with pytest.raises(ValueError, match="holds 3 sequences, but keys of 0 came"):
        ours.update(states(0, 1), states(0, 1), 0)
    for cache in (ours, theirs):
        append(cache, states(BATCH, 3))
    assert_same(ours, theirs)


@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"heads": 4}, {"dim": 32}, {"batch": 5}], ids=str)
def test_another_model_s_keys_after_reset(change):
    ours, theirs = pair()
    for cache in (ours, theirs):
        cache.reset()
        append(cache, states(**{"batch": 2, "tokens": 7} | change))
    assert_same(ours, theirs)


def test_nothing_changes_where_one_layer_cannot_follow():
    """The convolutions of LFM2 are transformers' own layers, which cannot select sequences or crop without a record."""
    config = Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["full_attention", "conv", "full_attention"],
    )  # fmt: skip
    cache = PagedInt8Cache(config)
    for layer in (0, 2):
        cache.update(states(2, 6), states(2, 6), layer)
    cache.update_conv_state(torch.randn(2, 32, 6), 1, conv_kernel_size=3)
    before = [cache.layers[layer].keys.clone() for layer in (0, 2)]
    for operation, argument, error in (
        ("batch_select_indices", [0], NotImplementedError),
        ("batch_repeat_interleave", 2, NotImplementedError),
        ("crop", -2, RuntimeError),
        ("reorder_cache", [0, 2], IndexError),
    ):
        with pytest.raises(error):
            getattr(cache, operation)(argument)
        assert cache.get_seq_length() == 6
        for layer, keys in zip((0, 2), before):
            assert torch.equal(cache.layers[layer].keys.clone(), keys)


def test_a_preallocated_window_that_cannot_go_back_keeps_the_other_layers_too():
    config = tiny_model("gemma2").config
    cache = PagedInt8Cache(config, max_batch_size=1, max_cache_len=128)
    for layer in range(4):
        cache.update(torch.randn(1, 2, 100, 256), torch.randn(1, 2, 100, 256), layer)
    with pytest.raises(RuntimeError, match="window"):
        cache.crop(-90)
    assert {int(cache.get_seq_length(layer)) for layer in range(4)} == {100}
