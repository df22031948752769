"""``max_bytes``: never more than that is allocated, and what it holds is what the error says."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from hf_int8_paged import CacheFullError, PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.byte_sizes import bytes_as_text, parse_bytes
from hf_int8_paged.kernels import load_backend
from tests.models import random_ids, tiny_model


def step(model: Any, cache: Any, batch: int, tokens: int) -> None:
    with torch.no_grad():
        model(random_ids(batch, tokens), past_key_values=cache)


def refusal_of(model: Any, cache: Any, batch: int, tokens: int) -> str | None:
    """What a step says that does not fit, or None."""
    try:
        step(model, cache, batch, tokens)
    except CacheFullError as error:
        return str(error)
    return None


def model_called(name: str) -> Any:
    model = tiny_model(name)
    model.set_attn_implementation("int8_paged")
    return model


class Allocated:
    """Bytes of the blocks that a backend has handed out and that somebody still holds, now and at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str):
        self.now = self.most = 0
        module: Any = load_backend(backend)
        empty = module.empty

        def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = empty(*args, **kwargs)
            self.now += tensor.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(tensor, self._freed, tensor.nbytes)
            return tensor

        monkeypatch.setattr(module, "empty", counted)

    def _freed(self, count: int) -> None:
        self.now -= count


@pytest.mark.parametrize("sink_tokens", [0, 1, 4])
@pytest.mark.parametrize("max_bytes", [20_000, 100_000, "0.2 MiB"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_no_more_is_allocated_at_any_moment(name, max_bytes, sink_tokens, backend, monkeypatch) -> None:
    model, allocated = model_called(name), Allocated(monkeypatch, backend)
    limit = parse_bytes(max_bytes) if isinstance(max_bytes, str) else max_bytes
    cache = PagedInt8Cache(model.config, max_bytes=max_bytes, backend=backend, sink_tokens=sink_tokens)
    full = 0
    for batch, prompt in ((1, 40), (3, 17), (2, 150), (1, 16)):
        cache.reset()
        for tokens in (prompt, *[1, 7, 30] * 10):
            before = cache.get_seq_length()
            said = refusal_of(model, cache, batch, tokens)
            assert cache.nbytes_allocated <= limit
            if said is not None:
                assert f"max_bytes={limit} ({bytes_as_text(limit)}), which holds" in said
                assert cache.get_seq_length() == before
                full += 1
                break
    assert full >= 1 or name == "mistral"  # whose layers hold a window each, however many tokens come
    first_tokens = cache.nbytes_allocated - cache.pool.nbytes_allocated
    assert allocated.most <= limit
    assert allocated.now + first_tokens == cache.nbytes_allocated


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("max_bytes", [260_000, 423_457])
def test_the_tokens_that_the_error_names_are_those_that_fit(name, max_bytes, backend) -> None:
    model = model_called(name)
    cache = PagedInt8Cache(model.config, max_bytes=max_bytes, backend=backend)
    with pytest.raises(CacheFullError, match=r"holds \d+ tokens of one sequence") as raised:
        step(model, cache, 1, 3000)
    assert cache.nbytes_allocated == 0
    named = int(str(raised.value).partition("which holds ")[2].split()[0])
    first_token = cache.pool.first_tokens_bytes(1, torch.float32)
    assert named == cache.pool.tokens_for(max_bytes - first_token) > 0
    step(model, cache, 1, named)
    for more, fits in ((0, True), (1, False)):
        cache = PagedInt8Cache(model.config, max_bytes=max_bytes, backend=backend, sink_tokens=0)
        said = refusal_of(model, cache, 1, cache.pool.tokens_for(max_bytes) + more)
        assert (said is None) == fits


def test_no_tokens_are_named_where_none_are_known(backend) -> None:
    """Layers with windows hold the newest tokens only, so one sequence never fills a limit; and of layers whose keys
    have yet to come nothing is known where no config speaks of them."""
    model = model_called("mistral")
    cache = PagedInt8Cache(model.config, max_bytes=150_000, backend=backend)
    said = refusal_of(model, cache, 50, 30)
    assert said is not None
    assert ", which holds one sequence of any length, as every layer has a window; take fewer" in said
    step(model, cache, 1, 3000)
    k = torch.randn(1, 2, 100, 16)
    size = PagedInt8Cache([(k, k)], backend=backend).nbytes_allocated
    for layers, max_bytes in ((1, 100), (3, 2 * size)):
        with pytest.raises(CacheFullError, match=rf"max_bytes={max_bytes} \(.*\); free sequences, shorten") as raised:
            PagedInt8Cache([(k, k)] * layers, max_bytes=max_bytes, backend=backend)
        assert "holds" not in str(raised.value)


def test_a_pools_limit_names_the_tokens_before_the_first_keys_come(backend) -> None:
    """A pool and a cache with the same limit say the same, and nothing is allocated for a prompt that cannot fit."""
    model = model_called("llama")
    for max_bytes in (2_000, 20_000):
        own = PagedInt8Cache(model.config, max_bytes=max_bytes, backend=backend)
        pool = PagedInt8Pool(max_bytes=max_bytes, backend=backend)
        shared = PagedInt8Cache(model.config, pool=pool)
        said = [refusal_of(model, cache, 1, 100) for cache in (own, shared)]
        assert said[0] is not None
        assert said[0] == said[1]
        assert pool.nbytes_allocated == 0


def test_without_a_word_of_sizes_in_the_config_the_first_prompt_is_taken_back(monkeypatch, backend) -> None:
    """The layers then fill the memory one by one, and the one that does not fit refuses; a shorter prompt fits."""
    monkeypatch.setattr("hf_int8_paged.cache.layer_geometry", lambda _: [])
    model = model_called("llama")
    cache = PagedInt8Cache(model.config, max_bytes=20_000, backend=backend)
    for _ in range(2):
        with pytest.raises(CacheFullError, match="max_bytes=20000"):
            step(model, cache, 1, 100)
        assert cache.get_seq_length() == 0
        assert cache.nbytes_allocated <= 20_000
    step(model, cache, 1, 30)
    assert cache.get_seq_length() == 30
    assert cache.nbytes_allocated <= 20_000


def test_caches_of_one_pool_have_one_limit(backend) -> None:
    model = model_called("llama")
    pool = PagedInt8Pool(max_bytes="100 KB", backend=backend)
    caches = [PagedInt8Cache(model.config, pool=pool)]
    while refusal_of(model, caches[-1], 1, 30) is None:
        caches.append(PagedInt8Cache(model.config, pool=pool))
    assert len(caches) > 3
    first_tokens = sum(cache.nbytes_allocated - pool.nbytes_allocated for cache in caches)
    assert 50_000 < pool.nbytes_allocated + first_tokens <= 100_000
    del caches[0]
    step(model, caches[-1], 1, 30)  # what one gives back another takes
    with pytest.raises(ValueError, match=r"max_bytes: .* belong to the pool"):
        PagedInt8Cache(model.config, pool=pool, max_bytes=5)


def test_a_preallocated_cache_names_the_length_that_fits(backend) -> None:
    model = model_called("gemma2")
    options: dict[str, Any] = {"max_batch_size": 2, "max_bytes": 500_000, "backend": backend}
    cache = PagedInt8Cache(model.config, max_cache_len=4000, **options)
    with pytest.raises(CacheFullError, match=r"max_bytes=500000 .* holds \d+ tokens of each") as raised:
        step(model, cache, 2, 20)
    assert cache.nbytes_allocated == 0
    fits = int(str(raised.value).partition(" holds ")[2].split()[0])
    cache = PagedInt8Cache(model.config, max_cache_len=fits, **options)
    step(model, cache, 2, 20)
    assert 400_000 < cache.nbytes_allocated <= 500_000
    cache = PagedInt8Cache(model.config, max_cache_len=fits + 1, **options)
    with pytest.raises(CacheFullError):
        step(model, cache, 2, 20)


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 << 30), ("1.5 kb", 1500), ("4096", 4096), ("0.1MiB", 104857), (" 2 TB ", 2 * 10**12), ("7b", 7)],
)
def test_bytes_as_people_write_them(text, count) -> None:
    assert parse_bytes(text) == count
    assert PagedInt8Pool(max_bytes=text).max_bytes == count


@pytest.mark.parametrize("wrong", ["8 gigs", "", "GiB", "-1GiB", "1e9", "8GiB8"])
def test_what_is_no_number_of_bytes(wrong) -> None:
    with pytest.raises(ValueError, match=r"max_bytes: .* is no number of bytes; write it as '8GiB'"):
        PagedInt8Pool(max_bytes=wrong)


@pytest.mark.parametrize(("wrong", "error"), [(0, ValueError), ("0", ValueError), (1.5, TypeError), (True, TypeError)])
def test_limits_that_make_no_sense(wrong, error) -> None:
    with pytest.raises(error, match="max_bytes must be"):
        PagedInt8Pool(max_bytes=wrong)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_allocator_s_refusal_is_a_full_cache(error, backend, monkeypatch) -> None:
    model, module = model_called("llama"), load_backend(backend)
    cache = PagedInt8Cache(model.config, backend=backend)
    step(model, cache, 1, 16)

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "empty", refuse)
        with pytest.raises(CacheFullError, match="memory was refused") as raised:
            step(model, cache, 1, 1)
    assert raised.value.__cause__ is error
    assert cache.get_seq_length() == 16
    step(model, cache, 1, 1)
