"""Long chunks over a past in blocks: the extend kernel against SDPA on a dequantized past. tests/kernels/test_triton.py
runs this file under TRITON_INTERPRET=1, and `make test-gpu` on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels.triton import backend as triton_backend
from hf_int8_paged.layer import PagedInt8Layer
from tests.kernels.conftest import on_the_device
from tests.kernels.helpers import device_of
from tests.models import random_ids, tiny_model, tipped_roundings

from .test_decoding_matrix import MODELS

pytestmark = on_the_device
DEVICE = device_of("triton")


def ready(name: str) -> Any:
    if name in MODELS:
        model_class, config_class, sizes = MODELS[name]
        torch.manual_seed(0)
        model: Any = model_class(config_class(**sizes)).eval()
    else:
        model = tiny_model(name, num_hidden_layers=2, head_dim=32)
    model.to(DEVICE)
    model.set_attn_implementation("int8_paged")
    return model


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Notes a call of the backend's ``gather``, or of its kernel for long chunks, ``launch_extend``."""
    calls: list[int] = []
    function = getattr(triton_backend, name)

    def counted(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    monkeypatch.setattr(triton_backend, name, counted)
    return calls


def chunk_logits(model: Any, turns: list[torch.Tensor], mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
    """Logits of the last turn."""
    cache, seen = PagedInt8Cache(model.config, backend="triton"), 0
    with torch.no_grad():
        for ids in turns:
            seen += ids.shape[1]
            logits = model(
                ids, past_key_values=cache, attention_mask=None if mask is None else mask[:, :seen], **options
            ).logits
    return logits


#: Full attention; windows; windows and softcap; windows and sinks.
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("padded", [None, slice(0, 19), slice(30, 37)], ids=["whole", "left_padding", "hole"])
def test_the_extend_kernel_computes_what_the_dense_route_computes(
    name: str, padded: slice | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ready(name)
    turns = [random_ids(2, n, seed=n).to(DEVICE) for n in (41, 35)]
    mask = None
    if padded is not None:
        mask = torch.ones(2, 76, dtype=torch.long, device=DEVICE)
        mask[0, padded] = 0
    extended, gathered = count_calls(monkeypatch, "launch_extend"), count_calls(monkeypatch, "gather")
    ours = chunk_logits(model, turns, mask)
    assert (len(extended), len(gathered)) == (2, 0)
    monkeypatch.setattr(PagedInt8Layer, "long_chunks", False)
    dense = chunk_logits(model, turns, mask)
    assert (len(extended), len(gathered)) == (2, 4)
    torch.testing.assert_close(ours, dense, rtol=0, atol=tipped_roundings(model))


def test_a_prompt_in_chunks_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = ready("mistral"), random_ids(2, 60, seed=4).to(DEVICE)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "prefill_chunk_size": 24}
    calls = count_calls(monkeypatch, "launch_extend")
    outputs = []
    for extends in (True, False):
        monkeypatch.setattr(PagedInt8Layer, "long_chunks", extends)
        outputs.append(model.generate(ids, past_key_values=PagedInt8Cache(model.config, backend="triton"), **options))
    assert torch.equal(*outputs)
    assert len(calls) == 2  # the second chunk in two layers; the first has no past, and the third is short


def test_masks_that_no_padding_explains_take_the_dense_route(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready("llama")
    calls = count_calls(monkeypatch, "launch_extend")
    prompt, chunk = (random_ids(1, n, seed=n).to(DEVICE) for n in (30, 20))
    cache = PagedInt8Cache(model.config, backend="triton")
    visible = torch.ones(1, 1, 20, 50, dtype=torch.bool, device=DEVICE).tril(30)
    visible[..., 10, 3] = False
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        model(chunk, past_key_values=cache, attention_mask=visible)
    assert not calls


def test_queries_that_learn_take_the_dense_route(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready("llama")
    calls = count_calls(monkeypatch, "launch_extend")
    cache = PagedInt8Cache(model.config, backend="triton")
    model(random_ids(1, 30, seed=1).to(DEVICE), past_key_values=cache)
    model.zero_grad()
    model(random_ids(1, 20, seed=2).to(DEVICE), past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert not calls
