"""Gradients: none through what the cache has stored, and the usual ones where nothing was stored in between."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset
from transformers import DynamicCache, Trainer, TrainingArguments

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.seam import once
from tests.models import random_ids, tiny_model

from .test_decoding_matrix import model_of


def gradients(model, cache):
    model.zero_grad()
    ids = random_ids(2, 21)
    model(ids, past_key_values=cache, labels=ids).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("implementation", ["int8_paged", "sdpa", "eager"])
def test_a_first_prompt_has_the_gradients_of_the_dense_cache(implementation, monkeypatch, caplog):
    """It attends to its own keys in full precision. The cache says once that what it stores has no gradient."""
    monkeypatch.setattr(once, "_said", set())
    model = tiny_model("llama")
    expected = gradients(model, DynamicCache(config=model.config))
    model.set_attn_implementation(implementation)
    cache = PagedInt8Cache(model.config)
    with caplog.at_level(logging.WARNING, logger="hf_int8_paged"):
        ours = gradients(model, cache)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    assert [r.getMessage() for r in caplog.records if "without gradient" in r.getMessage()] == [caplog.messages[0]]
    # A next token is computed from what is stored: its loss has a gradient, but none that reaches the prompt's keys.
    logits = model(random_ids(2, 1, seed=3), past_key_values=cache).logits
    assert logits.requires_grad
    assert not cache.layers[0].keys.clone().requires_grad


def after_a_prompt(model, implementation: str, batch: int, **options: Any) -> PagedInt8Cache:
    """A cache with a prompt of 30 tokens in it, and a model without gradients."""
    model.set_attn_implementation(implementation)
    cache = PagedInt8Cache(model.config, backend="reference", **options)
    with torch.no_grad():
        model(random_ids(batch, 30), past_key_values=cache)
    model.zero_grad()
    return cache


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17])
@pytest.mark.parametrize("options", [{}, {"max_batch_size": 2, "max_cache_len": 64}], ids=["growing", "preallocated"])
def test_a_later_step_has_the_gradients_of_dense_attention(name: str, tokens: int, options: dict[str, Any]):
    """In one layer, whose stored keys are the same whatever attention computes, and with the exact backend."""
    if name == "gpt_oss":
        model = model_of(name, num_hidden_layers=1, layer_types=["sliding_attention"])
    else:
        model = tiny_model(name, num_hidden_layers=1)
    found = {}
    for implementation in ("eager", "int8_paged"):
        cache = after_a_prompt(model, implementation, 2, **options)
        ids = random_ids(2, tokens, seed=3)
        model(ids, past_key_values=cache).logits.logsumexp(-1).mean().backward()
        found[implementation] = {k: x.grad for k, x in model.named_parameters() if x.grad is not None}
    assert found["int8_paged"].keys() == found["eager"].keys()
    assert any(name.endswith("q_proj.weight") for name in found["eager"])
    for parameter, expected in found["eager"].items():
        atol = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(found["int8_paged"][parameter], expected, rtol=0, atol=atol, msg=parameter)


@pytest.mark.parametrize("options", [{}, {"max_batch_size": 1, "max_cache_len": 256}], ids=["growing", "preallocated"])
def test_gradients_are_those_of_what_a_step_has_read(options: dict[str, Any]):
    """Whatever the cache has let go since: a window moves on, and the cache is reset before the backward pass."""
    model, found = tiny_model("mistral", num_hidden_layers=1), []
    for implementation in ("eager", "int8_paged"):
        cache = after_a_prompt(model, implementation, 1, **options)
        steps = random_ids(1, 120, seed=3).split(1, dim=1)
        loss: Any = sum(model(ids, past_key_values=cache).logits.logsumexp(-1).mean() for ids in steps)
        cache.reset()
        loss.backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5 * float(found[0].abs().max()))


def test_a_compiled_step_has_the_same_gradients():
    model, found = tiny_model("llama", num_hidden_layers=1), []
    for forward in (model.forward, torch.compile(model.forward, backend="aot_eager")):
        cache = after_a_prompt(model, "int8_paged", 2, max_batch_size=2, max_cache_len=64)
        forward(random_ids(2, 1, seed=3), past_key_values=cache).logits.logsumexp(-1).mean().backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5 * float(found[0].abs().max()))


def test_gradient_checkpointing_leaves_the_cache_empty():
    """transformers says so, and goes on without a cache."""
    model = tiny_model("llama")
    model.gradient_checkpointing_enable()
    model.train()
    cache = PagedInt8Cache(model.config)
    assert all(gradient.isfinite().all() for gradient in gradients(model, cache))
    assert cache.get_seq_length() == 0
    assert cache.nbytes_allocated == 0


@pytest.mark.parametrize("implementation", ["int8_paged", "sdpa"])
def test_a_trainer_trains_and_evaluates(implementation: str, tmp_path: Path):
    """It hands ``num_items_in_batch``, a tensor, to ``forward``, which carries it along to the attention function."""
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    ids = random_ids(4, 12)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True),
        train_dataset=TensorDataset(ids),
        eval_dataset=TensorDataset(ids),
        data_collator=lambda rows: {name: torch.stack([ids for (ids,) in rows]) for name in ("input_ids", "labels")},
    )
    before = model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    assert trainer.train().global_step == 1
    assert not torch.equal(model.model.layers[0].self_attn.k_proj.weight, before)
    assert trainer.evaluate()["eval_loss"] > 0
