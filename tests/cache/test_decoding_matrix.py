"""Decoding modes of `generate` times kinds of models: the fake-quantized dense cache's tokens, one for one, in float32.

Under eager attention both compute the same numbers. Under ``int8_paged`` the reference kernels do: the native ones
round otherwise, which may tip a choice between two tokens of almost equal probability. So with those not tokens are
compared but, in every step and layer, what they come from: stored keys and values, and attention over them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_int8_paged import PagedInt8Cache
from tests.models import VOCABULARY, FakeQuantizedCache, random_ids

from .conftest import BACKENDS
from .shadowed_cache import ShadowedCache
from .two_readers import CheckedAttention

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, SIZES),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, SIZES | MIXED),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, SIZES | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        SIZES | EXPERTS | LINEAR | {"num_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config,
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        | {"initializer_factor": 4.0, "decoder_start_token_id": 1, "eos_token_id": None, "pad_token_id": 0},
    ),
}
BEAMS = {"num_beams": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": BEAMS,
    "beam_sampling": BEAMS | {"do_sample": True},
    "several_beams_returned": BEAMS | {"num_return_sequences": 2},
    "several_samples_returned": {"do_sample": True, "num_return_sequences": 3},
    "prompt_lookup": {"prompt_lookup_num_tokens": 4},
    "chunked_prefill": {"prefill_chunk_size": 24},
}
MODES = [*OPTIONS, "assisted", "multi_turn", "prefix_copied", "left_padded", "contrastive_operations"]
#: What transformers cannot do with `DynamicCache` either, and what its error says.
NOT_WITH_DYNAMIC_CACHE = {
    ("qwen3_next", "prompt_lookup"): "not supported with stateful models",
    ("qwen3_next", "assisted"): "not supported with stateful models",
    ("qwen3_next", "contrastive_operations"): "has no (attribute 'batch_|batch_)repeat_interleave",
}
#: Another encoder input would not reach a cross-attention cache that is filled.
MEANINGLESS = [("t5", "multi_turn"), ("t5", "prefix_copied")]
CASES = [(name, mode) for name in MODELS for mode in MODES if (name, mode) not in MEANINGLESS]


#: Of the mode ``left_padded``: tokens in front of each sequence.
PADDING = (0, 23)


def model_of(name: str, **changes: Any) -> PreTrainedModel:
    model_class, config_class, sizes = MODELS[name]
    torch.manual_seed(0)
    return model_class(config_class(**sizes | changes)).eval()


def cache_of(kind: type, model: PreTrainedModel, **options: Any) -> Cache:
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(*(kind(config=model.config, **options) for _ in range(2)))
    return kind(config=model.config, **options)


def decode(model: PreTrainedModel, mode: str, new_cache: Callable[[], Cache]) -> torch.Tensor:
    """Tokens of one mode, ``[sequences, tokens]``."""
    ids, cache = random_ids(2, 45, seed=6), new_cache()

    def generate(ids: torch.Tensor, cache: Cache, **options: Any) -> torch.Tensor:
        torch.manual_seed(11)
        common = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "attention_mask": (ids != 0).long()}
        return model.generate(ids, past_key_values=cache, **common | options)  # type: ignore[operator]

    if mode in ("prompt_lookup", "assisted"):
        ids = torch.cat([ids[:1, :15]] * 3, dim=1)  # so that the past foretells the future
    if mode == "assisted":
        draft = copy.deepcopy(model)
        with torch.no_grad():
            for weight in draft.parameters():  # often of the model's opinion, not always
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
                weight.add_(0.1 * weight.square().mean().sqrt() * noise)
        return generate(ids, cache, assistant_model=draft)
    if mode == "multi_turn":
        for turn in (7, 1, 30):
            ids = generate(torch.cat([ids, random_ids(2, turn, seed=turn)], dim=1), cache)
        return ids
    if mode == "prefix_copied":
        with torch.no_grad():
            model(ids, past_key_values=cache)
        branches = [torch.cat([ids, random_ids(2, n, seed=n)], dim=1) for n in (9, 18)]
        return torch.cat([generate(branch, copy.deepcopy(cache))[:, -20:] for branch in branches])
    if mode == "left_padded":
        ids[1, : PADDING[1]] = 0
        return generate(ids, cache)
    if mode == "contrastive_operations":
        return by_hand(model, ids, cache)
    return generate(ids, cache, **OPTIONS[mode])


@torch.no_grad()
def by_hand(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Two candidates per sequence and step, the second of which is kept: contrastive search's cache operations."""
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        encoded = model.get_encoder()(ids)
        inputs = {"encoder_outputs": encoded, "decoder_input_ids": ids[:, :1]}
    logits = model(**inputs, past_key_values=cache).logits[:, -1]
    tokens = []
    for _ in range(20):
        candidates = logits.topk(2, dim=-1).indices.flatten()[:, None]
        cache.batch_repeat_interleave(2)
        step = {"input_ids": candidates}
        if model.config.is_encoder_decoder:
            twice = encoded.last_hidden_state.repeat_interleave(2, 0)
            step = {"encoder_outputs": (twice,), "decoder_input_ids": candidates}
        both = model(**step, past_key_values=cache).logits[:, -1]
        cache.batch_select_indices(torch.tensor([1, 3]))
        logits = both[[1, 3]]
        tokens.append(candidates[[1, 3]])
    return torch.cat(tokens, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), CASES, ids=[f"{name}-{mode}" for name, mode in CASES])
