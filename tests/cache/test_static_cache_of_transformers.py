"""``int8_paged`` attention over a preallocated cache that is not ours."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from tests.models import random_ids, tiny_model


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_first_prompt_in_a_static_cache_sees_its_own_tokens(name: str) -> None:
    """`StaticCache` shows empty positions behind the prompt, and no mask says so."""
    model = tiny_model(name)
    ids = random_ids(2, 20)
    logits = {}
    for attention in ("eager", "int8_paged"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits[attention] = model(ids, past_key_values=StaticCache(model.config, max_cache_len=64)).logits
    # The same float32 numbers through another order of operations, over three or four layers.
    assert (logits["int8_paged"] - logits["eager"]).abs().max() <= 1e-5 * logits["eager"].abs().max()
