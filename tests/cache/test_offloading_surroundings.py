"""Offloaded caches among other things: folders, disks that stay full, threads that ended, files, stores."""

from __future__ import annotations

import _thread
import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_int8_paged import CacheFullError, PagedInt8Cache, PagedInt8Pool, PromptStore
from hf_int8_paged.offloading import mapped
from hf_int8_paged.offloading.copied import CopiedLayers
from tests.models import random_ids
from tests.persistence.histories import assert_same, model_called, step

from .offloaded import WAYS, choose, offloaded, slots_of


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["lfm2_moe", "qwen3_next"])
def test_layers_without_keys_stay(name: str, way: str) -> None:
    model = model_called(name)
    cache, plain = offloaded(model.config, way), PagedInt8Cache(model.config)
    for one in (cache, plain):
        step(model, one, 2, 20)
    for layer in range(len(cache.layers)):
        cache.offload(layer)
        cache.prefetch(layer)
    assert torch.equal(step(model, cache, 2, 1), step(model, plain, 2, 1))


def test_a_folder_is_the_same_wherever_the_process_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_called("llama")
    for folder in ("near", "far"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    cache = offloaded(model.config, "mapped", offload_folder="near")
    step(model, cache, 1, 20)
    monkeypatch.chdir(tmp_path / "far")
    step(model, cache, 1, 400)
    monkeypatch.setenv("HOME", str(tmp_path))
    PagedInt8Pool(offloading=True, offload_folder=Path("~/near"))
    with pytest.raises(ValueError, match="is empty"):
        PagedInt8Pool(offloading=True, offload_folder="")


def test_a_disk_that_stays_full_holds_a_shorter_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, used, reserve = model_called("llama"), [0], os.posix_fallocate

    def fallocate(descriptor: int, offset: int, size: int) -> None:
        used[0] += size
        if used[0] > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, size)

    monkeypatch.setattr(mapped.os, "posix_fallocate", fallocate)
    cache = offloaded(model.config, "mapped")
    with pytest.raises(CacheFullError):
        step(model, cache, 1, 600)
    used[0] = 0  # what was reserved has gone with the cache's layers
    step(model, cache, 1, 100)
    assert cache.get_seq_length() == 100


def test_no_file_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system has only so many files, and a process only so many that are open."""
    model = model_called("llama")
    cache, plain = offloaded(model.config, "mapped"), PagedInt8Cache(model.config)
    for one in (cache, plain):
        step(model, one, 1, 20)
    for number in (errno.ENOSPC, errno.EMFILE):

        def refuse(number: int = number, **_: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(mapped.tempfile, "TemporaryFile", refuse)
        with pytest.raises(CacheFullError, match=os.strerror(number)):
            step(model, cache, 1, 400)
        monkeypatch.undo()
        assert_same(cache, plain)


def test_a_pool_that_copies_goes_on_after_a_thread_that_python_did_not_start() -> None:
    model = model_called("llama")
    cache, ended = offloaded(model.config, "copied"), threading.Event()

    def work() -> None:
        step(model, cache, 1, 20)
        ended.set()

    ident = _thread.start_new_thread(work, ())
    assert ended.wait(600)
    while ident in __import__("sys")._current_frames():
        pass
    step(model, cache, 1, 1)
    assert cache.get_seq_length() == 21


def test_loading_into_an_empty_pool_copies_nothing_to_it(tmp_path: Path) -> None:
    model = model_called("llama")
    plain = PagedInt8Cache(model.config)
    step(model, plain, 1, 30)
    plain.save(tmp_path / "cache.safetensors")
    pool = choose(PagedInt8Pool(offloading=True), "copied")
    loaded = PagedInt8Cache.load(tmp_path / "cache.safetensors", model.config, pool)
    assert torch.equal(step(model, loaded, 1, 1), step(model, plain, 1, 1))
    assert all(slot.buffer.nbytes for slot in slots_of(loaded).slots)


def test_a_centre_that_a_file_brings_is_not_used_by_halves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An exception between the two places that know a layer's centre; few keys get none of their own."""
    model: Any = model_called("llama")
    interrupted: list[int] = []
    donor = PagedInt8Cache(model.config)
    step(model, donor, 2, 37)
    donor.save(tmp_path / "cache.safetensors")
    pool, replaced = choose(PagedInt8Pool(offloading=True), "copied"), CopiedLayers.replaced

    def interrupt(self: CopiedLayers, layer: int, storage: Any, home: Any) -> Any:
        result = replaced(self, layer, storage, home)
        if home is not None and storage.num_blocks and storage.key_center is not home.key_center and not interrupted:
            interrupted.append(layer)
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(CopiedLayers, "replaced", interrupt)
    with pytest.raises(KeyboardInterrupt):
        PagedInt8Cache.load(tmp_path / "cache.safetensors", model.config, pool)
    mine, plain = PagedInt8Cache(model.config, pool=pool), PagedInt8Cache(model.config)
    for tokens in (5, 1):
        assert torch.equal(step(model, mine, 1, tokens), step(model, plain, 1, tokens))
        for layer in range(len(mine.layers)):
            mine.offload(layer)


def test_a_prompt_that_was_found_offloads_too(tmp_path: Path) -> None:
    model = model_called("llama")
    store, ids = PromptStore(tmp_path, offloading=True), random_ids(1, 60)
    cache, known = store.get(model, ids)
    step(model, cache, 1, 40)
    store.put(cache, ids)
    found, known = store.get(model, ids)
    assert (known, found.offloading) == (40, True)
    assert found.pool.offloaded is not None
    assert_same(found, cache)
