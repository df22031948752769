"""What the engine does with its own pages it does with int8 blocks: handlers, sharing, hard stops, offloading."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import offloading_manager
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from tests.processes import HANGS

from .alone import Steps, check_nothing_is_held, difference, run
from .models import batching_model, manager_for, prompts, random_ids

FULL, HYBRID = "llama: full attention", "gemma3: most layers windows"


@pytest.mark.parametrize("late", [False, True], ids=["named at once", "named after the last token"])
def test_a_handler_hears_of_its_request(late: bool) -> None:
    """Also of results that came before it was named, which transformers' own router keeps to itself."""
    model = batching_model(FULL)

    async def answered(manager: Any) -> list[int]:
        lengths: list[int] = []
        done = asyncio.get_running_loop().create_future()

        def hear(result: GenerationOutput) -> None:
            lengths.append(len(result.generated_tokens))
            if result.is_finished():
                done.set_result(result.status)

        name = manager.add_request(prompts(1)[0], max_new_tokens=3, streaming=True)
        while late and manager.output_router.output_queue.qsize() < 3:
            await asyncio.sleep(0.01)
        manager.register_result_handler(name, hear)
        assert await asyncio.wait_for(done, HANGS) == RequestStatus.FINISHED
        return lengths

    with manager_for(model) as manager:
        manager.start()
        lengths = asyncio.run(answered(manager))
        assert lengths == sorted(set(lengths))
        assert lengths[-1] == 3
        assert not late or lengths == [3]
        assert manager.output_router.output_queue.empty()
        manager.stop(keep_for_next_session=True)


@pytest.mark.parametrize(("architecture", "shares"), [(FULL, True), (HYBRID, False)])
def test_full_blocks_are_shared_by_content(architecture: str, shares: bool) -> None:
    """A prompt of 40 tokens and 32 new ones fill two blocks of 32; the same prompt finds the first one again. Models
    with windows share nothing, as in the engine's own cache."""
    model, prompt = batching_model(architecture), random_ids(40, seed=5).tolist()
    with manager_for(model, {"max_new_tokens": 32}, page_size=32) as manager:
        steps = Steps(manager.cache)
        assert manager.cache.use_prefix_sharing == shares
        outputs = []
        for again in (False, True):
            results, names = run(manager, [prompt])
            outputs.append(results[names[0]])
            hashed = sum(len(pages.ledger.hash_to_block) for pages in manager.cache.cache_allocators.values())
            assert hashed == (2 if shares else 0)
            assert steps.shared == (again and shares)
            check_nothing_is_held(manager.cache)
    for output in outputs:
        lives = steps.lives[output.request_id]
        assert difference(model, prompt, output, lives, manager).margin == 0


def test_equal_prompts_at_once_end_in_the_same_blocks() -> None:
    """Each fills blocks of its own, which are given back when their content is known to be the same."""
    model, prompt = batching_model(FULL), random_ids(64, seed=6).tolist()
    with manager_for(model, {"max_new_tokens": 40}, max_batch_tokens=256) as manager:
        steps, shared = Steps(manager.cache), []
        pages: Any = manager.cache.cache_allocators["full_attention"]
        mark = pages.mark_complete_blocks

        def marked(*args: Any) -> None:
            mark(*args)
            shared.append(max(pages.ledger.shared_ref_counts.values(), default=0))

        pages.mark_complete_blocks = marked
        results, names = run(manager, [prompt] * 4)
        assert max(shared) == 4
        check_nothing_is_held(manager.cache)
    assert len({tuple(results[name].generated_tokens) for name in names}) == 1
    assert difference(model, prompt, results[names[0]], steps.lives[names[0]], manager).margin == 0


def test_a_hard_stop_fails_what_is_left_and_the_next_session_works() -> None:
    model, asked = batching_model(FULL), prompts(6)
    with manager_for(model, {"max_new_tokens": 1000}, num_blocks=1000, allow_block_sharing=False) as manager:
        manager.start()
        manager.add_requests(asked)
        while getattr(manager, "current_batch", 0) < 5:
            time.sleep(0.001)
        manager.stop(hard_stop=True, keep_for_next_session=True)
        failed = [manager.output_router.output_queue.get(timeout=HANGS) for _ in asked]
        assert all(result.status == RequestStatus.FAILED for result in failed)
        check_nothing_is_held(manager.cache)
        manager.generation_config.max_new_tokens = 5
        steps = Steps(manager.cache)
        results, names = run(manager, asked)
    for prompt, name in zip(asked, names):
        assert difference(model, prompt, results[name], steps.lives[name], manager).margin == 0


@pytest.mark.parametrize("architecture", [FULL, HYBRID, "gemma2: softcap, half windows"])
def test_requests_are_moved_to_the_hosts_memory_and_back(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``cpu_offload_space`` a request that must make room keeps its tokens. The engine pins that memory, which
    needs an accelerator; here it is not pinned."""
    monkeypatch.setattr(offloading_manager.torch, "empty", _unpinned(torch.empty))
    model, asked = batching_model(architecture), prompts(32)
    with manager_for(model, num_blocks=24, safety_margin=0.0, cpu_offload_space=0.01) as manager:
        assert manager.batch_processor is not None
        offloading: Any = manager.batch_processor.offloading_manager
        moved: list[int] = []
        offload = offloading._offload_to_cpu
        monkeypatch.undo()
        offloading._offload_to_cpu = lambda *args: _counted(moved, offload(*args))
        steps = Steps(manager.cache)
        results, names = run(manager, asked)
        check_nothing_is_held(manager.cache)
    assert sum(moved) > 3
    assert steps.preempted == 0, "nobody begins anew"
    for prompt, name in zip(asked, names):
        assert difference(model, prompt, results[name], steps.lives[name], manager).margin == 0


def _unpinned(empty: Any) -> Any:
    return lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)


def _counted(moved: list[int], requests: set[str]) -> set[str]:
    moved.append(len(requests))
    return requests