def test_tokens_are_those_of_the_fake_quantized_dense_cache(name: str, mode: str) -> None:
    model = model_of(name)
    model.set_attn_implementation("eager")
    if (name, mode) in NOT_WITH_DYNAMIC_CACHE:
        for kind in (DynamicCache, PagedInt8Cache):
            with pytest.raises(Exception, match=NOT_WITH_DYNAMIC_CACHE[name, mode]):
                decode(model, mode, functools.partial(cache_of, kind, model))
        return
    expected = decode(model, mode, lambda: cache_of(FakeQuantizedCache, model))
    assert torch.equal(decode(model, mode, lambda: cache_of(PagedInt8Cache, model)), expected)
    if mode == "left_padded" and not model.config.is_encoder_decoder:
        # Its mask shows the cache what is padding.
        expected = decode(model, mode, lambda: cache_of(FakeQuantizedCache, model, padding=PADDING))
    model.set_attn_implementation("int8_paged")
    assert torch.equal(decode(model, mode, lambda: cache_of(PagedInt8Cache, model, backend="reference")), expected)


#: The interpreter needs seconds for each.
OF_TRITON = [("llama", "beams"), ("gemma3", "left_padded")]
STEP_CASES = [
    (backend, *case)
    for backend in BACKENDS
    for case in (OF_TRITON if backend == "triton" else CASES)
    if backend != "reference" and case not in NOT_WITH_DYNAMIC_CACHE
]


@pytest.mark.parametrize(("backend", "name", "mode"), STEP_CASES, ids=["-".join(case) for case in STEP_CASES])
def test_every_step_is_right_before_a_rounding_can_tip(
    backend: str, name: str, mode: str, checked: CheckedAttention
) -> None:
    """In each layer and step both readers see the same, and what is stored is what the oracle stores of these rows."""
    model = model_of(name)
    model.set_attn_implementation("int8_paged")
    padding = PADDING if mode == "left_padded" and not model.config.is_encoder_decoder else ()
    decode(model, mode, lambda: cache_of(ShadowedCache, model, backend=backend, padding=padding))
    if model.get_decoder().config._attn_implementation != "int8_paged":
        # In 5.18 T5 keeps the name from its decoder, which reads dense views; what is stored has been compared.
        assert (model.config.model_type, checked.compared) == ("t5", [])
        return
    # Rows of two layers; drafted tokens may all be accepted in the first forward pass.
    assert sum(checked.compared) >= 2 * 20


@pytest.mark.parametrize("implementation", ["int8_paged", "sdpa", "eager"])
@pytest.mark.parametrize("which", ["decoder", "both"])
def test_a_position_bias_over_a_preallocated_cache(which: str, implementation: str) -> None:
    """T5's bias has a column for every position that there is room for. Nothing masks positions without a token in
    cross attention, of which int8_paged alone knows."""
    model, ids = model_of("t5"), random_ids(2, 37, seed=6)
    model.set_attn_implementation(implementation)
    room: dict[str, Any] = {"max_batch_size": 2, "max_cache_len": 40}
    # In 5.18 T5 keeps the name from its decoder, which reads dense views.
    knows = model.get_decoder().config._attn_implementation == "int8_paged"
    of_cross = {} if which == "decoder" else room if knows else room | {"max_cache_len": 37}
    tokens = []
    for options in (({}, {}), (room, of_cross)):
        cache = EncoderDecoderCache(*(PagedInt8Cache(model.config, backend="reference", **x) for x in options))
        options_of_generate = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        tokens.append(model.generate(ids, past_key_values=cache, **options_of_generate))  # type: ignore[operator]
    assert torch.equal(*tokens)
