"""Operations on the sequences of a preallocated cache: the same as those of a cache that grows, or refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hf_int8_paged import PagedInt8Cache
from tests.models import random_ids, tiny_model, tipped_roundings

GREEDY = {"do_sample": False, "pad_token_id": 0}
BACKENDS = ["reference", "cpu"]


def ready(name: str = "llama", **changes):
    model = tiny_model(name, **changes)
    model.set_attn_implementation("int8_paged")
    return model


def both(model, batch: int = 6, length: int = 128, **options) -> tuple[PagedInt8Cache, PagedInt8Cache]:
    """A cache that grows and a preallocated one."""
    return (
        PagedInt8Cache(model.config, **options),
        PagedInt8Cache(model.config, max_batch_size=batch, max_cache_len=length, **options),
    )


def logits(model, cache: PagedInt8Cache, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def assert_same(model, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Read from equal blocks, but float32 sums in another order may tip roundings in the layers above."""
    torch.testing.assert_close(got, expected, rtol=0, atol=tipped_roundings(model))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("window", "prompt", "remove"), [(12, 20, 8), (64, 70, 8), (64, 200, 30), (20, 150, 5)])
def test_a_window_gives_back_tokens_of_a_prompt_longer_than_itself(window, prompt, remove, backend):
    model, ids = ready("mistral", sliding_window=window), random_ids(2, prompt, seed=1)
    cache = both(model, 2, 256, backend=backend, center_keys=False)[1]
    logits(model, cache, ids)
    cache.crop(-remove)
    straight = both(model, 2, 256, backend=backend, center_keys=False)[1]
    logits(model, straight, ids[:, : prompt - remove])
    step = random_ids(2, 1, seed=2)
    # Rows of the prompt were computed in another shape: roundings tip.
    assert_same(model, logits(model, cache, step), logits(model, straight, step))


def test_a_window_that_cannot_go_back_says_so_and_nothing_changes():
    model = ready("gemma2")  # every other layer has a window of 24
    cache = both(model, 2, 256)[1]
    logits(model, cache, random_ids(2, 200))
    lengths = [int(layer.get_seq_length()) for layer in cache.layers]
    room = cache.layers[0].room.most_to_crop
    with pytest.raises(RuntimeError, match=rf"cannot go back to 100 tokens.*can give back {room} tokens"):
        cache.crop(-100)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == lengths
    with pytest.raises(RuntimeError, match="cannot go back"):
        cache.crop(-room - 1)
    cache.crop(-room)
    logits(model, cache, random_ids(2, 1))
    with pytest.raises(ValueError, match="minus the number of tokens"):
        cache.crop(3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("way", ["prompt_lookup", "assistant"])
def test_drafted_tokens_are_those_of_a_cache_that_grows(name: str, way: str, backend: str):
    model = ready(name, **({"sliding_window": 64} if name == "mistral" else {}))
    ids = torch.cat([random_ids(1, 35, seed=2)] * 2, dim=1)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 8}
    if way == "assistant":
        options = {"assistant_model": tiny_model(name, num_hidden_layers=1)}
    # Drafts that stand in the first forward pass are seen there in full precision, so plain greedy tokens may differ.
    expected, tokens = (
        model.generate(ids, past_key_values=cache, max_new_tokens=20, **options, **GREEDY)
        for cache in both(model, 1, 160, backend=backend)
    )
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("batch", [1, 2])
def test_beam_search_finds_the_same_tokens(name: str, batch: int, backend: str):
    model, ids = ready(name), random_ids(batch, 25, seed=3)
    growing, cache = both(model, batch * 3, backend=backend)
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 15}
    expected = model.generate(ids, past_key_values=growing, **options, **GREEDY)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options, **GREEDY), expected)


OPERATIONS = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
    "select by mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "crop": lambda cache: cache.crop(-5),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_on_rows_and_lengths(operation: str, name: str, backend: str):
    """Also twice, with a step between, and on a fork, which goes on independently."""
    model, ids = ready(name), random_ids(3, 22, seed=4)
    ids[0, :7] = 0
    mask = (ids != 0).long()
    caches = both(model, 12, backend=backend, sink_tokens=2)
    for cache in caches:
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
    forks = [copy.deepcopy(cache) for cache in caches]
    for turn in range(2):
        if turn == 1 and operation.startswith("select"):
            break
        batches = []
        for cache in caches:
            OPERATIONS[operation](cache)
            batches.append(cache.layers[0].keys.shape[0])
        assert batches[0] == batches[1]
        step = random_ids(batches[0], 1, seed=5 + turn)
        assert_same(model, logits(model, caches[1], step), logits(model, caches[0], step))
    step = random_ids(3, 1, seed=9)
    assert_same(model, logits(model, forks[1], step), logits(model, forks[0], step))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_before_the_first_token_change_nothing(operation: str):
    model = ready()
    cache = both(model, 3)[1]
    OPERATIONS[operation](cache)
    cache.reset()
    expected = logits(model, both(model, 3)[1], random_ids(2, 20))
    assert torch.equal(logits(model, cache, random_ids(2, 20)), expected)


def test_more_rows_than_there_is_room_for_are_refused_before_anything_changes():
    model = ready()
    cache = both(model, 3)[1]
    logits(model, cache, random_ids(2, 20))
    with pytest.raises(ValueError, match="4 sequences asked for, but max_batch_size is 3"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(IndexError, match="cache that holds 2: index 2 is out of bounds"):
        cache.batch_select_indices(torch.tensor([0, 2]))
    fresh = both(model, 3)[1]
    logits(model, fresh, random_ids(2, 20))
    assert torch.equal(logits(model, cache, random_ids(2, 1)), logits(model, fresh, random_ids(2, 1)))
