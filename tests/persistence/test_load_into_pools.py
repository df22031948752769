"""Loading into a pool that others use: while it grows, after it has refused, and where the file is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_int8_paged import CacheFileError, CacheFullError, PagedInt8Cache, PagedInt8Pool, PromptStore
from hf_int8_paged.kernels import load_backend
from hf_int8_paged.persistence import loading
from hf_int8_paged.persistence.tensor_file import CacheFileMismatchError, TensorFile
from tests.cache.test_max_bytes import refusal_of
from tests.models import random_ids

from .histories import assert_same, model_called, step


@pytest.fixture
def model() -> Any:
    return model_called("llama")


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> tuple[PagedInt8Cache, Path]:
    cache = PagedInt8Cache(model.config)
    step(model, cache, 1, 30)
    cache.save(tmp_path / "cache.safetensors")
    return cache, tmp_path / "cache.safetensors"


def fail_in(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """Raise where a tensor of this name is read."""
    read = TensorFile.read

    def reading(self: TensorFile, asked: str, *args: Any) -> torch.Tensor:
        if asked == name:
            raise error
        return read(self, asked, *args)

    monkeypatch.setattr(TensorFile, "read", reading)


@pytest.mark.parametrize("segments", [True, False], ids=["grows_by_segments", "grows_by_copying"])
@pytest.mark.parametrize("place", ["layers.0.v", "write 0", "write 2"])
def test_the_pool_may_grow_meanwhile(model, tmp_path, monkeypatch, place: str, segments: bool) -> None:
    """Another cache takes blocks, and a pool that grows by copying replaces its tensors."""
    monkeypatch.setattr(load_backend("reference"), "SEGMENTS", segments)
    options: dict[str, Any] = {"backend": "reference", "center_keys": False}
    cache, path = PagedInt8Cache(model.config, **options), tmp_path / "cache.safetensors"
    step(model, cache, 1, 30)
    cache.save(path)
    pool = PagedInt8Pool(**options)
    other, grown = PagedInt8Cache(model.config, pool=pool), []
    read, write = TensorFile.read, loading._write

    def reading(self: TensorFile, asked: str, *args: Any) -> torch.Tensor:
        if asked == place:
            grown.append(step(model, other, 1, 400))
        return read(self, asked, *args)

    def writing(room: Any, *args: Any) -> None:
        if place == f"write {room.index}":
            grown.append(step(model, other, 1, 400))
        write(room, *args)

    monkeypatch.setattr(TensorFile, "read", reading)
    monkeypatch.setattr(loading, "_write", writing)
    loaded = PagedInt8Cache.load(path, model.config, pool)
    assert len(grown) == 1
    assert_same(loaded, cache)


def test_a_pool_that_has_refused_a_prompt_takes_a_file(model, saved) -> None:
    cache, path = saved
    pool = PagedInt8Pool(max_bytes=20_000)
    refused = PagedInt8Cache(model.config, pool=pool)
    pool.forecast.clear()  # so that the layers fill the memory one by one, and the one that does not fit refuses
    with pytest.raises(CacheFullError, match="max_bytes=20000"):
        step(model, refused, 1, 100)
    assert pool.nbytes_allocated > 0
    loaded = PagedInt8Cache.load(path, model.config, pool)
    assert_same(loaded, cache)
    assert pool.bytes_held <= 20_000


def test_a_file_that_does_not_fit_leaves_no_memory_taken(model, tmp_path: Path, backend: str) -> None:
    """First tokens count before the pool grows, as in a step; the exact limit is the one that a step has."""
    path = tmp_path / "cache.safetensors"
    cache = PagedInt8Cache(model.config)
    step(model, cache, 3, 67)
    cache.save(path)
    needed = PagedInt8Cache.load(path, model.config, backend=backend).nbytes_allocated
    for max_bytes in (needed - 1, 52_115, needed // 2, 500):
        pool = PagedInt8Pool(max_bytes=max_bytes, backend=backend)
        with pytest.raises(CacheFullError, match=rf"max_bytes={max_bytes} .*take fewer sequences"):
            PagedInt8Cache.load(path, model.config, pool)
        assert pool.bytes_held == 0
        if max_bytes > 20_000:
            step(model, PagedInt8Cache(model.config, pool=pool), 2, 5)
    pool = PagedInt8Pool(max_bytes=needed, backend=backend)
    assert_same(PagedInt8Cache.load(path, model.config, pool), cache)
    assert pool.nbytes_used == 0


def test_a_pool_that_was_full_takes_a_file(model, saved, backend: str) -> None:
    """Its blocks make room for first tokens, and for those of another group."""
    cache, path = saved
    pool = PagedInt8Pool(max_bytes=30_000, backend=backend)
    full = PagedInt8Cache(model.config, pool=pool)
    while refusal_of(model, full, 1, 3) is None:
        pass
    full.reset()
    loaded = [PagedInt8Cache.load(path, model.config, pool) for _ in range(2)]
    for one in loaded:
        assert_same(one, cache)
    assert pool.bytes_held <= 30_000


def test_layers_of_others_that_are_gone_make_room_for_a_file(model, saved, backend: str) -> None:
    """Those that the file adds need not have as many blocks as theirs."""
    cache, path = saved
    k = torch.randn(1, 2, 240, 16)
    pool = PagedInt8Pool(max_bytes=20_000, backend=backend)
    other = PagedInt8Cache([(k, k)], pool=pool)
    assert pool.nbytes_allocated > 15_000
    del other
    assert_same(PagedInt8Cache.load(path, model.config, pool), cache)


@pytest.mark.parametrize("limited", [False, True])
def test_another_centre_is_found_before_the_pool_grows(model, tmp_path: Path, limited: bool) -> None:
    store, ids = PromptStore(tmp_path), random_ids(1, 320)
    cache, _ = store.get(model, ids)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    store.put(cache, ids)
    (path,) = tmp_path.glob("*.safetensors")
    pool = PagedInt8Pool(max_bytes=40_000 if limited else None)
    other = PagedInt8Cache(model.config, pool=pool)
    step(model, other, 1, 40)
    before = pool.nbytes_allocated
    with pytest.raises(CacheFileMismatchError, match="key_center: the pool holds tokens of another cache"):
        PagedInt8Cache.load(path, model.config, pool)
    assert store.get(model, torch.cat([ids, ids], 1), pool=pool)[1] == 0
    assert pool.nbytes_allocated == before
    assert len(store) == 1


def test_arguments_are_refused_as_those_of_a_new_cache(model, saved, monkeypatch) -> None:
    """Before the file is opened: nothing is said of a file that is sound."""
    cache, path = saved
    for wrong, error, words in (
        ({"max_bytes": "abc"}, ValueError, "max_bytes: 'abc' is no number of bytes"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1"),
        ({"max_bytes": 1.5}, TypeError, "max_bytes must be an integer"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
        ({"backend": 1}, TypeError, "backend must be a backend's name"),
        ({"device": "moon"}, ValueError, "unknown device 'moon'"),
        ({"pool": PagedInt8Pool(), "max_bytes": "1GiB"}, ValueError, "max_bytes: .* belong to the pool"),
        ({"pool": PagedInt8Pool(), "backend": "reference"}, ValueError, "backend: .* belong to the pool"),
        ({"pool": "x"}, TypeError, "pool must be a PagedInt8Pool or None, got 'x'"),
        ({"pool": cache}, TypeError, "pool must be a PagedInt8Pool or None"),
    ):
        for file in (path, path.parent / "nothing"):
            with pytest.raises(error, match=words) as raised:
                PagedInt8Cache.load(file, model.config, **wrong)
            assert not isinstance(raised.value, CacheFileError)


def test_a_pool_of_another_model_does_not_fit(model, saved) -> None:
    _, path = saved
    pool = PagedInt8Pool()
    k = torch.randn(1, 4, 20, 32)
    other = PagedInt8Cache([(k, k)], pool=pool)
    before = pool.nbytes_allocated
    with pytest.raises(CacheFileMismatchError, match=r"layers\[0\]: layer 0 of this pool has 4 KV heads"):
        PagedInt8Cache.load(path, model.config, pool)
    assert pool.nbytes_allocated == before
    assert other.get_seq_length() == 20


@pytest.mark.parametrize("damaged", ["layers.0.v", "layers.2.k_scales", "layers.2.first_keys"])
def test_a_damaged_file_leaves_no_centre(model, saved, monkeypatch, damaged: str) -> None:
    _, path = saved
    pool = PagedInt8Pool()
    fail_in(monkeypatch, damaged, CacheFileError("damaged"))
    with pytest.raises(CacheFileError, match="damaged"):
        PagedInt8Cache.load(path, model.config, pool)
    assert pool.nbytes_used == 0
    assert all(pool.lacks_center(layer) for layer in pool.storages)


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_refused_memory_is_a_full_cache(model, saved, monkeypatch, error: Exception) -> None:
    _, path = saved
    fail_in(monkeypatch, "layers.1.k", error)
    with pytest.raises(CacheFullError, match="memory was refused"):
        PagedInt8Cache.load(path, model.config)


@pytest.mark.parametrize("error", [CacheFileMismatchError, CacheFileError])
def test_a_store_keeps_what_others_may_take(model, tmp_path, monkeypatch, error: type[CacheFileError]) -> None:
    """Also in a folder whose name looks like the message of another case."""
    folder = tmp_path / "key_center"
    store, ids = PromptStore(folder), random_ids(1, 64)
    cache, _ = store.get(model, ids)
    step(model, cache, 1, 64)
    store.put(cache, ids)
    fail_in(monkeypatch, "layers.1.key_center", error(f"{folder}: layers.1.key_center"))
    assert store.get(model, ids)[1] == 0
    kept = int(error is CacheFileMismatchError)
    assert len(store) == len(list(folder.glob("*.safetensors"))) == kept


def test_a_newer_format_is_no_damage(saved, monkeypatch) -> None:
    monkeypatch.setattr("hf_int8_paged.persistence.header.FORMAT_VERSION", 0)
    with pytest.raises(CacheFileMismatchError, match="update hf-int8-paged"):
        PagedInt8Cache.load(saved[1], saved[0]._config)
