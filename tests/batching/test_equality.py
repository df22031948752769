"""Every request of a batch gets the tokens that it gets alone, in the same steps, with a `PagedInt8Cache`."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cache.conftest import backend
from tests.models import tipped_roundings

from .alone import Steps, check_nothing_is_held, children, difference, run
from .models import ARCHITECTURES, batching_model, manager_for, prompts, random_ids

__all__ = ["backend"]

#: name -> options of the engine
ROOM: dict[str, dict[str, Any]] = {
    "room for all": {},
    "requests lose their blocks": {"num_blocks": 24, "safety_margin": 0.0},
    "prompts first": {"num_blocks": 30, "scheduler_type": "prefill_first"},
    "prompts longer than a window's ring in one step": {"max_batch_tokens": 1024},
    "nothing shared": {"allow_block_sharing": False, "page_size": 48},
}


@pytest.mark.parametrize(
    "room", [pytest.param(name, marks=pytest.mark.slow if i != 1 else ()) for i, name in enumerate(ROOM)]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_each_request_alone(architecture: str, room: str) -> None:
    """64 ragged requests, a third with common prefixes, prompts in several chunks; eight are cancelled on the way."""
    model, asked = batching_model(architecture), prompts(64)
    cancelled = range(5, 64, 8)
    with manager_for(model, **ROOM[room]) as manager:
        steps = Steps(manager.cache)
        results, names = run(manager, asked, cancelled=cancelled)
        check_nothing_is_held(manager.cache)
    assert steps.split > 10 or "in one step" in room, "prompts are computed in several steps"
    # Prompts that begin in the same step find no block of each other's that is full already.
    assert not manager.cache.use_prefix_sharing or steps.shared > 5 or "in one step" in room
    assert room != "requests lose their blocks" or steps.preempted > 0
    margins = []
    for i, (prompt, name) in enumerate(zip(asked, names)):
        if i not in cancelled:
            assert len(results[name].generated_tokens) == 10
            margins.append(difference(model, prompt, results[name], steps.lives[name], manager).margin)
    # A rounding that tips lets one of two tokens win that are all but equally likely.
    assert sum(margin > 0 for margin in margins) <= 2
    assert max(margins) < tipped_roundings(model)


@pytest.mark.parametrize("architecture", ["llama: full attention", "gemma2: softcap, half windows"])
def test_forks_share_blocks_and_go_their_own_ways(architecture: str) -> None:
    """Sampled tokens of forks have the probabilities that they have alone."""
    model, asked = batching_model(architecture), prompts(16)
    with manager_for(model, {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 25}) as manager:
        steps = Steps(manager.cache)
        results, names = run(manager, asked, per_prompt=3)
        check_nothing_is_held(manager.cache)
    assert steps.forked == 32
    texts = {tuple(result.generated_tokens) for result in results.values()}
    assert len(texts) > 40, "forks sample other tokens than their parents"
    most = tipped_roundings(model)
    for prompt, name in zip(asked, names):
        for own in (name + child for child in children(3)):
            assert difference(model, prompt, results[own], steps.lives[own], manager).logprob < most


@pytest.mark.parametrize("architecture", ["llama: full attention", "gemma2: softcap, half windows"])
@pytest.mark.parametrize("company", [0, 3], ids=["alone", "in company"])
def test_prompts_of_one_token_are_forked_before_their_first_row(architecture: str, company: int) -> None:
    """The engine gives them no row in the step after which it forks them, and maybe nobody else has one in it."""
    model, asked = batching_model(architecture), [[7], *prompts(company), [8]]
    with manager_for(model, {"do_sample": True, "num_return_sequences": 3}) as manager:
        steps = Steps(manager.cache)
        results, names = run(manager, asked, per_prompt=3)
        check_nothing_is_held(manager.cache)
    assert steps.forked == 2 * len(asked)
    for prompt, name in zip(asked, names):
        for own in (name + child for child in children(3)):
            assert len(results[own].generated_tokens) == 10
            found = difference(model, prompt, results[own], steps.lives[own], manager)
            assert found.logprob < tipped_roundings(model)


@pytest.mark.parametrize("company", [0, 3], ids=["alone", "in company"])
def test_a_prompt_of_which_one_token_is_not_in_the_blocks_is_forked_before_it(company: int) -> None:
    """Its other tokens are found where the first one with the same beginning has left them."""
    model, prompt = batching_model("llama: full attention"), random_ids(33, seed=5).tolist()
    with manager_for(model, {"do_sample": True, "num_return_sequences": 2}) as manager:
        steps, asked = Steps(manager.cache), [prompt, *prompts(company)]
        run(manager, [prompt], per_prompt=2)
        results, names = run(manager, asked, per_prompt=2)
        check_nothing_is_held(manager.cache)
    for own in (names[0] + child for child in children(2)):
        assert steps.lives[own][0].steps[:2] == [0, 32]
        found = difference(model, prompt, results[own], steps.lives[own], manager)
        assert found.logprob < tipped_roundings(model)


@pytest.mark.parametrize("architecture", ["llama: full attention", "gpt_oss: sink logits, half windows, experts"])
def test_every_backend_serves_a_batch(architecture: str, backend: str) -> None:
    model, asked = batching_model(architecture), prompts(6)
    with manager_for(model, {"max_new_tokens": 4}, backend=backend) as manager:
        steps = Steps(manager.cache)
        results, names = run(manager, asked)
        allocators: Any = manager.cache.cache_allocators.values()
        used = {storage.backend for pages in allocators for storage in pages.storages.values()}
        assert used == {backend}
    for prompt, name in zip(asked, names):
        assert difference(model, prompt, results[name], steps.lives[name], manager).margin == 0


@pytest.mark.parametrize("options", [{"rotation": None}, {"sink_tokens": 0}, {"centers": {}}], ids=str)
def test_conditioning_is_optional(options: dict[str, Any]) -> None:
    """Tokens are those of a `PagedInt8Cache` with the same options."""
    model, asked = batching_model("llama: full attention"), prompts(8)
    with manager_for(model, **options) as manager:
        steps = Steps(manager.cache)
        results, names = run(manager, asked)
    for prompt, name in zip(asked, names):
        assert difference(model, prompt, results[name], steps.lives[name], manager).margin == 0
