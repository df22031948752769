"""A cache that was loaded in inference mode is used outside it, whatever its layers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_int8_paged import PagedInt8Cache

from .histories import HYBRIDS, KINDS, assert_same, model_called, step


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("gemma2", *HYBRIDS) for kind in KINDS if (name, kind) != ("falcon_h1", "preallocated")],
)
def test_what_was_loaded_in_inference_mode_goes_on_outside(name: str, kind: str, tmp_path: Path) -> None:
    model: Any = model_called(name)
    cache = PagedInt8Cache(model.config, **KINDS[kind])
    step(model, cache, 2, 37)
    cache.save(tmp_path / "cache")
    with torch.inference_mode():
        loaded = PagedInt8Cache.load(tmp_path / "cache", model.config)
    assert_same(loaded, cache)
    for tokens in (1, 20):
        assert torch.equal(step(model, loaded, 2, tokens), step(model, cache, 2, tokens))
    if name == "gemma2":  # recurrent states are written in place, which no gradient goes through
        model(torch.ones(2, 1, dtype=torch.long), past_key_values=loaded).logits.sum().backward()
