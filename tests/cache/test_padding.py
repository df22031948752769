"""What the mask function says of padding reaches the next step of the same cache, and nothing else."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels import reference
from hf_int8_paged.seam.mask_function import int8_paged_mask
from tests.models import random_ids, tiny_model

TOKENS = torch.arange(40) >= torch.tensor([0, 20])[:, None]
KINDS: dict[str, dict[str, Any]] = {"growing": {}, "preallocated": {"max_batch_size": 2, "max_cache_len": 64}}


def rows(tokens: int = 40, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 2, tokens, 16, generator=torch.Generator().manual_seed(0))


def cache_of(kind: str) -> PagedInt8Cache:
    return PagedInt8Cache(tiny_model("llama").config, **KINDS[kind])


def mask_for(cache: PagedInt8Cache, tokens: torch.Tensor | None = TOKENS, q_length: int = 40, **changes: Any) -> Any:
    """What transformers does before the first layer."""
    kv_length, kv_offset = cache.get_mask_sizes(q_length, 0)
    arguments: dict[str, Any] = {"batch_size": 2, "q_length": q_length, "kv_length": kv_length, "kv_offset": kv_offset}
    arguments |= {"mask_function": causal_mask_function, "attention_mask": tokens, **changes}
    return int8_paged_mask(**arguments)


def firsts(cache: PagedInt8Cache) -> list[int]:
    """The position of each sequence's first token, as the first layer has it."""
    first_tokens = cache.layers[0].room.first_tokens(0)
    return [] if first_tokens is None else first_tokens.first.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_layer_knows_the_padding_before_it_stores(kind: str) -> None:
    cache = cache_of(kind)
    mask = mask_for(cache)
    cache.update(rows(), rows(), 0)
    assert firsts(cache) == [0, 20]
    assert mask is not None
    if kind == "growing":
        # Of the padded sequence the block that is nothing but padding was given back.
        assert cache.pool.allocators["full_attention"].num_used == 3 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_stored_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("int8_paged")
    cache = PagedInt8Cache(model.config, backend="reference", **KINDS[kind])
    stored, append = [], reference.append

    def noted(k_new: torch.Tensor, *rest: Any) -> None:
        stored.append(k_new.shape[2])
        append(k_new, *rest)

    monkeypatch.setattr(reference, "append", noted)
    with torch.no_grad():
        model(random_ids(2, 40), attention_mask=TOKENS.long(), past_key_values=cache)
    assert stored == [40] * len(cache.layers)


WRONG: dict[str, dict[str, Any]] = {
    "of another batch": {"tokens": TOKENS[:1], "batch_size": 1},
    "of other keys": {"tokens": TOKENS[:, :24], "kv_length": 24},
    "another pattern": {"mask_function": bidirectional_mask_function},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("why", WRONG)
def test_a_mask_that_is_not_of_this_step_says_nothing(why: str, kind: str) -> None:
    """Of an encoder, for example, which comes between a decoder's own mask and its first layer."""
    cache = cache_of(kind)
    mask = mask_for(cache, **WRONG[why])
    cache.update(rows(), rows(), 0)
    assert firsts(cache) == [0, 0]
    del mask


def test_only_the_mask_made_right_after_the_question_is_the_caches() -> None:
    cache = cache_of("growing")
    masks = mask_for(cache, tokens=None), int8_paged_mask(2, 40, 40, attention_mask=TOKENS)
    cache.update(rows(), rows(), 0)
    assert firsts(cache) == [0, 0]
    del masks


@pytest.mark.parametrize("kind", KINDS)
def test_a_note_goes_with_its_mask_with_the_step_and_with_writes_into_it(kind: str) -> None:
    for spoil in ("forget", "write", "use"):
        cache = cache_of(kind)
        mask = mask_for(cache)
        if spoil == "forget":  # the forward pass ended before its first layer
            del mask
        elif spoil == "write":
            mask[:, :, 0] = True
        else:
            for layer in range(3):
                cache.update(rows(), rows(), layer)
            cache.reset()
        cache.update(rows(), rows(), 0)
        assert firsts(cache) == [0, 0], spoil


def test_threads_do_not_take_each_others_padding() -> None:
    mine, other = cache_of("growing"), cache_of("growing")
    mine.get_mask_sizes(40, 0)
    thread = threading.Thread(target=other.get_mask_sizes, args=(40, 0))
    thread.start()
    thread.join()
    mask = int8_paged_mask(2, 40, 40, attention_mask=TOKENS)
    for cache in (mine, other):
        cache.update(rows(), rows(), 0)
    assert firsts(mine) == [0, 20]
    assert firsts(other) == [0, 0]
    del mask


def test_a_cache_is_not_kept_alive_by_the_question() -> None:
    cache = cache_of("growing")
    cache.get_mask_sizes(40, 0)
    del cache
    assert int8_paged_mask(2, 40, 40, attention_mask=TOKENS) is not None
