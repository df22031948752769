"""The first token of every sequence in full precision: which it is, and that it follows its sequence. And what else
the cache makes of padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_int8_paged import CacheFullError, PagedInt8Cache
from tests.models import FakeQuantizedCache, fake_quantize, random_ids, tiny_model, tipped_roundings

from .two_readers import CheckedAttention

PADDING = (0, 9, 30)


def ready(name: str = "llama", implementation: str = "int8_paged"):
    model = tiny_model(name)
    model.set_attn_implementation(implementation)
    return model


def caches(model, **options) -> dict[str, PagedInt8Cache]:
    """A growing cache and a preallocated one."""
    return {
        "growing": PagedInt8Cache(model.config, **options),
        "preallocated": PagedInt8Cache(model.config, max_batch_size=6, max_cache_len=80, **options),
    }


def padded(tokens: int = 40) -> dict[str, torch.Tensor]:
    ids = random_ids(len(PADDING), tokens, seed=5)
    for row, count in enumerate(PADDING):
        ids[row, :count] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def exact_tokens(cache, layer: int, rows: torch.Tensor) -> list[list[int]]:
    """Positions at which each sequence's stored keys are those of ``rows`` ``[batch, heads, tokens, dim]``."""
    stored = cache.layers[layer].keys[:, :, : rows.shape[2]]
    # A quantized row is off by some 1e-2.
    close = (stored - rows).abs().amax((1, 3)) < 1e-5 * rows.abs().max()
    return [row.nonzero()[:, 0].tolist() for row in close]


@pytest.mark.parametrize("kind", ["growing", "preallocated"])
@pytest.mark.parametrize("count", [0, 1, 4, 16])
def test_the_first_tokens_behind_left_padding_are_exact_and_no_others(kind: str, count: int, backend: str):
    model = ready()
    dense: Any = DynamicCache(config=model.config)
    cache = caches(model, sink_tokens=count, backend=backend)[kind]
    with torch.no_grad():
        model(**padded(), past_key_values=cache)
        model.set_attn_implementation("sdpa")
        model(**padded(), past_key_values=dense)
    for layer in range(3):
        got = exact_tokens(cache, layer, dense.layers[layer].keys)
        # Keys of padding are 0 in these models, which int8 holds exactly.
        got = [[position for position in row if position >= p] for row, p in zip(got, PADDING)]
        assert got == [list(range(p, min(p + count, 40))) for p in PADDING]


@pytest.mark.parametrize("kind", ["growing", "preallocated"])
@pytest.mark.parametrize("tokens", [40, 31], ids=["long", "one_token_and_less_than_16"])
def test_keys_are_centred_on_the_mean_of_tokens_not_of_padding(kind: str, tokens: int):
    model, inputs = ready(), padded(tokens)
    if tokens == 31:
        inputs = {name: x[2:] for name, x in inputs.items()}  # too few for a mean
    cache = caches(model)[kind]
    dense: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        model.set_attn_implementation("sdpa")
        model(**inputs, past_key_values=dense)
    for layer in range(3):
        keys, mask = dense.layers[layer].keys, inputs["attention_mask"].bool()
        mean = keys.transpose(1, 2)[mask].mean(0) if tokens == 40 else torch.zeros(2, 16)
        torch.testing.assert_close(cache.layers[layer].storage.key_center, mean, rtol=1e-5, atol=1e-5)
        stored = cache.layers[layer].keys[:, :, :tokens]
        error = (stored - keys).transpose(1, 2)[mask].abs().amax()
        assert error < 0.02 * keys.abs().max(), "stored with another centre than they are read with"


