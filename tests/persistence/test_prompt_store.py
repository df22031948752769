"""A folder of prompts: the longest stored prefix is found, by several processes too."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hf_int8_paged import PagedInt8Cache, PagedInt8Pool, PromptStore
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.persistence import tensor_file
from hf_int8_paged.persistence.prompt_keys import model_key
from tests.models import random_ids
from tests.processes import HANGS

from .histories import assert_same, model_called
from .prompts import feed, stored


@pytest.mark.parametrize(
    ("asked", "common", "known"),
    [(100, 100, 99), (120, 100, 100), (100, 50, 48), (130, 31, 16), (100, 15, 0), (17, 17, 16), (1, 1, 0)],
)
def test_the_longest_stored_prefix_is_found(tmp_path: Path, asked: int, common: int, known: int) -> None:
    """Whole blocks of 16, or the whole stored prompt; the last token is always the model's."""
    model, store = model_called("llama"), PromptStore(tmp_path)
    ids = random_ids(1, 100)
    original = stored(store, model, ids)
    other = random_ids(1, asked, seed=5)
    other[:, :common] = ids[:, :common]
    if common < min(asked, 100):
        other[:, common] = ids[:, common] % 126 + 1  # another token than the stored one
    cache, length = store.get(model, other)
    assert length == cache.get_seq_length() == known
    if known:
        twin = original.fork()
        twin.crop(known - 100)
        assert_same(cache, twin)
        assert torch.equal(feed(model, cache, other, known), feed(model, twin, other, known))


def test_a_window_cannot_go_back_so_only_whole_prompts_are_found(tmp_path: Path) -> None:
    model, store = model_called("gemma2"), PromptStore(tmp_path)
    ids = random_ids(1, 130)
    for length in (60, 90):
        stored(store, model, ids[:, :length])
    assert store.get(model, ids)[1] == 90
    assert store.get(model, ids[:, :89])[1] == 60
    assert store.get(model, ids[:, :59])[1] == 0
    cache, length = store.get(model, ids[:, :60])
    assert cache.get_seq_length() == length
    assert length == 59


def test_generate_goes_on_from_a_stored_prompt_and_stores_its_own(tmp_path: Path) -> None:
    store, model = PromptStore(tmp_path), model_called("llama")
    generate: Any = model.generate
    ids = random_ids(1, 70)
    texts = []
    for expected in (0, 64, 64):  # whole blocks of the 89 tokens that were stored
        cache, known = store.get(model, ids)
        assert known == expected
        assert cache.get_seq_length() == known
        output = generate(ids, **{CACHE_ARGUMENT: cache}, max_new_tokens=20, do_sample=False)
        store.put(cache, output)
        texts.append(output)
    assert torch.equal(texts[1], texts[2])
    assert store.get(model, torch.cat([texts[0], ids], dim=1))[1] == 89  # a turn later: all but the newest token


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    model, store = model_called("llama"), PromptStore(tmp_path)
    ids = random_ids(1, 60)
    stored(store, model, ids)
    tuned: Any = model_called("llama")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.001)
    assert store.get(tuned, ids)[1] == 0
    assert PromptStore(tmp_path, center_keys=False).get(model, ids)[1] == 0
    assert store.get(model, ids)[1] == 59


def test_the_first_and_the_last_element_of_a_large_parameter_count() -> None:
    """Of 28,311,552 elements, as an embedding has: float32 cannot count them one by one."""
    config, keys = model_called("llama").config, set()
    for place in (None, 0, -1):
        model: Any = torch.nn.Module()
        model.config = config
        model.weight = torch.nn.Parameter(torch.zeros(28311552, dtype=torch.float16))
        if place is not None:
            model.weight.data[place] = 1
        keys.add(model_key(model))
    assert len(keys) == 3


