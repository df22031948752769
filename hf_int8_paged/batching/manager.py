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
from .centers import check_centers, key_centers
from .engine import check_engine_options, seeing
from .processor import BatchProcessor
from .refusals import RequestTooLongError, check_most
from .requests import RequestsManager

logger = logging.get_logger(__name__)


class PagedInt8BatchingManager(RequestsManager):
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
        max_request_tokens: most tokens of a request, new ones included, at least 2; None: as many as all blocks hold.

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
        check_most(max_request_tokens)
        if centers is not None:
            check_centers(centers, model.config.get_text_config().num_hidden_layers)
        model.eval()
        held = key_centers(model) if centers is None else centers
        self._options = Int8Options(held, rotation, sink_tokens, backend)
        generation_config = model.generation_config if generation_config is None else generation_config
        self._attention_before: str | None = None  # not the engine's own, which a stop puts back under a running loop
        self._attention_lock = threading.Lock()
        self._loop_processor: ContinuousBatchProcessor | None = None
        self.model = model  # type: ignore[assignment]
        try:
            super().__init__(model, generation_config, config, workload_hints, max_request_tokens=max_request_tokens)
        except BaseException:
            self._put_attention_back()
            raise

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

    @property
    def max_request_tokens(self) -> int | None:
        """Most tokens that one request can have; None until the blocks are allocated, if nothing else limits it."""
        limits = [super().max_request_tokens, None if self.batch_processor is None else self.cache.max_request_tokens]
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
            drain_queue(self.cancel_queue)
            self.output_router.all_are_gone()
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
        make = seeing(
            ContinuousBatchingManager._create_batch_processor,
            PagedAttentionCache=with_blocks,
            ContinuousBatchProcessor=BatchProcessor,
        )
        try:
            self._loop_processor = make(self)
        except BaseException:
            self._put_attention_back()  # nobody else would
            raise
        return self._loop_processor
