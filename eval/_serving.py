"""Ways to serve a trace of requests at a budget of bytes for keys and values, and what they took."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from _trace import Arrival
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from hf_int8_paged.batching import PagedInt8BatchingManager
from hf_int8_paged.batching.pages import bytes_per_page
from hf_int8_paged.cache_argument import CACHE_ARGUMENT


class Served(NamedTuple):
    """How a trace was served.

    Attributes:
        seconds: from the first arrival to the last answer.
        latencies: seconds from each request's arrival to its whole answer.
        tokens: generated tokens that were asked for.
        nbytes: that keys and values were given.
        slots: tokens that there was room for.
        samples: of blocks over time, see `sample`.
    """

    seconds: float
    latencies: list[float]
    tokens: int
    nbytes: int
    slots: int
    samples: list[dict[str, float]]


def dense_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of a token's keys and values in the model's dtype, all layers."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize


def int8_bytes_per_token(model: PreTrainedModel) -> int:
    """The same as int8 rows with their scales."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * bytes_per_page(config.num_key_value_heads, head_dim, 1)


def sample(cache: Any, begin: float) -> dict[str, float]:
    """Blocks of a cache at a moment: those that requests use, of these the shared ones, those kept for their content,
    and free ones."""
    used = shared = kept = total = 0
    for pages in cache.cache_allocators.values():
        tables = [block for blocks in list(pages.block_table.values()) for block in list(blocks)]
        used += len(set(tables))
        shared += len(pages.ledger.shared_ref_counts)
        kept += len(pages.ledger.cached_blocks)
        total += cache.num_sectors * pages.blocks_per_sector // len(cache.cache_allocators)
    return {
        "second": time.monotonic() - begin,
        "used": used,
        "shared": shared,
        "kept": kept,
        "free": total - used - kept,
    }


def continuously(
    model: PreTrainedModel, trace: list[Arrival], budget: int, *, int8: bool, page_size: int, batch_tokens: int
) -> Served:
    """Serve a trace with transformers' engine: over int8 blocks, or over its own pages in the model's dtype."""
    per_token = int8_bytes_per_token(model) if int8 else dense_bytes_per_token(model)
    # The two sectors count that the engine never gives out, and rows of first tokens, which take less than a block.
    blocks = budget // (per_token * page_size) - (3 if int8 else 2)
    generation = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1)
    config = ContinuousBatchingConfig(
        num_blocks=blocks,
        page_size=page_size,
        max_batch_tokens=batch_tokens,
        max_memory_percent=0.9,
        auto_switch_to_flash=False,
    )
    manager: Any
    if int8:
        manager = PagedInt8BatchingManager(model, generation, config)
    else:
        model.set_attn_implementation("sdpa")
        manager = ContinuousBatchingManager(model, generation, config)  # type: ignore[arg-type]
    manager.batch_processor = manager._create_batch_processor()
    cache = manager.batch_processor.cache
    manager.start()
    begin, samples, over = time.monotonic(), [], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            samples.append(sample(cache, begin))

    def arrive() -> None:
        for i, request in enumerate(trace):
            time.sleep(max(0.0, begin + request.second - time.monotonic()))
            manager.add_request(request.prompt, request_id=str(i), max_new_tokens=request.new_tokens)

    ends: dict[int, float] = {}
    with ThreadPoolExecutor(2) as threads:
        threads.submit(watch)
        arrivals = threads.submit(arrive)
        try:
            while len(ends) < len(trace):
                result = manager.get_result(timeout=1)
                if arrivals.done():
                    arrivals.result()  # raises what a refused request has raised
                if result is not None:
                    if result.error is not None:
                        raise RuntimeError(result.error)
                    ends[int(result.request_id)] = time.monotonic() - begin
                elif not manager.is_running():
                    raise RuntimeError("the engine has stopped")
        finally:
            over.set()
    manager.stop()
    manager.destroy()
    latencies = [ends[i] - request.second for i, request in enumerate(trace)]
    nbytes = cache.nbytes if int8 else cache.cache_tensor.nbytes
    return Served(max(ends.values()), latencies, _asked(trace), nbytes, cache.num_sectors * page_size, samples)


def in_static_batches(model: PreTrainedModel, trace: list[Arrival], budget: int) -> Served:
    """Serve a trace with `generate`, in a thread of its own as the engine: torch serves the main thread otherwise. What
    has arrived goes into a batch, as many as the budget allows for the longest request, and the next batch waits for
    all of them."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_in_static_batches, model, trace, budget).result()


@torch.no_grad()
def _in_static_batches(model: PreTrainedModel, trace: list[Arrival], budget: int) -> Served:
    model.set_attn_implementation("sdpa")
    per_token = dense_bytes_per_token(model)
    longest = max(len(request.prompt) + request.new_tokens for request in trace)
    most = max(1, budget // (per_token * longest))
    begin, ends, waiting = time.monotonic(), [], list(trace)
    while waiting:
        time.sleep(max(0.0, begin + waiting[0].second - time.monotonic()))
        now = time.monotonic() - begin
        batch = [request for request in waiting[:most] if request.second <= now]
        waiting = waiting[len(batch) :]
        width = max(len(request.prompt) for request in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long, device=model.device)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        generate: Any = model.generate
        generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(request.new_tokens for request in batch),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **{CACHE_ARGUMENT: DynamicCache(config=model.config)},
        )
        ends += [time.monotonic() - begin] * len(batch)
    latencies = [end - request.second for end, request in zip(ends, trace)]
    slots = most * longest
    return Served(ends[-1], latencies, _asked(trace), slots * per_token, slots, [])


def _asked(trace: list[Arrival]) -> int:
    return sum(request.new_tokens for request in trace)


Way = Callable[[PreTrainedModel, list[Arrival], int], Served]
