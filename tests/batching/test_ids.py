"""A request's id is its own until the engine has it no more: two at once, and requests that are cancelled."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from hf_int8_paged.batching import PagedInt8BatchingManager, RequestIdTakenError
from hf_int8_paged.batching.router import Router
from tests.processes import HANGS

from .alone import Steps, check_nothing_is_held, difference
from .models import batching_model, manager_for, prompts
from .test_stop import LLAMA, HeldLoop, held_with_one_request


def finished(manager: PagedInt8BatchingManager) -> GenerationOutput:
    while True:
        result = manager.get_result(timeout=HANGS)
        assert result is not None
        assert result.error is None, result.error
        if result.is_finished():
            return result


def test_two_requests_at_once_cannot_have_one_id() -> None:
    with held_with_one_request() as (manager, loop):
        with pytest.raises(RequestIdTakenError, match="a request with the id 'mine' is under way; wait for its end"):
            manager.add_request([4, 5], request_id="mine")
        manager.add_request([1, 2, 3], request_id="other")
        loop.go_on.set()
        lengths = {result.request_id: len(result.generated_tokens) for result in (finished(manager), finished(manager))}
        assert lengths == {"mine": 10, "other": 10}
        assert manager.add_request([4, 5], request_id="mine", max_new_tokens=3) == "mine"
        assert len(finished(manager).generated_tokens) == 3
        manager.stop()


def test_an_id_whose_results_nobody_has_taken() -> None:
    """The next request's caller would take them for its own."""
    with held_with_one_request() as (manager, loop):
        manager.add_request([1, 2, 3], request_id="other")
        loop.go_on.set()
        while len(manager.output_router.output_queue.queue) < 2:
            assert manager.is_running()
            time.sleep(0.01)
        for request_id in ("mine", "other"):
            with pytest.raises(RequestIdTakenError, match="take its results"):
                manager.add_request([4, 5], request_id=request_id)
        assert finished(manager).request_id in ("mine", "other")
        manager.cancel_request("mine")
        manager.cancel_request("other")
        assert not manager.output_router.output_queue.queue
        manager.add_request([4, 5], request_id="mine", max_new_tokens=3)
        assert len(finished(manager).generated_tokens) == 3
        manager.stop()


def test_the_engines_own_ids_are_those_that_are_free() -> None:
    with manager_for(batching_model(LLAMA)) as manager:
        manager.add_request([1, 2], request_id="req_0")
        assert manager.add_request([3]) == "req_1"
        manager.add_request([4], request_id="req_3")
        assert manager.add_requests([[5], [6]]) == ["req_4", "req_5"]
        manager.start()
        assert {finished(manager).request_id for _ in range(5)} == {f"req_{i}" for i in (0, 1, 3, 4, 5)}
        manager.stop()


def test_the_sequences_that_a_request_returns_have_their_ids_to_themselves() -> None:
    with manager_for(batching_model(LLAMA), {"num_return_sequences": 2, "do_sample": True}) as manager:
        manager.add_request([1, 2], request_id="x")
        with pytest.raises(RequestIdTakenError):
            manager.add_request([1, 2], request_id="x__child#0")
        manager.add_request([3, 4], request_id="y__child#0")
        with pytest.raises(RequestIdTakenError):
            manager.add_request([1, 2], request_id="y")
        manager.start()
        assert len({finished(manager).request_id for _ in range(4)}) == 4
        manager.stop(keep_for_next_session=True)
        assert manager.output_router.are_free({"x", "x__child#0", "y", "y__child#0"})


def test_a_handler_is_not_taken_by_another_request_of_the_same_id() -> None:
    """Servers name it before they add a request of which they want the last result alone."""

    async def answered(manager: Any) -> list[int]:
        first, second = [asyncio.get_running_loop().create_future() for _ in range(2)]
        manager.register_result_handler("x", first.set_result)
        manager.add_request([1, 2], request_id="x")
        with pytest.raises(RequestIdTakenError):
            manager.register_result_handler("x", second.set_result)
        manager.start()
        lengths = [len((await asyncio.wait_for(first, HANGS)).generated_tokens)]
        manager.register_result_handler("x", second.set_result)
        manager.add_request([1, 2], request_id="x", max_new_tokens=3)
        return [*lengths, len((await asyncio.wait_for(second, HANGS)).generated_tokens)]

    with manager_for(batching_model(LLAMA)) as manager:
        assert asyncio.run(answered(manager)) == [10, 3]
        assert not manager.output_router.result_handlers
        manager.stop()


