"""The engine's manager, with int8 blocks."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.utils import drain_queue
from transformers.utils import logging

from .attention import NAME
from .cache import Int8Options, PagedInt8AttentionCache
from .centers import key_centers
from .engine import check_engine_options, seeing
from .router import Router, take_back

logger = logging.get_logger(__name__)


class RequestTooLongError(ValueError):
    """A request that can never be served: it has more tokens than it may, or than all blocks hold."""


class PagedInt8BatchingManager(ContinuousBatchingManager):
    """transformers' `ContinuousBatchingManager` over int8 blocks: same methods, same requests, same results.

    While it serves a model, the model's attention implementation is ``"int8_paged_batching"``; the old one comes back
    when the engine's thread has ended, or with `stop` or `destroy` if it never began. `generate_batch` and
    `int8_batching` make one by themselves.

    Args:
        model: a causal language model whose layers have full or sliding-window attention, as the engine needs it.
        generation_config: default the model's own.
        continuous_batching_config: default the engine's own. ``page_size`` must be a multiple of 16.
        workload_hints: the engine's, optional.
        centers: mean key of each layer (`key_centers`), ``{}`` for none; default those of tokens drawn from the
            vocabulary.
        rotation: ``"hadamard"`` or None, as in `PagedInt8Cache`.
        sink_tokens: first tokens of each request in full precision, 0 or 1.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; None takes the best one for the model's device.
        max_request_tokens: most tokens of a request, new ones included; None: as many as all blocks hold.

    Raises:
        ValueError: an option is out of range, or one of the engine's that int8 blocks cannot honour.
        NotImplementedError: the installed transformers has another engine than those that were read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
        *,
        centers: Mapping[int, torch.Tensor] | None = None,
        rotation: str | None = "hadamard",
        sink_tokens: int = 1,
        backend: str | None = None,
        max_request_tokens: int | None = None,
    ):
        if rotation not in ("hadamard", None):
            raise ValueError(f'rotation must be "hadamard" or None, got {rotation!r}')
        if sink_tokens not in (0, 1):
            raise ValueError(f"sink_tokens must be 0 or 1 in continuous batching, got {sink_tokens!r}")
        config = ContinuousBatchingConfig() if continuous_batching_config is None else continuous_batching_config
        check_engine_options(config)
        model.eval()
        held = key_centers(model) if centers is None else centers
        self._options = Int8Options(held, rotation, sink_tokens, backend)
        generation_config = model.generation_config if generation_config is None else generation_config
        self._attention_before: str | None = None  # not the engine's own, which a stop puts back under a running loop
        self._attention_lock = threading.Lock()
        self._loop_processor: ContinuousBatchProcessor | None = None
        self._loop_ended = threading.Event()
        self.model = model  # type: ignore[assignment]
        try:
            super().__init__(model, generation_config, config, workload_hints)  # type: ignore[arg-type]
        except BaseException:
            self._put_attention_back()
            raise
        self.output_router: Router = Router()
        self._max_request_tokens = max_request_tokens

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Switch the model to the attention function for int8 blocks, and remember what it had."""
        with self._attention_lock:
            before = model.config._attn_implementation
            if before != NAME:
                model.set_attn_implementation(NAME)
                self._attention_before = before

    def _put_attention_back(self) -> None:
        with self._attention_lock:
            before, self._attention_before = self._attention_before, None
            if before is not None:
                self.model.set_attn_implementation(before)

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
            ValueError: no tokens.
            RuntimeError: the engine is stopping or has died. It would drop the request, and who waits for it would wait
                for ever.
        """
        if request_id is None and self.is_tp_driver:
            with self._request_lock:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
        is_new = self.output_router.expect(request_id)
        try:
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
            if is_new:  # else one with this id runs, whose results somebody waits for
                self.output_router.forget(request_id)
            raise
        return name

    def register_result_handler(self, request_id: str, callback: Callable) -> None:
        """Call ``callback`` on this thread's event loop with every result of a request; also with the newest of those
        that came before."""
        register = functools.partial(super().register_result_handler, request_id, callback)
        self.output_router.hand_over(request_id, register)

    def cancel_request(self, request_id: str) -> None:
        """Cancel a request by its id; nobody hears of it any more."""
        self.output_router.forget(request_id)
        super().cancel_request(request_id)

    def add_requests(
        self, inputs: list[list[int]], max_new_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> list[str]:
        """Add requests to the queue, all of them or, where one is refused, none; see `add_request`."""
        for input_ids in inputs:
            self.check_length(len(input_ids), max_new_tokens)
        return super().add_requests(inputs, max_new_tokens, *args, **kwargs)

    def check_length(self, prompt: int, max_new_tokens: int | None) -> None:
        """Raise `RequestTooLongError` if a request of so many tokens can never be served.

        Args:
            prompt: tokens of the prompt.
            max_new_tokens: asked for; None: what the generation config says.
        """
        if not prompt:
            raise ValueError("a request needs at least one token")
        new = self.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        most = self.max_request_tokens
        if most is not None and prompt + (new or 1) > most:
            limited = "a request may have" if most == self._max_request_tokens else "all blocks together hold"
            raise RequestTooLongError(
                f"the prompt has {prompt} tokens and may get {new or 1} new ones, but {limited} {most}; "
                + (f"ask for at most {most - prompt} new ones" if most > prompt else "shorten it")
            )

    @property
    def max_request_tokens(self) -> int | None:
        """Most tokens that one request can have; None until the blocks are allocated, if nothing else limits it."""
        limits = [self._max_request_tokens, None if self.batch_processor is None else self.cache.max_request_tokens]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def cache(self) -> PagedInt8AttentionCache:
        """The blocks, once they are allocated: with `warmup`, or with the first turn of the engine's thread."""
        if self.batch_processor is None:
            raise RuntimeError("the blocks are allocated by warmup() or start()")
        return self.batch_processor.cache  # type: ignore[return-value]

    def warmup(self) -> None:
        """Allocate the blocks. There is nothing to compile."""
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        self.warmed_up = True

    def start(self) -> None:
        """Start the engine's thread. The blocks are allocated before, so that what does not fit is refused here; and
        the model is switched again, if `stop` has put its attention back."""
        if self.is_running():
            logger.warning("the engine's thread runs already")
            return
        self.switch_to_cb_friendly_attn(self.model)
        if self.batch_processor is None:
            self.batch_processor = self._create_batch_processor()
        self._loop_ended.clear()
        self.cache.outdate_first_tokens()
        self._judge_what_came_before()
        super().start()

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """Stop the engine's thread; see `ContinuousBatchingManager.stop`. A loop that this does not wait for serves its
        requests to their end, and puts the model's attention back then."""
        super().stop(*args, **kwargs)
        if not self.is_running():
            self._put_attention_back()

    def destroy(self) -> None:
        """Stop the engine's thread if it runs, and put the model's attention back."""
        super().destroy()
        self._put_attention_back()

    def _run_generation_loop(self, *args: Any, **kwargs: Any) -> None:
        """The engine's loop. Requests that came after it had answered the last ones are answered here, and those that
        come later still `add_request` takes back."""
        try:
            super()._run_generation_loop(*args, **kwargs)
        finally:
            self._loop_processor = None
            self._loop_ended.set()
            for state in drain_queue(self.input_queue):
                self.output_router.fail_and_deliver(state, RuntimeError("the engine has stopped, or died"))
            self._put_attention_back()

    def _generation_step(self) -> None:
        """A step with the loop's own blocks: a stop that does not wait takes them from the manager at once."""
        assert self._loop_processor is not None
        self._loop_processor._generation_step(self.model)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A context in which the engine takes no step, so that the model can be used and its weights changed. Requests
        keep their blocks; those that come later compute with the new weights, except what they find in blocks of
        equal content, as with the engine's own pages (``allow_block_sharing=False``: nothing)."""
        with super().pause():
            try:
                yield
            finally:
                if self.batch_processor is not None:  # else a stop of another thread did not wait for this
                    self.cache.outdate_first_tokens()

    def _judge_what_came_before(self) -> None:
        """Requests may have come before it was known how many tokens there is room for: answer those with an error that
        never fit, and limit those that ask for no number of new tokens by the room."""
        most = self.max_request_tokens
        for state in drain_queue(self.input_queue):
            try:
                self.check_length(len(state.initial_tokens), state.max_new_tokens)
            except RequestTooLongError as error:
                self.output_router.fail_and_deliver(state, error)
            else:
                if state.max_new_tokens is None and most is not None:
                    state.max_new_tokens = state._new_tokens_limit = most - len(state.initial_tokens)
                self.input_queue.put(state)

    def _create_batch_processor(
        self, make_cache: Callable[..., PagedInt8AttentionCache] = PagedInt8AttentionCache
    ) -> ContinuousBatchProcessor:
        with_blocks = functools.partial(make_cache, options=self._options)
        make = seeing(ContinuousBatchingManager._create_batch_processor, PagedAttentionCache=with_blocks)
        try:
            self._loop_processor = make(self)
        except BaseException:
            self._put_attention_back()  # nobody else would
            raise
        return self._loop_processor
