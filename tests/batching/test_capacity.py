"""How many tokens a budget of memory holds, beside the engine's own 16-bit cache: computed, and really allocated."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, LlamaConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.requests import RequestState

from hf_int8_paged.batching import PagedInt8AttentionCache
from hf_int8_paged.batching.cache import Int8Options

from .models import batching_model, manager_for, prompts


def caches(head_dim: int, **options: Any) -> tuple[Any, Any]:
    """The engine's cache for bfloat16 and ours, made with the same options."""
    config = LlamaConfig(
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, head_dim=head_dim, hidden_size=8 * head_dim
    )
    config._attn_implementation = "flash_attention_2"  # which needs no masks: the engine's most frugal one
    made = []
    for make in (PagedAttentionCache, functools.partial(PagedInt8AttentionCache, options=Int8Options({}))):
        sizes = {"max_batch_tokens": 256, "max_requests_per_batch": 64, "max_memory_percent": 0.5}
        engine = ContinuousBatchingConfig(**sizes | options)
        engine.use_async_batching = False
        cache = make(
            config=config,
            continuous_batching_config=engine,
            device=torch.device("cpu"),
            distributed_helper=DistributedHelper(None, None),
            dtype=torch.bfloat16,
        )
        made.append(cache)
    return made[0], made[1]


def tokens_held(cache: PagedAttentionCache) -> int:
    """Tokens of requests of one block each that find room, until the next one does not."""
    count = 0
    while cache.can_store_request_tokens(RequestState(f"request {count}", [1]), 256):
        count += 1
    return 256 * count


@pytest.mark.parametrize(("head_dim", "least"), [(64, 1.9), (128, 1.96), (256, 1.97)])
def test_equal_bytes_hold_nearly_twice_the_tokens(head_dim: int, least: float) -> None:
    """Blocks and first tokens counted, no byte more than the engine's cache allocates."""
    budget = 64
    plain, _ = caches(head_dim, num_blocks=budget)
    dense_bytes = plain.cache_tensor.nbytes
    _, int8 = caches(head_dim, num_blocks=int(budget * least) + 1)
    assert int8.nbytes <= dense_bytes
    assert tokens_held(plain) == 256 * budget
    assert tokens_held(int8) >= least * 256 * budget
    int8.cache_tensor.fill_(1)  # every byte of it is memory


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_share_of_the_memory_holds_nearly_twice_the_tokens(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``max_memory_percent`` the engine counts what a step needs beside the blocks, of which int8 needs less."""
    breakdown = (torch.device("cpu"), 4 * 2**30, 0, 0)
    monkeypatch.setattr(
        "transformers.generation.continuous_batching.cache.get_device_and_memory_breakdown", lambda: breakdown
    )
    plain, int8 = caches(head_dim, max_memory_percent=0.25)
    assert int8.nbytes <= 2**30
    assert int8.num_sectors * 256 >= (1.9 if head_dim == 64 else 1.96) * plain.num_sectors * 256


def test_pages_of_16_tokens_lose_a_little_to_nothing() -> None:
    """Rows of first tokens are kept by token, so they do not grow with the number of blocks."""
    _, int8 = caches(128, num_blocks=64, page_size=16)
    before = int8.first_rows.nbytes
    for i in range(64):
        assert int8.can_store_request_tokens(RequestState(f"request {i}", [1, 2, 3]), 3)
    int8.first_rows.make_room()
    assert int8.first_rows.nbytes == before


def test_rows_of_first_tokens_are_given_back() -> None:
    """Requests that begin differently need a row each while they run; afterwards a few rows are kept."""
    _, int8 = caches(64, num_blocks=600, page_size=16)
    rows = int8.first_rows
    for token in range(300):
        assert int8.can_store_request_tokens(RequestState(f"request {token}", [token]), 1)
    assert len(set(rows.rows([f"request {token}" for token in range(300)]))) == 300
    rows.make_room()
    held = rows.nbytes
    for token in range(300):
        int8.free_blocks(f"request {token}")
    for token in range(300, 600):
        assert int8.can_store_request_tokens(RequestState(f"request {token}", [token]), 1)
    rows.make_room()
    assert rows.nbytes == held


@pytest.mark.parametrize("blocks", ["made by start", "made before"])
def test_requests_that_come_before_the_blocks_are_answered_too(blocks: str) -> None:
    """One of them can never fit; the other one asks for no number of tokens and gets what there is room for."""
    model = batching_model("llama: full attention")
    with manager_for(model, {"max_new_tokens": None}, num_blocks=4) as manager:
        manager.batch_processor = None
        too_long = manager.add_request([5] * 100)
        manager.add_request([5] * 20)
        if blocks == "made before":
            manager.warmup()
        manager.start()
        result = manager.get_result(timeout=3600)
        assert result is not None
        assert result.request_id == too_long
        assert result.error is not None
        assert "all blocks together hold 64" in result.error
        result = manager.get_result(timeout=3600)
        assert result is not None
        assert (result.error, len(result.generated_tokens)) == (None, 44)
        manager.stop()


def test_a_manager_allocates_what_it_says() -> None:
    model = batching_model("gemma3: most layers windows")
    with manager_for(model, num_blocks=40) as manager:
        allocators: Any = manager.cache.cache_allocators
        layers = {layer for pages in allocators.values() for layer in pages.storages}
        assert layers == set(range(model.config.num_hidden_layers))
        storage = allocators["full_attention"].storages[1]
        assert storage.nbytes == manager.cache.num_sectors * manager.cache.bytes_per_sector
        assert isinstance(manager, ContinuousBatchingManager)


def test_what_can_never_fit_is_refused_and_the_rest_is_served() -> None:
    """The engine itself would stop at such a request, and fail all others."""
    model = batching_model("gemma2: softcap, half windows")
    with manager_for(model, num_blocks=8) as manager:
        most = manager.max_request_tokens
        assert most is not None
        manager.start()
        with pytest.raises(
            ValueError, match=rf"{most} tokens and may get 10 new ones, but all blocks together hold {most}"
        ):
            manager.add_request(prompts(1)[0][:1] * most)
        with pytest.raises(ValueError, match="at least one token"):
            manager.add_request([])
        name = manager.add_request(prompts(1)[0][:1] * (most - 10))
        result = manager.get_result(timeout=3600)
        assert result is not None
        while not result.is_finished():
            result = manager.get_result(timeout=3600)
            assert result is not None
        manager.stop(keep_for_next_session=True)
        assert (result.request_id, result.error, len(result.generated_tokens)) == (name, None, 10)
