"""Where the engine's results go: to the one who waits for a request, or into the common queue."""

from __future__ import annotations

import queue
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus

from .refusals import RequestIdTakenError

#: How many are remembered: what is cancelled delivers nothing after the next step.
FORGOTTEN = 4096


class Router(OutputRouter):
    """transformers' `OutputRouter`, without the moment in which a result is lost.

    Servers add a request first and name their handler afterwards. What the engine delivers in between waits in the
    queue; here it is handed over when the handler comes. A delivery and that are one after the other, never at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()  # type: ignore[assignment]  # the one who hands over also registers
        #: Requests that came and have no last result yet.
        self._expected: set[str] = set()
        #: Requests that were cancelled and that the engine may still have.
        self._cancelled: set[str] = set()
        #: Requests that nobody waits for any more, the newest last.
        self._forgotten: dict[str | None, None] = {}

    def deliver(self, output: GenerationOutput) -> None:
        with self._lock:
            if output.is_finished():
                self._expected.discard(output.request_id)
                if output.status == RequestStatus.FAILED:  # those that it would have been forked into never come
                    self._expected.difference_update(self._children(output.request_id))
            entry = self.result_handlers.get(output.request_id)
            if output.is_finished():  # not when it was heard, when another with this id may have come
                self.result_handlers.pop(output.request_id, None)
            if entry is None and output.request_id not in self._forgotten:
                self.output_queue.put(output)
        if entry is not None:
            callback, loop = entry
            loop.call_soon_threadsafe(callback, output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)

    def hand_over(self, request_id: str, callback: Callable, loop: AbstractEventLoop) -> None:
        """Register a handler, and give it the newest of the results that came before.

        Args:
            request_id: the request's id.
            callback: is called with every result.
            loop: where it is called.

        Raises:
            RequestIdTakenError: a request with this id is under way and has a handler, or is being cancelled.
        """
        with self._lock:
            if request_id in self._cancelled or (request_id in self._expected and request_id in self.result_handlers):
                raise RequestIdTakenError(request_id)
            mine = self.take(request_id)
            if not (mine and mine[-1].is_finished()):
                self.result_handlers[request_id] = (callback, loop)
            if mine:
                loop.call_soon_threadsafe(callback, mine[-1])

    def forget(self, request_id: str | None) -> None:
        """Nobody waits for a request any more: what is still delivered of it is dropped."""
        with self._lock:
            self.result_handlers.pop(request_id, None)  # type: ignore[arg-type]
            self._expected.discard(request_id)
            self._forgotten.pop(request_id, None)
            self._forgotten[request_id] = None
            if len(self._forgotten) > FORGOTTEN:
                del self._forgotten[next(iter(self._forgotten))]

    def refuse(self, request_id: str) -> None:
        """A request that was expected was refused."""
        with self._lock:
            for name in (request_id, *self._children(request_id)):
                self.forget(name)

    def is_forgotten(self, request_id: str) -> bool:
        """Whether what comes of a request is dropped."""
        with self._lock:
            return request_id in self._forgotten

    def cancel(self, request_id: str) -> list[str]:
        """Nobody waits for a request any more, nor for the other sequences that it returns: what came is dropped too.
        Their ids are taken until `are_gone`.

        Returns:
            Which of them are under way.
        """
        with self._lock:
            under_way = [name for name in (request_id, *self._children(request_id)) if name in self._expected]
            for name in {*under_way, *self._waiting(request_id)}:
                self.forget(name)
                self.take(name)
            self.forget(request_id)
            self._cancelled.update(under_way)
            return under_way

    def are_gone(self, requests: set[str]) -> None:
        """The engine has none of these cancelled requests any more."""
        with self._lock:
            self._cancelled -= requests

    def all_are_gone(self) -> None:
        """The engine has ended, and has no request any more."""
        with self._lock:
            self._cancelled.clear()

    def expect(self, request_id: str, others: list[str]) -> bool:
        """A request with this id comes, perhaps after one that was cancelled.

        Args:
            request_id: the request's id.
            others: those of the other sequences that it returns.

        Returns:
            Whether all these ids are free, and no result of an earlier request with one of them waits to be taken;
            else nothing has changed.
        """
        names = {request_id, *others}
        with self._lock:
            if not self.are_free(names) or not names.isdisjoint(self._waiting(request_id)):
                return False
            self._expected |= names
            for name in names:
                self._forgotten.pop(name, None)
            return True

    def are_free(self, requests: set[str]) -> bool:
        """Whether no request with one of these ids is under way, or is being cancelled."""
        with self._lock:
            return requests.isdisjoint(self._expected) and requests.isdisjoint(self._cancelled)

    def take(self, request_id: str) -> list[GenerationOutput]:
        """Take the results of a request that wait in the queue."""
        with self._lock, self.output_queue.mutex:
            waiting = self.output_queue.queue
            mine = [output for output in waiting if output.request_id == request_id]
            others = [output for output in waiting if output.request_id != request_id]
            waiting.clear()
            waiting.extend(others)
            return mine

    def _waiting(self, request_id: str) -> set[str]:
        """Of a request and the other sequences that it returns, those whose results wait in the queue."""
        with self.output_queue.mutex:
            names = {output.request_id for output in self.output_queue.queue}
        return {name for name in names if name == request_id or str(name).startswith(f"{request_id}__child#")}

    def _children(self, request_id: str | None) -> list[str]:
        return [name for name in self._expected if name.startswith(f"{request_id}__child#")]


def take_back(waiting: queue.Queue[RequestState], request_id: str | None) -> bool:
    """Take a request out of a queue that nobody reads any more.

    Returns:
        Whether it was still there; else somebody has read it, and answers.
    """
    with waiting.mutex:
        others = [state for state in waiting.queue if state.request_id != request_id]
        was_there = len(others) < len(waiting.queue)
        waiting.queue.clear()
        waiting.queue.extend(others)
        waiting.not_full.notify_all()
    return was_there
