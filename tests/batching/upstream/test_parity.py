"""Tokens of a batch are those of ``generate``: transformers' parity tests, with `PagedInt8Cache` as the cache of both.

Each prompt is one step of the batch here, as it is in ``generate``, so tokens are equal but for near ties: the rows of
a batch are added up in another order than those of a request alone.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from eval._centred_pool import CentredPool
from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.batching import PagedInt8BatchingManager, generate_batch, int8_batching, key_centers
from tests.models import tipped_roundings

from ..alone import logits_alone, run
from ..models import ARCHITECTURES, batching_model, manager_for, random_ids

LLAMA, HYBRID = "llama: full attention", "gemma3: most layers windows"


def alone(model: PreTrainedModel, prompt: list[int], new: int) -> Any:
    """What ``generate`` makes of one prompt, with its scores."""
    generation = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    cache = PagedInt8Cache(model.config, pool=CentredPool(key_centers(model)), sink_tokens=1)
    generate: Any = model.generate
    return generate(
        torch.tensor([prompt]),
        generation_config=generation,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_scores=True,
    )


def asked(count: int, longest: int = 60) -> list[list[int]]:
    """Prompts that begin differently, each shorter than a step has room for."""
    lengths = torch.randint(5, longest, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    return [random_ids(length, seed=100 + i).tolist() for i, length in enumerate(lengths)]


def check_equal_but_for_near_ties(manager: Any, prompts: list[list[int]], tokens: list[list[int]], new: int) -> None:
    model, parted = manager.model, 0
    # Two experts that are all but equally good: another one's output is no small difference.
    experts = getattr(model.config, "num_experts_per_tok", None) is not None
    for prompt, own in zip(prompts, tokens):
        expected = alone(model, prompt, new).sequences[0, len(prompt) :].tolist()
        assert len(own) == len(expected) == new
        at = next((i for i in range(new) if own[i] != expected[i]), None)
        if at is not None:
            steps = [0, *range(len(prompt), len(prompt) + at)]
            last = logits_alone(model, prompt + own[:at], steps, manager)[-1]
            assert experts or abs(float(last[own[at]] - last[expected[at]])) < tipped_roundings(model)
            parted += 1
    assert parted <= len(prompts) // 6


def served(manager: PagedInt8BatchingManager, prompts: list[list[int]]) -> list[list[int]]:
    results, names = run(manager, prompts)
    return [results[name].generated_tokens for name in names]


@pytest.mark.parametrize("shares", [False, True], ids=["nothing shared", "equal beginnings shared"])
@pytest.mark.parametrize("before", ["eager", "sdpa", "paged|sdpa", "int8_paged"])
def test_options_change_no_token_and_the_models_attention_comes_back(before: str, shares: bool) -> None:
    """Whatever attention the model had before, the engine's is the one for int8 blocks."""
    model, prompts = batching_model(LLAMA), asked(6)
    model.set_attn_implementation(before)
    before = model.config._attn_implementation  # some have a second name
    with manager_for(model, {"max_new_tokens": 20}, max_batch_tokens=512, allow_block_sharing=shares) as manager:
        assert model.config._attn_implementation == "int8_paged_batching"
        tokens = served(manager, prompts)
        assert model.config._attn_implementation == before
        model.set_attn_implementation("int8_paged")
        check_equal_but_for_near_ties(manager, prompts, tokens, 20)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in (LLAMA, HYBRID) else pytest.mark.slow) for name in ARCHITECTURES],
)
def test_every_architecture_goes_on_for_long(architecture: str) -> None:
    """80 tokens: past every window, and over the ends of several blocks."""
    model, prompts = batching_model(architecture), asked(6)
    with manager_for(model, {"max_new_tokens": 80}, max_batch_tokens=512) as manager:
        tokens = served(manager, prompts)
    check_equal_but_for_near_ties(manager, prompts, tokens, 80)


def test_prompts_around_the_window_cross_it_while_decoding_and_at_once() -> None:
    """The window is 20 tokens: a prompt just below it, one of its length, one above it, and a short one beside them."""
    model = batching_model(HYBRID)
    prompts = [random_ids(length, seed=length).tolist() for length in (5, 10, 18, 19, 20, 21, 22, 50)]
    with manager_for(model, {"max_new_tokens": 30}, max_batch_tokens=512) as manager:
        tokens = served(manager, prompts)
    check_equal_but_for_near_ties(manager, prompts, tokens, 30)


def test_log_probabilities_are_those_of_generate() -> None:
    model, prompts = batching_model(LLAMA), asked(6)
    with manager_for(model, {"max_new_tokens": 10}, max_batch_tokens=512) as manager:
        results, names = run(manager, prompts)
    compared = 0
    for prompt, name in zip(prompts, names):
        result, expected = results[name], alone(model, prompt, 10)
        if result.generated_tokens == expected.sequences[0, len(prompt) :].tolist():
            scores = torch.cat(list(expected.scores)).log_softmax(dim=-1)
            own = scores.gather(1, torch.tensor(result.generated_tokens)[:, None])[:, 0].tolist()
            assert result.logprobs == pytest.approx(own, abs=tipped_roundings(model))
            compared += 1
    assert compared >= 5


@pytest.mark.parametrize("shares", [False, True], ids=["forks copy blocks", "forks share blocks"])
def test_greedy_results_of_one_prompt_are_equal(shares: bool) -> None:
    model, prompts = batching_model(LLAMA), asked(3)
    options: dict[str, Any] = {"max_batch_tokens": 512, "allow_block_sharing": shares}
    with manager_for(model, {"max_new_tokens": 30}, **options) as manager:
        manager.num_return_sequences = 2
        results, names = run(manager, prompts, per_prompt=2)
    first = [results[name].generated_tokens for name in names]
    assert [results[f"{name}__child#0"].generated_tokens for name in names] == first
    assert all(len(tokens) == 30 for tokens in first)


def test_results_of_one_prompt_stand_together_in_the_order_of_the_prompts() -> None:
    model, prompts = batching_model(LLAMA), asked(3)
    generation = GenerationConfig(max_new_tokens=4, do_sample=True, eos_token_id=-1, num_return_sequences=3)
    results = generate_batch(model, prompts, generation, ContinuousBatchingConfig(num_blocks=60, page_size=16))
    assert [result.prompt_ids for result in results.values()] == [prompt for prompt in prompts for _ in range(3)]


def test_nothing_is_asked_of_accelerators_that_are_not_there() -> None:
    model: Any = batching_model(LLAMA)
    prompts = asked(2)
    generation = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1)
    with (
        patch("torch.cuda.is_available", return_value=False),
        patch("torch.xpu.is_available", return_value=False),
        patch("torch.backends.mps.is_available", return_value=False),
        int8_batching(model),
    ):
        results = model.generate_batch(prompts, generation, ContinuousBatchingConfig(num_blocks=60, page_size=16))
    assert [len(result.generated_tokens) for result in results.values()] == [5, 5]


def test_penalties_change_tokens_if_the_engine_keeps_them() -> None:
    """They need what was generated before. The engines of 5.18 to 5.24 drop them and say so; later ones apply them."""
    model, prompts = batching_model(LLAMA), asked(3)
    plain: list[list[int]] = []
    for penalty in (1.0, 5.0):
        with manager_for(model, {"repetition_penalty": penalty, "max_new_tokens": 20}) as manager:
            kept = [type(one).__name__ for one in manager.logit_processor.logits_processor]
            tokens = served(manager, prompts)
        if penalty == 1.0:
            plain = tokens
    dropped = "RepetitionPenaltyLogitsProcessor" not in kept
    assert dropped == (tokens == plain)
