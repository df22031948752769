"""What a request's results are and where they go: snapshots, streams that begin anew, handlers, seeds, settings."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from hf_int8_paged.batching.router import Router
from tests.processes import HANGS

from ..alone import Steps, check_nothing_is_held
from ..models import batching_model, manager_for, prompts, random_ids

LLAMA = "llama: full attention"


def test_results_are_snapshots() -> None:
    """What a client has got does not change while its request goes on."""
    with manager_for(batching_model(LLAMA)) as manager:
        manager.start()
        name = manager.add_request(prompts(1)[0], max_new_tokens=6, streaming=True, record_timestamps=True)
        assert name is not None
        results = list(manager.request_id_iter(name))
        manager.stop(keep_for_next_session=True)
    last = results[-1]
    assert last.timestamps is not None
    for count, result in enumerate(results, 1):
        assert result.generated_tokens == last.generated_tokens[:count]
        assert result.logprobs == last.logprobs[:count]
        assert result.timestamps == last.timestamps[:count]
    assert len(results) == 6


def test_a_stream_goes_on_where_it_was_when_its_request_begins_anew() -> None:
    """Requests that lose their blocks are computed again. Their streams repeat, lose and add nothing."""
    asked = prompts(12)
    with manager_for(batching_model(LLAMA), num_blocks=20, safety_margin=0.0) as manager:
        steps = Steps(manager.cache)
        manager.start()
        names = manager.add_requests(asked, max_new_tokens=30, streaming=True)
        streams: dict[str, list[GenerationOutput]] = {name: [] for name in names}
        while not all(stream and stream[-1].is_finished() for stream in streams.values()):
            result = manager.get_result(timeout=HANGS)
            assert result is not None
            streams[result.request_id].append(result)
        manager.stop(keep_for_next_session=True)
        check_nothing_is_held(manager.cache)
    assert steps.preempted > 3
    for prompt, name in zip(asked, names):
        whole = streams[name][-1]
        assert [len(result.generated_tokens) for result in streams[name]] == list(range(1, 31))
        assert all(r.generated_tokens == whole.generated_tokens[: len(r.generated_tokens)] for r in streams[name])
        assert all(result.prompt_ids == prompt for result in streams[name])
        assert len(whole.logprobs) == 30


@pytest.mark.parametrize("kinds", [(True,), (False,), (False, True)], ids=["streamed", "whole", "one after the other"])
def test_a_stream_has_every_length_and_a_whole_answer_one(kinds: tuple[bool, ...]) -> None:
    with manager_for(batching_model(LLAMA)) as manager:
        manager.start()
        for streaming in kinds:
            name = manager.add_request(prompts(1)[0], max_new_tokens=3, streaming=streaming)
            assert name is not None
            lengths = [len(result.generated_tokens) for result in manager.request_id_iter(name)]
            assert lengths == ([1, 2, 3] if streaming else [3])
        manager.stop(keep_for_next_session=True)


def output(name: str, status: RequestStatus = RequestStatus.DECODING) -> GenerationOutput:
    return GenerationOutput(request_id=name, status=status)


@pytest.mark.parametrize("many", [False, True], ids=["one by one", "all at once"])
def test_results_without_a_handler_wait_in_the_queue(many: bool) -> None:
    router = Router()
    given = [output("a", RequestStatus.FINISHED), output("b")]
    if many:
        router.deliver_batch(given)
    else:
        for result in given:
            router.deliver(result)
    assert [router.output_queue.get_nowait() for _ in given] == given
    assert router.output_queue.empty()


@pytest.mark.parametrize("many", [False, True], ids=["one by one", "all at once"])
def test_results_with_a_handler_go_to_its_own_loop(many: bool) -> None:
    """Handlers may live in several loops; transformers' own router gives a batch of results to the last one's."""
    router, loops, heard = Router(), {name: Mock() for name in "ab"}, {name: Mock() for name in "ab"}
    for name in "ab":
        router.result_handlers[name] = (heard[name], loops[name])
    given = [output(name) for name in "abc"]
    if many:
        router.deliver_batch(given)
    else:
        for result in given:
            router.deliver(result)
    for result, name in zip(given, "ab"):
        loops[name].call_soon_threadsafe.assert_called_once_with(heard[name], result)
        heard[name].assert_not_called()
    assert router.output_queue.get_nowait() is given[2]
    assert router.output_queue.empty()


def test_a_handler_hears_every_token_and_is_gone_afterwards() -> None:
    async def lengths_of(manager: Any) -> list[int]:
        lengths: list[int] = []
        done = asyncio.get_running_loop().create_future()

        def hear(result: GenerationOutput) -> None:
            lengths.append(len(result.generated_tokens))
            if result.is_finished():
                done.set_result(result.status)

        manager.register_result_handler("mine", hear)
        manager.add_request(prompts(1)[0], request_id="mine", max_new_tokens=3, streaming=True)
        assert await asyncio.wait_for(done, HANGS) == RequestStatus.FINISHED
        await asyncio.sleep(0)
        return lengths

    with manager_for(batching_model(LLAMA)) as manager:
        manager.start()
        assert asyncio.run(lengths_of(manager)) == [1, 2, 3]
        assert manager.output_router.output_queue.empty()
        assert not manager.output_router.result_handlers
        manager.stop(keep_for_next_session=True)


def test_without_other_processes_the_manager_leads_itself() -> None:
    with manager_for(batching_model(LLAMA)) as manager:
        helper = manager.distributed_helper
        assert manager.is_tp_driver
        assert (helper.dist_on, helper.world_size, helper.tp_size, helper.global_rank) == (False, 1, 1, 0)
        tensor = torch.tensor([7, 3])
        assert helper.tp_all_reduce_min(tensor) is tensor
        sent = {"a": "request"}
        assert helper.tp_broadcast_object_from_rank_0(sent) is sent


def sampled(seed: int) -> list[list[int]]:
    generation = {"do_sample": True, "max_new_tokens": 8}
    with manager_for(batching_model(LLAMA), generation, seed=seed) as manager:
        names = manager.add_requests([random_ids(20, seed=1).tolist()] * 3)
        manager.start()
        results: dict[str, list[int]] = {}
        while len(results) < 3:
            result = manager.get_result(timeout=HANGS)
            assert result is not None
            results[result.request_id] = result.generated_tokens
        manager.stop()
    return [results[name] for name in names]


def test_a_seed_gives_the_same_samples_again() -> None:
    first = sampled(42)
    assert sampled(42) == first
    assert sampled(43) != first
    assert len({tuple(tokens) for tokens in first}) == 3, "requests of one batch sample for themselves"


def test_an_end_token_ends_one_request_and_no_other() -> None:
    """Each request may have its own: none, one, or several."""
    prompt = prompts(1)[0]

    def answer(manager: Any, end: int | list[int] | None) -> list[int]:
        name = manager.add_request(prompt, max_new_tokens=8, eos_token_id=end)
        return next(manager.request_id_iter(name)).generated_tokens

    with manager_for(batching_model(LLAMA)) as manager:
        manager.start()
        whole = answer(manager, None)
        assert len(whole) == 8
        assert answer(manager, -1) == whole
        assert answer(manager, whole[2]) == whole[: whole.index(whole[2]) + 1]
        assert answer(manager, [whole[4], whole[2]]) == whole[: whole.index(whole[2]) + 1]
        assert answer(manager, None) == whole
        manager.stop(keep_for_next_session=True)


def test_settings_that_the_manager_does_not_know_fail_their_request_alone() -> None:
    """A type that is wrong, a name that no processor has; the requests beside them are served."""
    generation = {"do_sample": True, "temperature": 0.9, "max_new_tokens": 3}
    with manager_for(batching_model(LLAMA), generation, per_request_processors=True) as manager:
        names = [
            manager.add_request(prompts(1)[0], temperature=2),
            manager.add_request(prompts(1)[0], warmth=2.0),
            manager.add_request(prompts(1)[0], temperature=2.0),
        ]
        manager.start()
        results = {}
        for _ in names:
            result = manager.get_result(timeout=HANGS)
            assert result is not None
            results[result.request_id] = result
        manager.stop(keep_for_next_session=True)
        check_nothing_is_held(manager.cache)
    errors = [str(results[name].error) for name in names if name]
    assert "expected float" in errors[0]
    assert "warmth" in errors[1]
    assert errors[2] == "None"
    assert [results[name].status for name in names if name] == 2 * [RequestStatus.FAILED] + [RequestStatus.FINISHED]


@pytest.mark.parametrize("dead", [False, True], ids=["that has stopped", "that has died"])
def test_an_engine_takes_no_request_that_it_would_drop(dead: bool) -> None:
    """Whoever asks is told, and waits for nothing."""
    fault = RuntimeError("an illegal access to memory")

    def die() -> None:
        raise fault

    with manager_for(batching_model(LLAMA)) as manager:
        manager.start()
        if dead:
            manager._generation_step = die  # type: ignore[method-assign]
            manager.add_request(prompts(1)[0])
            result = manager.get_result(timeout=HANGS)
            assert result is not None
            assert "illegal access" in str(result.error)
            thread = manager._generation_thread
            assert thread is not None
            thread.join(HANGS)
        else:
            manager.stop(keep_for_next_session=True)
        with pytest.raises(RuntimeError, match="takes no more requests") as error:
            manager.add_request(prompts(1)[0])
        assert error.value.__cause__ is (fault if dead else None)
        manager.stop()
