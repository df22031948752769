"""A stop that does not wait serves what is under way; what comes beside a stop is answered or refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from transformers.generation.continuous_batching.requests import RequestState

from hf_int8_paged.batching import PagedInt8BatchingManager
from tests.processes import HANGS

from .models import batching_model, manager_for, prompts

LLAMA = "llama: full attention"


class HeldLoop:
    """A manager's loop waits in its third step until it may go on."""

    def __init__(self, manager: PagedInt8BatchingManager):
        self.arrived, self.go_on = threading.Event(), threading.Event()
        self._taken, self._step = 0, manager._generation_step
        manager._generation_step = self._held  # type: ignore[method-assign]

    def _held(self) -> None:
        self._taken += 1
        if self._taken == 3:
            self.arrived.set()
            assert self.go_on.wait(HANGS)
        self._step()


@contextmanager
def held_with_one_request() -> Iterator[tuple[PagedInt8BatchingManager, HeldLoop]]:
    """A started manager whose request "mine" has a few tokens of its ten."""
    with manager_for(batching_model(LLAMA)) as manager:
        loop = HeldLoop(manager)
        manager.start()
        manager.add_request(prompts(1)[0], request_id="mine")
        assert loop.arrived.wait(HANGS)
        try:
            yield manager, loop
        finally:
            loop.go_on.set()


def ended(manager: PagedInt8BatchingManager) -> None:
    thread = manager._generation_thread
    assert thread is not None
    thread.join(HANGS)
    assert not thread.is_alive()


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
@pytest.mark.parametrize("how", [{"block": False}, {"timeout": 0.001}], ids=str)
def test_a_stop_that_does_not_wait_loses_no_request(how: dict[str, Any], keep: bool) -> None:
    with held_with_one_request() as (manager, loop):
        model: Any = manager.model
        manager.stop(keep_for_next_session=keep, **how)
        assert model.config._attn_implementation == "int8_paged_batching", "the loop still needs it"
        loop.go_on.set()
        result = manager.get_result(timeout=HANGS)
        assert result is not None
        assert result.error is None, result.error
        assert len(result.generated_tokens) == 10
        ended(manager)
        assert model.config._attn_implementation == "int8_paged"


def test_a_manager_starts_again_after_a_stop_that_did_not_wait() -> None:
    with held_with_one_request() as (manager, loop):
        manager.stop(block=False)
        manager.start()  # it runs still, which is said
        loop.go_on.set()
        ended(manager)
        assert len(manager.get_result(timeout=HANGS).generated_tokens) == 10  # type: ignore[union-attr]
        manager.start()
        manager.add_request(prompts(1)[0])
        assert len(manager.get_result(timeout=HANGS).generated_tokens) == 10  # type: ignore[union-attr]
        manager.stop()


def stopping_before(manager: PagedInt8BatchingManager, put: Any) -> Any:
    """A ``put`` before which the engine stops, as another thread would have it do."""

    def late(*args: Any, **kwargs: Any) -> None:
        manager.stop(keep_for_next_session=True)
        put(*args, **kwargs)

    return late


def test_a_request_that_comes_after_the_last_were_answered_is_refused() -> None:
    with manager_for(batching_model(LLAMA)) as manager:
        manager.start()
        queue: Any = manager.input_queue
        put = queue.put
        queue.put = stopping_before(manager, put)
        with pytest.raises(RuntimeError, match="takes no more requests"):
            manager.add_request(prompts(1)[0], request_id="late")
        assert queue.empty(), "it would be served without anybody to wait for it"
        queue.put = put
        manager.start()
        assert manager.add_request(prompts(1)[0], request_id="late") == "late"
        assert manager.get_result(timeout=HANGS).error is None  # type: ignore[union-attr]
        manager.stop()


def test_a_request_that_comes_while_the_loop_ends_is_answered_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with manager_for(batching_model(LLAMA)) as manager:
        status = manager.background_thread_status
        mark = status.mark_as_stopped

        def ending() -> None:
            manager.input_queue.put(RequestState("late", [1, 2, 3], max_new_tokens=3))
            mark()

        monkeypatch.setattr(status, "mark_as_stopped", ending)
        manager.start()
        manager.stop(block=False, keep_for_next_session=True)
        result = manager.get_result(timeout=HANGS)
        assert result is not None
        assert result.request_id == "late"
        assert "has stopped, or died" in str(result.error)
        ended(manager)


def test_who_iterates_gets_the_last_result_of_a_stop_that_does_not_wait() -> None:
    with held_with_one_request() as (manager, loop):
        manager.stop(block=False)
        loop.go_on.set()
        ended(manager)
        assert [len(result.generated_tokens) for result in manager.request_id_iter("mine")] == [10]
        manager.start()
        manager.add_request(prompts(1)[0], request_id="next")
        manager.stop()
        assert [result.request_id for result in manager] == ["next"]


@pytest.mark.parametrize("why", ["it stops", "too long"])
def test_a_refused_request_takes_nothing_from_one_of_the_same_id(why: str) -> None:
    with held_with_one_request() as (manager, loop):
        if why == "it stops":
            manager.stop(block=False, keep_for_next_session=True)
        with pytest.raises((RuntimeError, ValueError)):
            manager.add_request(prompts(1)[0] * (1 if why == "it stops" else 10**4), request_id="mine")
        loop.go_on.set()
        result = manager.get_result(timeout=HANGS)
        assert result is not None
        assert len(result.generated_tokens) == 10
