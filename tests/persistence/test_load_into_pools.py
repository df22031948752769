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
