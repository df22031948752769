"""Caches in every state that a file has to hold: what was done to them, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from eval._coverage_overrides import OVERRIDES
from eval._tiny_configs import tiny_model as tiny_architecture
from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.layer import PagedInt8Layer
from tests.models import random_ids, tiny_model

#: Options of the cache, by kind.
KINDS: dict[str, dict[str, Any]] = {"growing": {}, "preallocated": {"max_batch_size": 4, "max_cache_len": 120}}
#: Models whose layers hold a recurrent or a convolution state beside keys or instead of them.
HYBRIDS = {
    "falcon_h1": ("FalconH1ForCausalLM", "causal"),
    "lfm2_moe": ("Lfm2MoeForCausalLM", "causal"),
    "qwen3_next": ("Qwen3NextForCausalLM", "causal"),
}


def model_called(name: str) -> PreTrainedModel:
    """A tiny random model that attends with ``int8_paged``."""
    if name in HYBRIDS:
        class_name, mapping = HYBRIDS[name]
        model = tiny_architecture(name, class_name, mapping, OVERRIDES.get(name, {}), 0.2)
    else:
        model = tiny_model(name)
    model.set_attn_implementation("int8_paged")
    return model


@torch.no_grad()
def step(model: PreTrainedModel, cache: PagedInt8Cache, batch: int, tokens: int, **inputs: Any) -> torch.Tensor:
    """One forward pass of random tokens; logits."""
    length = int(cache.get_seq_length()) + tokens
    return model(random_ids(batch, tokens, seed=length), **{CACHE_ARGUMENT: cache}, **inputs).logits


def padded(model: PreTrainedModel, cache: PagedInt8Cache) -> None:
    mask = torch.ones(3, 50, dtype=torch.long)
    mask[0, :34], mask[2, :5] = 0, 0
    step(model, cache, 3, 50, attention_mask=mask)


def prompt(model: PreTrainedModel, cache: PagedInt8Cache) -> None:
    step(model, cache, 2, 37)
    step(model, cache, 2, 1)


def short(model: PreTrainedModel, cache: PagedInt8Cache) -> None:
    step(model, cache, 1, 5)


def whole_blocks(model: PreTrainedModel, cache: PagedInt8Cache) -> None:
    step(model, cache, 1, 48)


def out_of_the_window(model: PreTrainedModel, cache: PagedInt8Cache) -> None:
    for tokens in (40, 1, 30, 3):
        step(model, cache, 2, tokens)


def beams(model: PreTrainedModel, cache: PagedInt8Cache) -> None:
    step(model, cache, 2, 37)
    cache.batch_repeat_interleave(2)
    step(model, cache, 4, 1)
    cache.reorder_cache(torch.tensor([1, 1, 3, 2]))
    step(model, cache, 4, 1)


def equal_prompts(model: PreTrainedModel, cache: PagedInt8Cache) -> None:
    with torch.no_grad():
        model(random_ids(1, 30).repeat(3, 1), **{CACHE_ARGUMENT: cache})


def recorded(model: PreTrainedModel, cache: PagedInt8Cache) -> None:
    cache.activate_past_recording()
    for tokens in (40, 6):
        step(model, cache, 1, tokens)


def cropped(model: PreTrainedModel, cache: PagedInt8Cache) -> None:
    recorded(model, cache)
    cache.crop(-4)


def reset(model: PreTrainedModel, cache: PagedInt8Cache) -> None:
    prompt(model, cache)
    cache.reset()


def nothing(model: PreTrainedModel, cache: PagedInt8Cache) -> None:
    pass


HISTORIES: dict[str, Callable[[PreTrainedModel, PagedInt8Cache], None]] = {
    function.__name__: function
    for function in (
        prompt, padded, short, whole_blocks, out_of_the_window, beams, equal_prompts, recorded, cropped, reset, nothing,
    )
}  # fmt: skip


def stored(cache: PagedInt8Cache) -> list[torch.Tensor]:
    """All that can be read of a cache: of each layer dense keys and values that a query may see, and other states."""
    found: list[torch.Tensor] = []
    for layer in cache.layers:
        if isinstance(layer, PagedInt8Layer) and layer.keys is not None:
            length = layer.length
            first = max(layer.room.first_shown(length), length - (layer.window or length) + 1, 0)
            found += layer.gather(first, length, torch.float32)
        own = getattr(layer, "linear_part", None) if isinstance(layer, PagedInt8Layer) else layer
        for value in vars(own).values() if own is not None else ():
            found += [x for x in (value.values() if isinstance(value, dict) else [value]) if torch.is_tensor(x)]
    return found


def assert_same(mine: PagedInt8Cache, other: PagedInt8Cache) -> None:
    """Bit for bit the same contents, lengths and places."""
    assert int(mine.get_seq_length()) == int(other.get_seq_length())
    assert mine._batch == other._batch
    of_mine, of_other = stored(mine), stored(other)
    assert len(of_mine) == len(of_other)
    for a, b in zip(of_mine, of_other):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
