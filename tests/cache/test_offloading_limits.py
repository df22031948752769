"""What an offloaded cache refuses, and that it is then what it was: full disks, forks, threads, windows that stay."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_int8_paged import CacheFullError, PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.offloading import mapped
from tests.persistence.histories import assert_same, model_called, step
from tests.persistence.test_processes import in_a_fork

from .offloaded import WAYS, choose, offloaded, slots_of
from .test_max_bytes import refusal_of
from .test_shared_pool_threads import run_together

resource = pytest.importorskip("resource")


@pytest.mark.parametrize("refused", range(12))
def test_a_full_disk_is_a_full_cache_that_stays_what_it_was(
    refused: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every file of the first prompt and of growth; four tensors in each of three layers."""
    model = model_called("llama")
    plain, cache = PagedInt8Cache(model.config, backend=backend), offloaded(model.config, "mapped", backend=backend)
    reserve, left = os.posix_fallocate, [refused]

    def fallocate(descriptor: int, offset: int, size: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, size)

    for tokens in (20, 1, 300):
        monkeypatch.setattr(mapped.os, "posix_fallocate", fallocate)
        left[0] = refused
        if tokens != 1:
            with pytest.raises(
                CacheFullError, match=r"No space left on device: [\d,]+ bytes for an offloaded layer in "
            ):
                step(model, cache, 2, tokens)
        monkeypatch.undo()
        assert_same(cache, plain)
        assert torch.equal(step(model, cache, 2, tokens), step(model, plain, 2, tokens))
    assert_same(cache, plain)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system gives no room in advance")
def test_a_file_has_its_room_before_anybody_writes_to_it(tmp_path: Path) -> None:
    """With a limit of the system's own, which a page of a mapping beyond the end of its file would meet too late."""
    model = model_called("llama")
    cache = offloaded(model.config, "mapped", offload_folder=tmp_path)
    step(model, cache, 1, 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(CacheFullError, match=r"File too large: [0-9,]+ bytes for an offloaded layer"):
            step(model, cache, 1, 900)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache.get_seq_length() == 20
    step(model, cache, 1, 900)
    assert not list(tmp_path.iterdir()), "the files have no name"


def test_no_descriptor_stays_open_and_no_mapping_outlives_the_cache(tmp_path: Path) -> None:
    model = model_called("llama")
    cache = offloaded(model.config, "mapped", offload_folder=tmp_path)
    before = len(os.listdir("/dev/fd"))
    for tokens in (20, 200, 400):
        step(model, cache, 2, tokens)
    assert len(os.listdir("/dev/fd")) == before
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) in maps.read_text()
        del cache
        assert str(tmp_path) not in maps.read_text()


