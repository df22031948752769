"""Generation on a CPU through the C kernels: that they are what runs, and that threads do not disturb each other."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels import load_backend, why_unavailable
from hf_int8_paged.seam.views import PagedView
from tests.models import TINY, random_ids, tiny_model

from .shadowed_cache import ShadowedCache
from .two_readers import CheckedAttention

if why_unavailable("cpu", torch.device("cpu")) is not None:
    pytest.skip("no C compiler, so no C kernels", allow_module_level=True)

NEW_TOKENS = 12


def generate(model, ids, cache, tokens=NEW_TOKENS):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=tokens, do_sample=False
    ).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TINY)
def test_the_c_kernels_serve_every_decode_step(name, dtype, monkeypatch):
    model = tiny_model(name).to(dtype)
    model.set_attn_implementation("int8_paged")
    backend, calls, dense_reads = load_backend("cpu"), [], []
    attend, gather = backend.attend, backend.gather
    monkeypatch.setattr(backend, "attend", lambda *args: calls.append(args[1].shape[2]) or attend(*args))
    monkeypatch.setattr(backend, "gather", lambda *args: dense_reads.append(args[2:4]) or gather(*args))
    monkeypatch.setattr(PagedView, "readable", lambda self: pytest.fail("an operation read the dense keys"))
    cache = PagedInt8Cache(model.config)
    generate(model, random_ids(2, 37), cache)
    layers = model.config.num_hidden_layers
    # The first new token comes from the prompt's own pass, which reads no blocks.
    assert calls == [1] * layers * (NEW_TOKENS - 1)
    assert not dense_reads
    assert {layer.storage.backend for layer in cache.layers} == {"cpu"}


@pytest.mark.parametrize("seed", range(12))
def test_beams_of_several_prompts_read_their_own_first_tokens(seed: int, checked: CheckedAttention) -> None:
    """Four prompts, four beams, which are reordered at every step: every layer of every step by two readers."""
    model = tiny_model("llama")
    model.set_attn_implementation("int8_paged")
    cache = ShadowedCache(model.config, backend="cpu")
    options = {"num_beams": 4, "num_return_sequences": 1 + seed % 4, "max_new_tokens": 12, "do_sample": False}
    generate: Any = model.generate
    generate(random_ids(4, 20, seed=seed), past_key_values=cache, **options)
    # The prompt's own pass is one, too.
    assert checked.compared == [20] * 3 + [1] * 3 * 11
    assert cache.comparisons == 2 * 3 * 12  # keys and values


def test_two_threads_generate_what_they_generate_alone():
    model = tiny_model("llama")
    model.set_attn_implementation("int8_paged")
    prompts = [random_ids(2, 70, seed=1), random_ids(1, 33, seed=2)]
    alone = [generate(model, ids, PagedInt8Cache(model.config), 60) for ids in prompts]
    assert alone[0] != alone[1]
    together: list[list] = [[], []]
    barrier = threading.Barrier(2)

    def work(i: int) -> None:
        for _ in range(5):
            barrier.wait()
            together[i].append(generate(model, prompts[i], PagedInt8Cache(model.config), 60))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [[alone[0]] * 5, [alone[1]] * 5]
