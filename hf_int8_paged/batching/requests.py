"""What is done with requests: they come, are cancelled, and give results."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput

from .refusals import RequestIdTakenError, RequestTooLongError, children, token_ids
from .router import Router, take_back


class RequestsManager(ContinuousBatchingManager):
    """transformers' `ContinuousBatchingManager`, which refuses requests that would stop the engine, or of which nobody
    would hear.
    """

    output_router: Router

    def __init__(self, *args: Any, max_request_tokens: int | None = None, **kwargs: Any):
        self._loop_ended = threading.Event()
        self._max_request_tokens = max_request_tokens
        super().__init__(*args, **kwargs)
        self.output_router = Router()

    @property
    def max_request_tokens(self) -> int | None:
        """Most tokens that one request can have; None where nothing limits it."""
        return self._max_request_tokens

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> str | None:
        """Add a request to the queue; see `ContinuousBatchingManager.add_request`. Where neither it nor the generation
        config limits its new tokens, the room does.

        Raises:
            RequestTooLongError: more tokens than the blocks can hold of one request, with those that it asks for. Such
                a request would stop the engine, and all others with it.
            RequestIdTakenError: a request with this id is under way, or was cancelled and the engine still has it.
            PromptError: no tokens, or others than the model knows.
            RuntimeError: the engine is stopping or has died. It would drop the request, and who waits for it would wait
                for ever.
        """
        others = self.num_return_sequences - 1
        if request_id is None and self.is_tp_driver:
            request_id = self._expect_next(others)
        elif request_id is not None:
            is_free = self.output_router.expect(request_id, children(request_id, others))
            if self.is_tp_driver and not is_free:  # the other processes add nothing
                raise RequestIdTakenError(request_id)
        try:
            input_ids = self._token_ids(input_ids)
            self.check_length(len(input_ids), max_new_tokens)
            most = self.max_request_tokens
            if max_new_tokens is None and self.generation_config.max_new_tokens is None and most is not None:
                max_new_tokens = most - len(input_ids)
            name = super().add_request(input_ids, request_id, max_new_tokens, *args, **kwargs)
            late = self._loop_ended.is_set() and take_back(self.input_queue, request_id)
            if late or (name is None and self.is_tp_driver):
                fault = self.background_thread_status.fatal_error
                raise RuntimeError("the engine is stopping, or has died, and takes no more requests") from fault
        except BaseException:
            if request_id is not None:
                self.output_router.refuse(request_id)
            raise
        return name

    def _expect_next(self, others: int) -> str:
        """The next of the engine's own ids that is free, which is expected from now on."""
        while True:
            with self._request_lock:
                name = f"req_{self._request_counter}"
                self._request_counter += 1
            if self.output_router.expect(name, children(name, others)):
                return name

    def _are_free(self, count: int) -> bool:
        own = [f"req_{self._request_counter + i}" for i in range(count)]
        names = {name for one in own for name in (one, *children(one, self.num_return_sequences - 1))}
        return self.output_router.are_free(names)

    def _token_ids(self, prompt: Any, called: str = "the prompt") -> list[int]:
        return token_ids(prompt, self.model.config.get_text_config().vocab_size, called)

    def register_result_handler(self, request_id: str, callback: Callable) -> None:
        """Call ``callback`` on this thread's event loop with every result of a request; also with the newest of those
        that came before.

        Raises:
            RequestIdTakenError: a request with this id is under way and has a handler, or is being cancelled.
        """
        self.output_router.hand_over(request_id, callback, asyncio.get_running_loop())

    def cancel_request(self, request_id: str) -> None:
        """Cancel a request by its id, and the other sequences that it returns; nobody hears of them any more. Its id
        can be given again when the engine has taken two more steps."""
        for name in self.output_router.cancel(request_id):
            super().cancel_request(name)

    def request_id_iter(self, request_id: str) -> Generator[GenerationOutput]:
        """The results of a request as they come, until its last one, or until it is cancelled or the engine ends."""
        while self.is_running() and not self.output_router.is_forgotten(request_id):
            result = self.get_result(request_id, timeout=0.1)
            if result is not None:
                yield result
                if result.is_finished():
                    return
        yield from self.output_router.take(request_id)

    def __iter__(self) -> Iterator[GenerationOutput]:
        """All results as they come, until the engine's thread ends; those that came with its end too."""
        yield from super().__iter__()
        while (result := self.get_result(timeout=0)) is not None:
            yield result

    def add_requests(
        self, inputs: list[list[int]], max_new_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> list[str]:
        """Add requests to the queue, all of them or, where one is refused, none; see `add_request`."""
        inputs = [self._token_ids(prompt, f"prompt {i}") for i, prompt in enumerate(inputs)]
        for input_ids in inputs:
            self.check_length(len(input_ids), max_new_tokens)
        with self._request_lock:  # the ids that these requests get are to be free
            while self.is_tp_driver and not self._are_free(len(inputs)):
                self._request_counter += 1
        return super().add_requests(inputs, max_new_tokens, *args, **kwargs)

    def check_length(self, prompt: int, max_new_tokens: int | None) -> None:
        """Raise `RequestTooLongError` if a request of so many tokens can never be served.

        Args:
            prompt: tokens of the prompt.
            max_new_tokens: asked for; None: what the generation config says.
        """
        new = self.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        most = self.max_request_tokens
        if most is not None and prompt + (new or 1) > most:
            limited = "a request may have" if most == self._max_request_tokens else "all blocks together hold"
            raise RequestTooLongError(
                f"the prompt has {prompt} tokens and may get {new or 1} new ones, but {limited} {most}; "
                + (f"ask for at most {most - prompt} new ones" if most > prompt else "shorten it")
            )
