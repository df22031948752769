"""What tests of prompt stores do with prompts."""

from __future__ import annotations

from typing import Any

import torch

from hf_int8_paged import PagedInt8Cache, PromptStore
from hf_int8_paged.cache_argument import CACHE_ARGUMENT


@torch.no_grad()
def feed(model: Any, cache: PagedInt8Cache, ids: torch.Tensor, known: int = 0, **inputs: Any) -> torch.Tensor:
    """The rest of a prompt; logits."""
    return model(ids[:, known:], **{CACHE_ARGUMENT: cache}, **inputs).logits


def stored(store: PromptStore, model: Any, ids: torch.Tensor, **names: Any) -> PagedInt8Cache:
    """Compute a prompt and store it."""
    cache = PagedInt8Cache(model.config)
    feed(model, cache, ids)
    store.put(cache, ids, model, **names)
    return cache
