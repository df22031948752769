"""Long chunks over a past in blocks: a backend's kernel for them against SDPA on a dequantized past. What imports these
tests says which backend it is, in a fixture `kernel`: test_long_chunks.py and triton_long_chunks.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels import load_backend
from hf_int8_paged.layer import PagedInt8Layer
from tests.kernels.helpers import device_of
from tests.models import random_ids, tiny_model, tipped_roundings

from .test_decoding_matrix import MODELS


class Kernel(NamedTuple):
    """A backend, and the function of its own that every long chunk passes."""

    backend: str
    owner: Any
    function: str

    @property
    def device(self) -> torch.device:
        return device_of(self.backend)


def ready(name: str, kernel: Kernel) -> Any:
    if name in MODELS:
        model_class, config_class, sizes = MODELS[name]
        torch.manual_seed(0)
        model: Any = model_class(config_class(**sizes)).eval()
    else:
        model = tiny_model(name, num_hidden_layers=2, head_dim=32)
    model.to(kernel.device)
    model.set_attn_implementation("int8_paged")
    return model


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[int]:
    """Notes every call of a function."""
    calls: list[int] = []
    function = getattr(owner, name)

    def counted(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls


def chunk_logits(model: Any, kernel: Kernel, turns: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
    """Logits of the last turn."""
    cache, seen = PagedInt8Cache(model.config, backend=kernel.backend), 0
    with torch.no_grad():
        for ids in turns:
            seen += ids.shape[1]
            own = None if mask is None else mask[:, :seen]
            logits = model(ids, past_key_values=cache, attention_mask=own).logits
    return logits


#: Full attention; windows; windows and softcap; windows and sinks.
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("padded", [None, slice(0, 19), slice(30, 37)], ids=["whole", "left_padding", "hole"])
def test_the_kernel_computes_what_the_dense_route_computes(
    kernel: Kernel, name: str, padded: slice | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ready(name, kernel)
    turns = [random_ids(2, n, seed=n).to(kernel.device) for n in (41, 35)]
    mask = None
    if padded is not None:
        mask = torch.ones(2, 76, dtype=torch.long, device=kernel.device)
        mask[0, padded] = 0
    extended = count_calls(monkeypatch, kernel.owner, kernel.function)
    gathered = count_calls(monkeypatch, load_backend(kernel.backend), "gather")
    ours = chunk_logits(model, kernel, turns, mask)
    assert (len(extended), len(gathered)) == (2, 0)
    monkeypatch.setattr(PagedInt8Layer, "long_chunks", False)
    dense = chunk_logits(model, kernel, turns, mask)
    assert (len(extended), len(gathered)) == (2, 4)
    torch.testing.assert_close(ours, dense, rtol=0, atol=tipped_roundings(model))


def test_a_prompt_in_chunks_gives_the_same_tokens(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = ready("mistral", kernel), random_ids(2, 50, seed=4).to(kernel.device)
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "prefill_chunk_size": 24}
    calls = count_calls(monkeypatch, kernel.owner, kernel.function)
    outputs = []
    for extends in (True, False):
        monkeypatch.setattr(PagedInt8Layer, "long_chunks", extends)
        outputs.append(
            model.generate(ids, past_key_values=PagedInt8Cache(model.config, backend=kernel.backend), **options)
        )
    assert torch.equal(*outputs)
    assert len(calls) == 2  # the second chunk in two layers; the first has no past, and the third is short


def test_masks_that_no_padding_explains_take_the_dense_route(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready("llama", kernel)
    calls = count_calls(monkeypatch, kernel.owner, kernel.function)
    prompt, chunk = (random_ids(1, n, seed=n).to(kernel.device) for n in (30, 20))
    cache = PagedInt8Cache(model.config, backend=kernel.backend)
    visible = torch.ones(1, 1, 20, 50, dtype=torch.bool, device=kernel.device).tril(30)
    visible[..., 10, 3] = False
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        model(chunk, past_key_values=cache, attention_mask=visible)
    assert not calls


def test_queries_that_learn_take_the_dense_route(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready("llama", kernel)
    calls = count_calls(monkeypatch, kernel.owner, kernel.function)
    cache = PagedInt8Cache(model.config, backend=kernel.backend)
    model(random_ids(1, 30, seed=1).to(kernel.device), past_key_values=cache)
    model.zero_grad()
    model(random_ids(1, 20, seed=2).to(kernel.device), past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert not calls
