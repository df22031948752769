"""Pauses: transformers' tests of them, with our manager. Its loop takes steps of a tiny model, or is a plain thread
where a loop cannot be brought into the state that is asked for."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus
from transformers.generation.continuous_batching.requests import GenerationOutput

from hf_int8_paged.batching import PagedInt8BatchingManager
from tests.processes import HANGS

from ..models import batching_model, manager_for, prompts, random_ids

LLAMA = "llama: full attention"
#: Seconds in which a loop that does not wait would have taken many steps. Too short on a busy machine, it misses a
#: fault; it reports none that is not there.
A_WHILE = 0.2


class Steps:
    """What the loop of a manager does. It takes only a few steps more than somebody has waited for, or one to come to a
    pause: however slowly a test goes on, its requests do not end meanwhile."""

    def __init__(self, manager: PagedInt8BatchingManager):
        self._step, self._taken = manager._generation_step, threading.Condition()
        self._pausing = manager.background_thread_status.is_pause_requested
        self.count, self._most = 0, 5.0
        manager._generation_step = self._counted  # type: ignore[method-assign]

    def _counted(self) -> None:
        with self._taken:
            self.count += 1
            self._taken.notify_all()
            while self.count > self._most and not self._pausing():
                self._taken.wait(0.001)
        self._step()

    def more(self, than: int, seconds: float = HANGS) -> bool:
        with self._taken:
            self._most = max(self._most, than + 5)
            return self._taken.wait_for(lambda: self.count > than, seconds)

    def free(self) -> None:
        """From now on it takes as many as it likes."""
        self._most = math.inf


@contextmanager
def generating(**options: Any) -> Iterator[tuple[PreTrainedModel, PagedInt8BatchingManager, Steps]]:
    """A manager whose loop has begun to serve three requests of 100 tokens."""
    model = batching_model(LLAMA)
    with manager_for(model, {"max_new_tokens": 100}, **options) as manager:
        steps = Steps(manager)
        manager.start()
        manager.add_requests(prompts(3))
        try:
            assert steps.more(than=0)
            yield model, manager, steps
        finally:
            steps.free()
            manager.stop()


def finished(manager: PagedInt8BatchingManager, count: int) -> list[GenerationOutput]:
    results: list[GenerationOutput] = []
    while len(results) < count:
        result = manager.get_result(timeout=HANGS)
        assert result is not None
        assert result.error is None, result.error
        results += [result] * result.is_finished()
    return results


def answer(manager: PagedInt8BatchingManager, prompt: list[int], new: int = 10) -> GenerationOutput:
    manager.add_request(prompt, max_new_tokens=new)
    return finished(manager, 1)[0]


def test_no_step_is_taken_while_somebody_pauses() -> None:
    with generating() as (model, manager, steps):
        for _ in range(3):
            with manager.pause():
                assert manager.batch_processor is not None
                assert manager.batch_processor.has_pending_requests()
                before = steps.count
                with torch.no_grad():
                    for weights in model.parameters():
                        weights.add_(0.0)
                assert not steps.more(before, A_WHILE)
            assert steps.more(before), "it goes on"
        steps.free()
        assert [len(result.generated_tokens) for result in finished(manager, 3)] == [100] * 3


def test_the_loop_waits_for_the_last_of_several() -> None:
    inside = threading.Barrier(4)
    leave = [threading.Event() for _ in range(3)]
    with generating() as (_, manager, steps):

        def hold(may_leave: threading.Event) -> None:
            with manager.pause():
                inside.wait(HANGS)
                assert may_leave.wait(HANGS)

        threads = [threading.Thread(target=hold, args=[event]) for event in leave]
        for thread in threads:
            thread.start()
        inside.wait(HANGS)
        before = steps.count
        for i, (thread, event) in enumerate(zip(threads, leave)):
            assert not steps.more(before, A_WHILE), f"it went on while {3 - i} held it"
            event.set()
            thread.join(HANGS)
        assert steps.more(before)
        steps.free()
        assert len(finished(manager, 3)) == 3


@pytest.mark.parametrize("shares", [False, True], ids=["nothing shared", "equal beginnings shared"])
@pytest.mark.parametrize("moment", ["in a pause", "between sessions"])
def test_requests_after_a_change_of_weights_know_nothing_of_the_old_ones(moment: str, shares: bool) -> None:
    """Not even of the first token, whose row requests share; blocks of equal content the engine shares itself, so
    here only the first token is the same."""
    prompt = random_ids(40, seed=3).tolist()
    later = [prompt[0], *random_ids(39, seed=4).tolist()] if shares else prompt

    def change(model: PreTrainedModel) -> None:
        torch.manual_seed(5)
        with torch.no_grad():
            for weights in model.parameters():
                weights.add_(torch.randn_like(weights) * 0.1)

    model, changed = batching_model(LLAMA), batching_model(LLAMA)
    with manager_for(model, centers={}, allow_block_sharing=shares) as manager:
        manager.start()
        old = answer(manager, prompt)
        if moment == "in a pause":
            with manager.pause():
                change(model)
        else:
            manager.stop(keep_for_next_session=True)
            change(model)
            manager.start()
        new = answer(manager, later)
        manager.stop(keep_for_next_session=True)
    change(changed)
    with manager_for(changed, centers={}) as fresh:
        fresh.start()
        expected = answer(fresh, later)
        fresh.stop()
    assert (new.generated_tokens, new.logprobs) == (expected.generated_tokens, expected.logprobs)
    assert old.generated_tokens != new.generated_tokens


def test_a_first_token_is_written_anew_after_a_pause_and_found_until_then() -> None:
    prompt = random_ids(40, seed=3).tolist()
    with manager_for(batching_model(LLAMA)) as manager:
        manager.start()
        answer(manager, prompt)
        with manager.pause():
            pass
        rows: Any = manager.cache.first_rows
        assert prompt[0] in rows, "those who find the blocks behind it need it"
        assert rows._outdated == {prompt[0]}
        answer(manager, prompt[:1])
        with manager.pause():
            assert not rows._unwritten
        manager.stop(keep_for_next_session=True)


# -- states that a loop of one process does not come into --


def bare(loop: Callable[[BackgroundThreadStatus], None] | None) -> tuple[Any, BackgroundThreadStatus]:
    """A manager whose loop is this function."""
    manager: Any = PagedInt8BatchingManager(batching_model(LLAMA), centers={})
    status = manager.background_thread_status
    if loop is not None:
        manager._generation_thread = threading.Thread(target=loop, args=[status])
        manager._generation_thread.start()
    return manager, status


def pausing(status: BackgroundThreadStatus) -> None:
    status.pause_and_wait()
    status.mark_as_stopped()


def asked(status: BackgroundThreadStatus) -> None:
    """Wait until somebody asks for a pause."""
    while not status.is_pause_requested():
        time.sleep(0.001)


def test_a_thread_enters_a_pause_that_another_process_asked_for() -> None:
    """With tensor parallelism a loop pauses although nobody here has asked yet."""
    manager, _ = bare(pausing)
    thread = manager._generation_thread
    with manager.pause():
        assert thread.is_alive(), "it waits"
    thread.join(HANGS)
    assert not thread.is_alive(), "it goes on"
    manager.stop()


def test_who_is_interrupted_while_waiting_does_not_hold_the_loop() -> None:
    manager, status = bare(pausing)
    thread = manager._generation_thread

    def interrupted() -> bool:
        raise KeyboardInterrupt

    status._pause_predicate = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), manager.pause():
        pass
    assert not status.is_pause_requested()
    assert not status.is_pause_requested(local=True)
    thread.join(HANGS)
    assert not thread.is_alive()
    manager.stop()


@pytest.mark.parametrize("how", [{}, {"block": False}, {"timeout": 5.0}, {"hard_stop": True}], ids=str)
def test_who_pauses_cannot_stop(how: dict[str, Any]) -> None:
    manager, _ = bare(pausing)
    with manager.pause(), pytest.raises(RuntimeError, match="from inside a pause"):
        manager.stop(**how)
    manager.stop()
    assert not manager.is_running()


def test_a_stop_of_another_thread_waits_for_the_pause() -> None:
    manager, _ = bare(pausing)
    stopped = threading.Event()

    def stop() -> None:
        manager.stop()
        stopped.set()

    stopper = threading.Thread(target=stop)
    with manager.pause():
        stopper.start()
        assert not stopped.wait(A_WHILE)
    stopper.join(HANGS)
    assert stopped.is_set()


def test_a_loop_that_dies_is_no_pause() -> None:
    """The error is the cause of the one that the waiting thread gets."""
    fault, unwind = RuntimeError("a fault in the forward pass"), threading.Event()

    def dying(status: BackgroundThreadStatus) -> None:
        asked(status)
        status.request_stop(BackgroundThreadStatus.HARD_STOP, 0)
        status.record_fatal_error(fault)
        unwind.wait(HANGS)
        status.mark_as_stopped()

    manager, status = bare(dying)
    with pytest.raises(RuntimeError, match="stopped before it could pause") as error, manager.pause():
        pass
    assert error.value.__cause__ is fault
    assert status.local_status == BackgroundThreadStatus.HARD_STOP
    unwind.set()
    manager.stop()


def ends_when_asked(status: BackgroundThreadStatus) -> None:
    asked(status)
    status.mark_as_stopped()


@pytest.mark.parametrize(
    "loop",
    [ends_when_asked, None, BackgroundThreadStatus.mark_as_stopped],
    ids=["stops meanwhile", "was never started", "has ended"],
)
def test_a_loop_that_is_not_there_cannot_pause(loop: Callable[[BackgroundThreadStatus], None] | None) -> None:
    manager, _ = bare(loop)
    if loop is BackgroundThreadStatus.mark_as_stopped:
        manager._generation_thread.join(HANGS)
    said = "no generation loop is running|stopped before it could pause"
    with pytest.raises(RuntimeError, match=said), manager.pause():
        pass