@pytest.mark.parametrize("returns", [1, 3], ids=["one sequence", "three sequences"])
def test_a_running_request_that_is_cancelled_gives_back_all_it_has(returns: int) -> None:
    """The others get their tokens, and its id can be given again once the engine has it no more."""
    model, asked = batching_model(LLAMA), prompts(4)
    generation = {"max_new_tokens": 1000, "do_sample": returns > 1, "num_return_sequences": returns}
    with manager_for(model, generation, num_blocks=1000, max_batch_tokens=256) as manager:
        router, steps = manager.output_router, None if returns > 1 else Steps(manager.cache)
        loop = HeldLoop(manager)
        manager.start()
        manager.add_request(asked[0], request_id="x", streaming=True)
        assert loop.arrived.wait(HANGS)
        assert router.output_queue.qsize() >= returns
        manager.add_request(asked[1], request_id="y", max_new_tokens=20)
        manager.cancel_request("x")
        assert list(manager.request_id_iter("x")) == [], (
            "nor what came before, which a later one would take for its own"
        )
        with pytest.raises(RequestIdTakenError):
            manager.add_request(asked[2], request_id="x")
        loop.go_on.set()
        again = None
        while again is None:  # another step, which the other request makes the engine take
            try:
                again = manager.add_request(asked[2], request_id="x", max_new_tokens=7)
            except RequestIdTakenError:
                time.sleep(0.001)
        results: dict[str, GenerationOutput] = {}
        while len(results) < 2 * returns:
            result = finished(manager)
            results[result.request_id] = result
        assert {len(results[name].generated_tokens) for name in results if name[0] == "x"} == {7}
        assert {len(results[name].generated_tokens) for name in results if name[0] == "y"} == {20}
        manager.stop(keep_for_next_session=True)
        check_nothing_is_held(manager.cache)
        assert router.are_free({"x", "y", "x__child#0", "y__child#1"})
        assert router.output_queue.empty()
    if steps is not None:
        assert difference(model, asked[1], results["y"], steps.lives["y"], manager).margin == 0


@pytest.mark.parametrize("when", ["before the start", "when it has ended"])
def test_what_is_cancelled_while_it_does_not_run_cancels_no_later_request(when: str) -> None:
    with manager_for(batching_model(LLAMA)) as manager:
        manager.add_request([1, 2], request_id="x")
        if when == "before the start":
            manager.cancel_request("x")
            manager.add_request([3, 4], request_id="y")
            manager.start()
            assert finished(manager).request_id == "y"
        else:
            manager.start()
            assert finished(manager).request_id == "x"
        manager.stop(keep_for_next_session=True)
        manager.cancel_request("x")
        manager.start()
        manager.add_request([1, 2], request_id="x")
        assert finished(manager).request_id == "x"
        manager.stop()


def test_an_id_is_expected_until_its_last_result_is_taken() -> None:
    router = Router()
    assert router.expect("a", [])
    router.deliver(GenerationOutput(request_id="a", status=RequestStatus.DECODING))
    assert not router.expect("a", [])
    router.deliver(GenerationOutput(request_id="a", status=RequestStatus.FAILED))
    assert not router.expect("a", []), "nobody has taken its results"
    assert len(router.take("a")) == 2
    assert router.expect("a", [])
    router.refuse("a")
    assert router.expect("a", ["a__child#0"])
    assert router.cancel("a") == ["a", "a__child#0"]
    assert router.cancel("a") == []
    assert not router.expect("a", [])
    router.are_gone({"a"})
    assert not router.expect("a", ["a__child#0"])
    assert router.expect("a", [])


def test_a_request_that_fails_is_not_forked() -> None:
    router = Router()
    assert router.expect("a", ["a__child#0"])
    router.deliver(GenerationOutput(request_id="a", status=RequestStatus.FAILED))
    assert router.are_free({"a", "a__child#0"})
