"""A default dtype other than float32, as a program that makes its models in bfloat16 sets it, changes no cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels import Tokens, alloc_paged_int8_layer
from tests.models import random_ids, tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "growing": {},
    "preallocated": {"max_batch_size": 2, "max_cache_len": 128},
}


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """For `torch.set_default_dtype`, when the test's model is there; taken back in any case."""
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@torch.no_grad()
def logits_of_steps(
    model: PreTrainedModel, backend: str, options: dict[str, Any], first: int, path: Path
) -> torch.Tensor:
    """Last rows' logits of a first prompt, a single token, chunks, and steps after rows changed places and a load."""
    cache = PagedInt8Cache(model.config, backend=backend, **options)
    ids, parts, start = random_ids(2, 100), [], 0
    for count in (first, 1, 20, 30, 1, 1):
        parts.append(model(ids[:, start : start + count], past_key_values=cache).logits[:, -1])
        start += count
        if count == 30:
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.save(path)
            cache = PagedInt8Cache.load(path, model.config, backend=backend)
    return torch.stack(parts)


@pytest.mark.parametrize("first", [3, 40])
@pytest.mark.parametrize(
    ("kind", "attention"), [("growing", "int8_paged"), ("growing", "eager"), ("preallocated", "int8_paged")]
)
def test_logits_are_those_under_float32(
    backend: str, attention: str, kind: str, first: int, default_dtype: torch.dtype, tmp_path: Path
) -> None:
    """A ``first`` of 3 tokens is too short to centre keys by: that happens later, over keys that are stored already."""
    model = tiny_model("llama")  # of float32
    model.set_attn_implementation(attention)
    arguments = model, backend, KINDS[kind], first, tmp_path / "cache"
    expected = logits_of_steps(*arguments)
    torch.set_default_dtype(default_dtype)
    assert torch.equal(logits_of_steps(*arguments), expected)


def test_scales_of_a_long_chunks_past_are_float32(default_dtype: torch.dtype) -> None:
    """Triton's kernel reads them by their address."""
    pytest.importorskip("triton")
    from hf_int8_paged.kernels.triton.long_chunks import packed_past

    storage = alloc_paged_int8_layer(3, 16, 2, 8, backend="reference", center_keys=True)
    for x in storage.segments[0]:
        x.fill_(1)
    table, counts = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 2], [1, -1]], [20, 16]))
    torch.set_default_dtype(default_dtype)
    past = packed_past(storage, Tokens.at(table, counts), None, 1)
    assert (past.k_units.dtype, past.v_units.dtype) == (torch.float32, torch.float32)
    assert past.k_units.tolist() == [[1, 1], [1, 1]]