def test_a_folder_that_is_gone_is_named_and_the_step_can_be_repeated(tmp_path: Path) -> None:
    model, folder = model_called("llama"), tmp_path / "folder"
    folder.mkdir()
    cache, plain = offloaded(model.config, "mapped", offload_folder=folder), PagedInt8Cache(model.config)
    for one in (cache, plain):
        step(model, one, 1, 20)
    folder.rmdir()
    message = "no file can be made for an offloaded layer.*; make the folder again and repeat the step.*" + str(folder)
    with pytest.raises(FileNotFoundError, match=message):
        step(model, cache, 1, 900)
    folder.mkdir()
    assert torch.equal(step(model, cache, 1, 900), step(model, plain, 1, 900))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"offload_folder: no file can be made in .*Permission denied"):
        PagedInt8Pool(offloading=True, offload_folder=tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_limits_in_bytes_count_blocks_wherever_they_are(way: str) -> None:
    model = model_called("llama")
    plain = PagedInt8Cache(model.config, max_bytes=100_000)
    cache = offloaded(model.config, way, max_bytes=100_000)
    for one in (plain, cache):
        step(model, one, 2, 40)
        with pytest.raises(CacheFullError, match="max_bytes=100000"):
            step(model, one, 2, 400)
    slots = sum(slot.buffer.nbytes for slot in slots_of(cache).slots) if way == "copied" else 0
    assert cache.nbytes_allocated == plain.nbytes_allocated + slots
    assert cache.nbytes_used == plain.nbytes_used
    assert_same(cache, plain)


@pytest.mark.parametrize(("name", "limit"), [("llama", 400_000), ("gemma2", 2_000_000)])
@pytest.mark.parametrize("resident_layers", [0, 2])
def test_slots_count_for_limits_in_bytes(name: str, limit: int, resident_layers: int, backend: str) -> None:
    """However a cache fills, its blocks and slots are never more than the limit."""
    model = model_called(name)
    for batch, prompt in ((1, 40), (3, 17), (2, 150)):
        cache = offloaded(model.config, "copied", max_bytes=limit, resident_layers=resident_layers, backend=backend)
        before, refused = 0, None
        for tokens in (prompt, *[1, 7, 30] * 40):
            before, refused = cache.get_seq_length(), refusal_of(model, cache, batch, tokens)
            if refused is not None:
                break
            assert any(slot.buffer.nbytes for slot in slots_of(cache).slots)
            assert cache.nbytes_allocated <= limit
        assert refused is not None
        assert f"max_bytes={limit}" in refused
        assert cache.get_seq_length() == before > 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("resident_layers", [0, 1])
def test_the_tokens_that_the_error_names_fit_beside_slots(name: str, resident_layers: int, backend: str) -> None:
    model, limit = model_called(name), 400_000
    for more in (0, 1):
        cache = offloaded(
            model.config, "copied", max_bytes=limit, resident_layers=resident_layers, backend=backend, sink_tokens=0
        )
        step(model, cache, 1, 20)  # which shows where layers go
        cache.reset()
        fits = cache.pool.tokens_for(limit)
        if not more:
            step(model, cache, 1, fits)
            assert cache.nbytes_allocated <= limit
            continue
        with pytest.raises(CacheFullError, match=f"max_bytes={limit} .* holds {fits} tokens of one sequence"):
            step(model, cache, 1, fits + more)


def test_a_first_prompt_that_fits_without_slots_only_is_taken_back(backend: str) -> None:
    model = model_called("llama")
    plain = PagedInt8Cache(model.config, backend=backend)
    step(model, plain, 1, 100)
    limit = plain.nbytes_allocated
    cache = offloaded(model.config, "copied", max_bytes=limit, backend=backend)
    for _ in range(2):
        with pytest.raises(CacheFullError, match=rf"max_bytes={limit} .* holds \d+ tokens of one sequence"):
            step(model, cache, 1, 100)
        assert cache.get_seq_length() == 0
        assert cache.nbytes_allocated <= limit
    step(model, cache, 1, 40)
    assert cache.nbytes_allocated <= limit


@pytest.mark.parametrize("way", WAYS)
def test_layers_that_cannot_leave(way: str) -> None:
    model = model_called("gemma2")
    cache = offloaded(model.config, way, offload_only_non_sliding=True)
    step(model, cache, 2, 40)
    (windowed, *_) = (layer for layer in range(4) if cache.layers[layer].is_sliding)
    cache.offload(windowed)  # as in transformers: only_non_sliding leaves it where it is
    with pytest.raises(ValueError, match=rf"layer {windowed} has a window and stays"):
        cache.offload(windowed, only_non_sliding=False)
    with pytest.raises(IndexError):
        cache.offload(9)
    cache.offload(-1)
    assert cache.only_non_sliding
    with pytest.raises(AttributeError, match="on a stream of its own"):
        cache.prefetch_stream  # noqa: B018


@pytest.mark.parametrize("way", WAYS)
def test_pickle_is_refused_as_ever(way: str) -> None:
    model = model_called("llama")
    cache = offloaded(model.config, way)
    step(model, cache, 1, 20)
    with pytest.raises(TypeError, match=r"cache.save\(path\)"):
        pickle.dumps(cache)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_is_refused_what_both_would_write_to(tmp_path: Path) -> None:
    model = model_called("llama")
    unused = offloaded(model.config, "mapped")
    plain, cache = PagedInt8Cache(model.config), offloaded(model.config, "mapped")
    for one in (plain, cache):
        step(model, one, 2, 20)

    def go_on() -> bool:
        path = tmp_path / "cache"
        for attempt in (
            lambda: step(model, cache, 2, 1),
            lambda: cache.fork().save(path),
            lambda: cache.layers[0].keys + 0,
        ):
            with pytest.raises(RuntimeError, match="this process was forked while layers were offloaded"):
                attempt()
        step(model, unused, 2, 20)  # it has files of its own
        return torch.equal(step(model, unused, 2, 1), step(model, plain, 2, 1))

    assert in_a_fork(go_on)
    assert torch.equal(step(model, cache, 2, 1), step(model, plain, 2, 1))


def test_threads_share_a_pool_of_mapped_layers(backend: str) -> None:
    model = model_called("llama")
    pool = PagedInt8Pool(backend=backend, offloading=True, center_keys=False)
    right = PagedInt8Cache(model.config, backend=backend, center_keys=False)
    logits = [step(model, right, 2, tokens) for tokens in (37, *[1] * 12)]

    def work(number: int) -> None:
        cache = PagedInt8Cache(model.config, pool=pool)
        for tokens, expected in zip((37, *[1] * 12), logits):
            assert torch.equal(step(model, cache, 2, tokens), expected)

    run_together(work, 4)


def test_a_pool_that_copies_serves_one_thread_as_long_as_it_lives() -> None:
    model = model_called("llama")
    pool = choose(PagedInt8Pool(offloading=True), "copied")
    mine, other = (PagedInt8Cache(model.config, pool=pool) for _ in range(2))
    step(model, mine, 2, 20)
    refused: list[Any] = []

    def work() -> None:
        try:
            step(model, other, 2, 20)
        except RuntimeError as error:
            refused.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(refused) == 1
    assert "as long as it lives" in refused[0]
    assert "give each thread a pool of its own" in refused[0]
    assert other.get_seq_length() == 0
    step(model, other, 2, 20)  # nothing is left of the refused step
    step(model, mine, 2, 1)
