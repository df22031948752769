"""SmolLM2-135M-Instruct: the acceptance criteria of the package on real weights and real text."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.tools.demo_model import load_demo_model
from tests.cache.test_generate import assert_like_oracle, logits_per_step

pytestmark = pytest.mark.slow

TEXT = (
    "The lighthouse at the end of the harbour wall was built in 1871, after three ships had been lost in one winter. "
    "Its keeper wrote down the weather every morning for forty years, and his notes are still in the town's library. "
    "Question: what did the keeper write down, and where are his notes today? Answer in two or three sentences. "
)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return load_demo_model()


def test_every_attention_implementation_generates_the_same_tokens(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    ids = tokenizer(TEXT * 3, return_tensors="pt").input_ids
    texts, caches = {}, {}
    for implementation in ("int8_paged", "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        caches[implementation] = PagedInt8Cache(model.config)
        texts[implementation] = model.generate(
            ids, past_key_values=caches[implementation], max_new_tokens=64, do_sample=False
        )
    assert torch.equal(texts["int8_paged"], texts["sdpa"])
    assert torch.equal(texts["int8_paged"], texts["eager"])


def test_logits_at_every_step_are_those_of_the_fake_quantized_model(model_and_tokenizer):
    """Thirty layers turn a few tipped roundings into other roundings everywhere. Two roundings of the same
    keys differ at most by the sum of what each changes."""
    model, tokenizer = model_and_tokenizer
    assert_like_oracle(model, tokenizer(TEXT, return_tensors="pt").input_ids, prompt=41, bound=2)


def test_distributions_stay_close_to_the_unquantized_model(model_and_tokenizer):
    """Mean KL divergence below fp8's in DESIGN.md (4.9e-3), an order of magnitude above what int8 shows there."""
    model, tokenizer = model_and_tokenizer
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    model.set_attn_implementation("sdpa")
    exact = logits_per_step(model, ids, 16, DynamicCache(config=model.config)).log_softmax(-1)
    model.set_attn_implementation("int8_paged")
    ours = logits_per_step(model, ids, 16, PagedInt8Cache(model.config)).log_softmax(-1)
    divergence = (exact.exp() * (exact - ours)).sum(-1)
    assert 0 < divergence.mean() < 4.9e-3
