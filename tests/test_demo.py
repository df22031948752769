"""The demo's comparison: what it counts, what it refuses, and what it shows on a real model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.tools.demo import (
    Comparison,
    DemoError,
    _encode,
    common_prefix,
    compare,
    default_prompt,
    kv_bytes,
    load,
)
from tests.conftest import byte_tokenizer
from tests.models import FakeQuantizedCache

#: The tiny model's bytes per token: layers x KV heads x (K and V).
DENSE_BYTES, INT8_BYTES = 2 * 2 * 2 * 16 * 4, 2 * 2 * 2 * (16 + 2)
BLOCK = 16


@pytest.fixture
def tiny(tiny_model_folder: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval(), AutoTokenizer.from_pretrained(
        tiny_model_folder
    )


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [([], [1], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([5], [6], 0), ("ab", "ab", 2)],
)
def test_common_prefix_ends_at_the_first_difference_or_the_shorter_end(a, b, length):
    assert common_prefix(a, b) == length


def test_both_caches_generate_from_the_same_prompt_and_their_bytes_are_counted(tiny):
    model, tokenizer = tiny
    result = compare(model, tokenizer, "some text of odd length", max_new_tokens=19)
    held = result.prompt_tokens + 19 - 1  # the last token is never fed back
    blocks = -(-held // BLOCK)
    assert result.dynamic.bytes_in_use == result.dynamic.bytes_allocated == held * DENSE_BYTES
    assert result.int8.bytes_in_use == blocks * BLOCK * INT8_BYTES + DENSE_BYTES
    assert result.int8.bytes_allocated >= result.int8.bytes_in_use
    assert [len(run.tokens) for run in (result.dynamic, result.int8)] == [19, 19]
    assert (result.dynamic.attention, result.int8.attention) == ("sdpa", "int8_paged")
    assert 0 <= result.agreement <= 19
    assert json.loads(json.dumps(result.as_dict()))["int8"]["tokens"] == result.int8.tokens


def test_every_token_is_reported_and_the_model_is_left_as_it_was(tiny) -> None:
    model, tokenizer = tiny
    model.set_attn_implementation("eager")
    seen: list[str] = []
    compare(model, tokenizer, "text", 7, seen.append)
    assert seen == ["DynamicCache"] * 7 + ["PagedInt8Cache"] * 7
    assert model.config._attn_implementation == "eager"


def test_the_comparison_prints_nothing(tiny, capfd):
    model, tokenizer = tiny
    model.generation_config.temperature = 0.3  # transformers warns that greedy generation ignores it
    compare(model, tokenizer, "text", 3)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_single_token_has_no_time_per_token(tiny):
    result = compare(*tiny, "text", 1)
    assert result.dynamic.ms_per_token is None
    assert result.dynamic.first_token_ms > 0


def test_a_tokenizer_without_chat_template_gets_the_prompt_as_it_is(tiny):
    model, _ = tiny
    assert compare(model, byte_tokenizer(), "12345", 2).prompt_tokens == 5


@pytest.mark.parametrize(("prompt", "message"), [(" \n", "empty"), ("x" * 4096, "exceeds the model's 4096")])
def test_prompts_that_cannot_be_served_are_refused_before_anything_runs(tiny, prompt, message):
    with pytest.raises(DemoError, match=message):
        compare(*tiny, prompt, 8)


@pytest.mark.parametrize("device", ["cuda:77", "abacus"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(DemoError, match=device):
        load(None, device=device)


def test_dense_bytes_include_memory_that_a_view_keeps_alive():
    cache = DynamicCache()
    storage = torch.zeros(1, 2, 100, 8)
    cache.update(storage[:, :, :40], storage[:, :, :40], 0)
    cache.layers[0].keys = cache.layers[0].values = storage[:, :, :40]
    assert kv_bytes(cache) == (2 * storage.nbytes, 2 * storage[:, :, :40].nbytes)


def test_an_empty_int8_cache_has_no_bytes(tiny):
    assert kv_bytes(PagedInt8Cache(tiny[0].config)) == (0, 0)


def assert_almost_equally_likely(model, tokenizer, result: Comparison) -> None:
    """Where the texts part, the dense model must have been as undecided between both tokens as quantization explains.

    With the int8 cache its own token is at least as likely as the dense one's, so the dense logits of the two are no
    further apart than the int8 cache changes both of them together. Each change may be up to twice that of another
    rounding of the same keys and values, the fake-quantized cache's.
    """
    inputs = _encode(tokenizer, default_prompt())
    parting = result.agreement
    ids = torch.cat([inputs["input_ids"], torch.tensor([result.dynamic.tokens[:parting]])], dim=1)
    logits = []
    for kind in (DynamicCache, FakeQuantizedCache):
        cache = kind(config=model.config)
        with torch.no_grad():
            for chunk in ids.split([result.prompt_tokens, *[1] * parting], dim=1):
                last = model(chunk, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        logits.append(last)
    dense, quantized = logits
    off = float((quantized - dense).abs().max())
    assert off < 1, "of the order of what the other evaluations see"
    gap = float(dense[result.dynamic.tokens[parting]] - dense[result.int8.tokens[parting]])
    assert gap <= 4 * off, (result.dynamic.text, result.int8.text)


@pytest.mark.slow
def test_greedy_texts_of_the_demo_part_only_at_a_tie_at_a_quarter_of_the_bytes(demo_model):
    model, tokenizer = demo_model
    result = compare(model, tokenizer, default_prompt(), 64)
    assert result.prompt_tokens >= 500
    assert result.agreement >= 1, "the first token comes from a prompt in full precision"
    if result.agreement < 64:
        assert_almost_equally_likely(model, tokenizer, result)
    held = result.prompt_tokens + len(result.int8.tokens) - 1
    block_bytes = BLOCK * result.int8.bytes_in_use // (-(-held // BLOCK) * BLOCK)
    assert result.int8.bytes_in_use <= 0.27 * result.dynamic.bytes_in_use + block_bytes