@pytest.mark.parametrize("kind", ["growing", "preallocated"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_padded_batches_decode_as_the_oracle_does(name: str, kind: str):
    model = ready(name)
    inputs, steps = padded(), random_ids(3, 6, seed=6)
    logits = []
    for implementation, cache in (
        ("int8_paged", caches(model, backend="reference")[kind]),
        ("eager", FakeQuantizedCache(model.config, padding=PADDING)),
    ):
        model.set_attn_implementation(implementation)
        mask = inputs["attention_mask"]
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            for step in steps.T:
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                position = mask.sum(1, keepdim=True) - 1
                out = model(step[:, None], attention_mask=mask, position_ids=position, past_key_values=cache)
        logits.append(out.logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=tipped_roundings(model))


@pytest.mark.parametrize("kind", ["growing", "preallocated"])
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_prompts_of_any_length_again_after_a_reset(kind: str, tokens: int, backend: str):
    cache = caches(ready(), sink_tokens=2, backend=backend)[kind]
    for seed in range(2):
        rows = torch.randn(2, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))
        cache.update(rows, -rows, 0)
        torch.testing.assert_close(cache.layers[0].keys[:, :, : min(tokens, 2)], rows[:, :, :2], rtol=0, atol=0)
        torch.testing.assert_close(cache.layers[0].values[:, :, : min(tokens, 2)], -rows[:, :, :2], rtol=0, atol=0)
        for layer in (1, 2):
            cache.update(rows, -rows, layer)
        cache.reset()


@pytest.mark.parametrize("kind", ["growing", "preallocated"])
def test_a_refused_first_prompt_leaves_nothing_behind(kind: str):
    model = ready()
    limits: dict[str, Any] = {"max_cache_len": 30} | ({"max_batch_size": 2} if kind == "preallocated" else {})
    logits = []
    for refused in (False, True):
        cache = PagedInt8Cache(model.config, **limits)
        with torch.no_grad():
            if refused:
                with pytest.raises(CacheFullError):
                    model(random_ids(2, 31, seed=1), past_key_values=cache)
            model(random_ids(2, 20, seed=2), past_key_values=cache)
            logits.append(model(random_ids(2, 1, seed=3), past_key_values=cache).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", ["growing", "preallocated"])
def test_what_is_cropped_and_written_again_is_quantized(kind: str, backend: str):
    cache = caches(ready(), sink_tokens=4, rotation=None, center_keys=False, backend=backend)[kind]
    old, new = (torch.randn(2, 2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (9, 12))
    for rows, remove in ((old, 7), (new, 0)):
        for layer in range(3):
            cache.update(rows, rows, layer)
        cache.crop(-remove)
    stored = cache.layers[1].keys[:, :, :14]
    expected = torch.cat([old[:, :, :2], fake_quantize(new)], dim=2)
    torch.testing.assert_close(stored, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["growing", "preallocated"])
def test_what_follows_a_prompt_that_was_cropped_to_padding_is_seen(kind: str, backend: str, checked: CheckedAttention):
    """Sequence 1 has lost all its tokens then: its first token comes next, where padding was."""
    model = ready()
    cache = caches(model, backend=backend)[kind]
    mask = torch.arange(30) >= torch.tensor([0, 12])[:, None]
    with torch.no_grad():
        model(random_ids(2, 30), attention_mask=mask.long(), past_key_values=cache)
        cache.crop(-25)
        mask = torch.nn.functional.pad(mask[:, :5], (0, 1), value=True)
        positions = torch.full((2, 1), 5)
        model(random_ids(2, 1, seed=1), attention_mask=mask.long(), position_ids=positions, past_key_values=cache)
    assert checked.compared == [30] * 3 + [1] * 3


def test_padding_whose_block_was_given_back_is_not_gone_back_to(backend: str):
    cache = PagedInt8Cache(ready().config, backend=backend)
    rows = torch.randn(2, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    cache._sequences.padding.leave(torch.arange(40) >= torch.tensor([0, 20])[:, None])
    for layer in cache.layers:
        keys: Any = cache.update(rows, rows, layer.index)[0]
    with pytest.raises(RuntimeError, match="cannot go back to 10 tokens: of sequence 1 only padding would be left"):
        cache.crop(-30)
    assert cache.get_seq_length() == 40
    assert keys.content.epoch == cache.layers[2].epoch
    cache.crop(-24)  # between two blocks
    assert cache.get_seq_length() == 16


@pytest.mark.parametrize("kind", ["growing", "preallocated"])
def test_they_follow_their_sequence(kind: str, backend: str, checked: CheckedAttention):
    model = ready()
    cache = caches(model, backend=backend)[kind]
    rows = torch.randn(4, 2, 20, 16, generator=torch.Generator().manual_seed(0))
    for layer in range(3):
        cache.update(rows, rows, layer)
    for order in ([3, 3, 0, 1], [2, 0, 1, 1]):
        cache.reorder_cache(torch.tensor(order))
        rows = rows[order]
        assert exact_tokens(cache, 2, rows) == [[0]] * 4
        with torch.no_grad():
            model(random_ids(4, 1), past_key_values=cache)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
    assert checked.compared == [1] * 3 * 2


@pytest.mark.parametrize("steps", [(5, 10, 1, 7), (1,) * 20, (15, 40), (3, 13, 3), (9, 30, 2)], ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (4, 9)], ids=["no_padding", "padding"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_short_first_prompts_are_centred_once_there_are_16_tokens(name: str, padding: tuple, steps: tuple[int, ...]):
    model = ready(name)
    if max(padding) >= steps[0]:
        padding = (0, 0)
    oracle: Any = FakeQuantizedCache(model.config, padding=padding)
    cache = PagedInt8Cache(model.config, backend="reference")
    ids = random_ids(2, sum(steps), seed=9)
    mask = torch.arange(sum(steps)) >= torch.tensor(padding)[:, None]
    logits = []
    for implementation, x in (("int8_paged", cache), ("eager", oracle)):
        model.set_attn_implementation(implementation)
        done = 0
        for n in steps:
            done += n
            with torch.no_grad():
                inputs = {"attention_mask": mask[:, :done].long(), "past_key_values": x}
                out = model(ids[:, done - n : done] * mask[:, done - n : done], **inputs)
        logits.append(out.logits[:, -1])
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=tipped_roundings(model))
    for layer, other in zip(cache.layers, oracle.layers):
        centre = torch.zeros(2, 16) if other.center is None else other.center
        torch.testing.assert_close(layer.storage.key_center, centre, rtol=1e-4, atol=1e-4)
    real_tokens = sum(steps) - min(padding)
    assert bool(cache.layers[0].storage.key_center.any()) == (real_tokens >= 16)


def test_other_implementations_keep_the_first_position():
    """They never show the cache a mask: with left padding what is kept is padding, and nobody sees it."""
    model = ready(implementation="eager")
    cache, oracle = PagedInt8Cache(model.config), FakeQuantizedCache(model.config)
    with torch.no_grad():
        logits = [
            model(
                random_ids(3, 1, seed=1),
                attention_mask=torch.nn.functional.pad(padded()["attention_mask"], (0, 1), value=1),
                past_key_values=x,
            ).logits
            for x in (cache, oracle)
            if model(**padded(), past_key_values=x) is not None
        ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)  # float32 in another order


@pytest.mark.parametrize("count", [-1, 17])
def test_impossible_numbers_are_refused(count: int):
    with pytest.raises(ValueError, match=f"sink_tokens must be between 0 and 16, got {count}"):
        PagedInt8Cache(ready().config, sink_tokens=count)