def test_the_least_recently_used_are_evicted_and_the_limit_holds(tmp_path: Path) -> None:
    model = model_called("llama")
    prompts = [random_ids(1, 64, seed=seed) for seed in range(6)]
    store = PromptStore(tmp_path)
    stored(store, model, prompts[0])
    one = store.nbytes
    store = PromptStore(tmp_path, max_bytes=int(3.5 * one))
    for number, ids in enumerate(prompts):
        stored(store, model, ids)
        assert store.get(model, prompts[0])[1] == 63  # used again each time
        assert store.nbytes <= 3.5 * one
        assert len(store) == min(number + 1, 3)
        files = [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
        assert sum(path.stat().st_size for path in files) == store.nbytes
    assert [store.get(model, ids)[1] for ids in prompts] == [63, 0, 0, 0, 63, 63]
    with pytest.raises(ValueError, match="more than max_bytes=100 of the store"):
        stored(PromptStore(tmp_path / "small", max_bytes=100), model, prompts[0])
    store.clear()
    assert (len(store), store.nbytes, store.get(model, prompts[0])[1]) == (0, 0, 0)


def test_a_damaged_or_missing_file_is_passed_over_and_forgotten(tmp_path: Path) -> None:
    model, store = model_called("llama"), PromptStore(tmp_path)
    ids = random_ids(1, 96)
    for length in (96, 64, 40):
        stored(store, model, ids[:, :length])
    longest = max(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(longest.read_bytes())
    data[-500] ^= 1
    longest.write_bytes(data)
    assert store.get(model, ids)[1] == 64
    assert len(store) == 2
    max(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_size).unlink()
    assert store.get(model, ids)[1] == 40
    assert len(store) == 1


def test_prompts_of_one_pool(tmp_path: Path) -> None:
    """With centred keys another prompt's centre stops a pool from taking a file, without them nothing does."""
    model, store = model_called("llama"), PromptStore(tmp_path, center_keys=False)
    prompts = [random_ids(1, 64, seed=seed) for seed in range(3)]
    for ids in prompts:
        cache, _ = store.get(model, ids)
        feed(model, cache, ids)
        store.put(cache, ids)
    pool = PagedInt8Pool(center_keys=False)
    with pytest.raises(ValueError, match="center_keys"):
        store.get(model, prompts[0], pool)
    store = PromptStore(tmp_path)
    caches = [store.get(model, ids, pool) for ids in prompts]
    assert [length for _, length in caches] == [63] * 3
    assert pool.allocators["full_attention"].num_used == 12


def test_what_is_no_prompt_is_refused(tmp_path: Path) -> None:
    model, store = model_called("llama"), PromptStore(tmp_path)
    cache = PagedInt8Cache(model.config)
    with pytest.raises(ValueError, match="which model computed the cache is not known"):
        store.put(cache, [1, 2])
    with pytest.raises(ValueError, match="holds 0 sequences of 0 tokens"):
        store.put(cache, [1, 2], model)
    feed(model, cache, random_ids(2, 20))
    with pytest.raises(ValueError, match="holds 2 sequences of 20 tokens"):
        store.put(cache, range(20), model)
    with pytest.raises(ValueError, match="a prompt is one sequence of tokens"):
        store.get(model, random_ids(2, 20))
    with pytest.raises(TypeError, match="token ids must be integers"):
        store.get(model, torch.rand(5))
    with pytest.raises(ValueError, match="holds caches that grow"):
        PromptStore(tmp_path, max_batch_size=2)
    fixed = PagedInt8Cache(model.config, max_batch_size=1, max_cache_len=40)
    feed(model, fixed, random_ids(1, 20))
    with pytest.raises(ValueError, match="preallocated cache is not stored"):
        store.put(fixed, range(20), model)


def test_others_delete_a_file_that_is_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may evict it between its header and its tensors: that is a prompt which is not stored."""
    model, store, ids = model_called("llama"), PromptStore(tmp_path), random_ids(1, 60)
    stored(store, model, ids)
    opened: list[Path] = []

    def after_a_deletion(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(path)
        path.unlink()
        return safe_open(path, *args, **kwargs)

    monkeypatch.setattr(tensor_file, "safe_open", after_a_deletion)
    assert store.get(model, ids)[1] == 0
    assert len(opened) == 1
    assert len(store) == 0


def test_others_replace_a_file_that_is_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Header and tensors are of one file."""
    model, path, other = model_called("llama"), tmp_path / "cache", tmp_path / "other"
    caches = [PagedInt8Cache(model.config) for _ in range(2)]
    for cache, tokens, place in zip(caches, (60, 90), (path, other), strict=True):
        feed(model, cache, random_ids(1, tokens))
        cache.save(place)

    def after_a_replacement(path: Path, *args: Any, **kwargs: Any) -> Any:
        if other.exists():
            other.replace(path)
        return safe_open(path, *args, **kwargs)

    monkeypatch.setattr(tensor_file, "safe_open", after_a_replacement)
    assert_same(PagedInt8Cache.load(path, model.config), caches[1])


def _serve(folder: str, seed: int, requests: int, failures: Any, served: Any) -> None:
    """Requests whose prompts begin alike; what comes of a stored prefix is compared with what comes without."""
    try:
        torch.set_num_threads(1)
        draw, model = random.Random(seed), model_called("llama")
        store = PromptStore(folder, max_bytes=120_000)
        for _ in range(requests):
            ids = random_ids(1, draw.randint(20, 110), seed=draw.randrange(3))
            ids[:, draw.randint(17, 60) :] = draw.randint(1, 100)
            cache, known = store.get(model, ids)
            alone = PagedInt8Cache(model.config)
            ours, theirs = feed(model, cache, ids, known), feed(model, alone, ids)
            assert ours.shape[1] == ids.shape[1] - known
            # The prefix was stored by a prompt that went on otherwise, whose mean key is its centre: rounding differs.
            if (ours[:, -1] - theirs[:, -1]).abs().max() > 0.5:
                failures.put(f"{known} of {ids.shape[1]} tokens: logits differ")
            store.put(cache, ids)
            served.set()
    except BaseException as error:
        failures.put(repr(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes by a signal")
def test_several_processes_share_a_store_also_where_some_are_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    served, busy = context.Event(), context.Event()
    workers = [context.Process(target=_serve, args=(str(tmp_path), seed, 25, failures, served)) for seed in range(3)]
    doomed = context.Process(target=_serve, args=(str(tmp_path), 9, 10_000, failures, busy))
    for process in (*workers, doomed):
        process.start()
    assert busy.wait(HANGS), failures.get()  # in the middle of its requests
    assert doomed.pid is not None
    os.kill(doomed.pid, signal.SIGKILL)
    for process in (*workers, doomed):
        process.join()
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in workers] == [0, 0, 0]
    store, model = PromptStore(tmp_path, max_bytes=120_000), model_called("llama")
    stored(store, model, random_ids(1, 33, seed=99))
    assert 0 < store.nbytes <= 120_000
    files = {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    assert files == store._index.sizes()
