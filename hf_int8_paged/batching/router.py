"""Where the engine's results go: to the one who waits for a request, or into the common queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

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
        self._expected: set[str | None] = set()
        #: Requests that nobody waits for any more, the newest last.
        self._forgotten: dict[str | None, None] = {}

    def deliver(self, output: GenerationOutput) -> None:
        with self._lock:
            if output.is_finished():
                self._expected.discard(output.request_id)
            entry = self.result_handlers.get(output.request_id)
            if entry is None and output.request_id not in self._forgotten:
                self.output_queue.put(output)
        if entry is not None:
            callback, loop = entry
            loop.call_soon_threadsafe(callback, output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)

    def hand_over(self, request_id: str, register: Callable[[], None]) -> None:
        """Register a handler, and give it the newest of the results that came before.

        Args:
            request_id: the request's id.
            register: adds the handler.
        """
        with self._lock:
            register()
            with self.output_queue.mutex:
                waiting = self.output_queue.queue
                mine = [output for output in waiting if output.request_id == request_id]
                for output in mine:
                    waiting.remove(output)
            if mine:
                callback, loop = self.result_handlers[request_id]
                loop.call_soon_threadsafe(callback, mine[-1])

    def forget(self, request_id: str | None) -> None:
        """Nobody waits for a request any more: it was cancelled, or refused. What the step at hand still delivers of it
        is dropped."""
        with self._lock:
            self.result_handlers.pop(request_id, None)  # type: ignore[arg-type]
            self._expected.discard(request_id)
            self._forgotten[request_id] = None
            if len(self._forgotten) > FORGOTTEN:
                del self._forgotten[next(iter(self._forgotten))]

    def expect(self, request_id: str | None) -> bool:
        """A request with this id comes, perhaps after one that was forgotten.

        Returns:
            Whether none with this id is expected already.
        """
        with self._lock:
            self._forgotten.pop(request_id, None)
            is_new = request_id not in self._expected
            if request_id is not None:
                self._expected.add(request_id)
            return is_new


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
