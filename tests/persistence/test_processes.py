"""A process that forks with a cache, and one that is spawned with one as argument."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_int8_paged import PagedInt8Cache

from .histories import assert_same, model_called, prompt, step

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def in_a_fork(work: Callable[[], bool]) -> bool:
    """Whether ``work`` returns True in a forked process."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            # The threads of torch's pool do not follow: without this it waits for them, with any cache.
            torch.set_num_threads(1)
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("options", [{}, {"max_batch_size": 2, "max_cache_len": 80}], ids=["growing", "preallocated"])
def test_both_sides_of_a_fork_go_on(options: dict[str, Any]) -> None:
    model = model_called("gemma2")
    cache, stays = PagedInt8Cache(model.config, **options), PagedInt8Cache(model.config, **options)
    for one in (cache, stays):
        prompt(model, one)
    expected = [step(model, stays, 2, tokens) for tokens in (1, 20, 1)]

    def go_on() -> bool:
        return all(torch.equal(step(model, cache, 2, tokens), x) for tokens, x in zip((1, 20, 1), expected))

    assert in_a_fork(go_on)
    assert int(cache.get_seq_length()) == 38  # what the other side writes is its own
    assert go_on()
    assert_same(cache, stays)


def test_a_lock_that_another_thread_holds_at_the_fork_stops_nobody() -> None:
    model = model_called("llama")
    cache = PagedInt8Cache(model.config)
    prompt(model, cache)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with cache.pool.access.exclusive():
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        assert in_a_fork(lambda: bool(step(model, cache, 2, 1).isfinite().all()))
    finally:
        release.set()
        thread.join()
    step(model, cache, 2, 1)


def test_a_cache_is_no_argument_of_a_spawned_process(tmp_path: Path) -> None:
    model = model_called("llama")
    cache = PagedInt8Cache(model.config)
    prompt(model, cache)
    process = multiprocessing.get_context("spawn").Process(target=print, args=(cache,))
    with pytest.raises(
        TypeError, match=r"cache.save\(path\) and PagedInt8Cache.load\(path, config\) bring it to another"
    ):
        process.start()
    # The remedy that it names: tests/persistence/test_save_load.py loads a file in another process.
    cache.save(tmp_path / "cache")
    assert_same(PagedInt8Cache.load(tmp_path / "cache", model.config), cache)
