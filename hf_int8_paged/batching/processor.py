"""The engine's processor of batches, with a step that has no rows, and with word of requests that are gone."""

from __future__ import annotations

from typing import Any

from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.requests import RequestState

from .router import Router


class BatchProcessor(ContinuousBatchProcessor):
    """transformers' `ContinuousBatchProcessor`, which differs in two things.

    * A request that returns several sequences is forked before its prompt's last token is computed. Where one token is
      all that is left of the prompt, it gets no row in that step; if nobody else has one, the model computes nothing.
    * The router hears which cancelled requests are gone, a step later: the one at hand may still deliver.
    """

    output_router: Router

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._gone: set[str] = set()
        runner: Any = self.model_runner
        scheduler: Any = self.scheduler
        compute, clear = runner.compute_batch, scheduler.clear_cancelled_requests

        def compute_rows(model: Any, batch_data: dict[str, Any]) -> None:
            if batch_data["input_ids"].numel():
                compute(model, batch_data)

        def clear_and_tell() -> list[RequestState]:
            self.output_router.are_gone(self._gone)
            self._gone = set(scheduler._requests_to_cancel)
            return clear()

        runner.compute_batch = compute_rows
        scheduler.clear_cancelled_requests = clear_and_tell
