"""A cache that was saved and loaded goes on as the one that stayed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_int8_paged import CacheFileError, CacheFullError, PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.layer import PagedInt8Layer
from hf_int8_paged.persistence.tensor_file import TensorFile
from tests.cache.conftest import BACKENDS
from tests.models import TINY, random_ids
from tests.processes import HANGS

from .histories import HISTORIES, HYBRIDS, KINDS, assert_same, beams, model_called, padded, prompt, step


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.safetensors"


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_loaded_cache_goes_on_bit_for_bit(name: str, kind: str, history: str, backend: str, path: Path) -> None:
    """The next steps' logits, on the same backend: a token, a chunk, a crop and one more token."""
    model = model_called(name)
    cache = PagedInt8Cache(model.config, backend=backend, **KINDS[kind])
    HISTORIES[history](model, cache)
    cache.save(path)
    loaded = PagedInt8Cache.load(path, model.config, backend=backend)
    assert_same(loaded, cache)
    if history == "reset" and kind == "growing":
        return  # a pool that was used before keeps its centre, also where the loaded one does
    batch = cache._batch or 2
    for tokens in (1, 19):
        assert torch.equal(step(model, loaded, batch, tokens), step(model, cache, batch, tokens))
    assert_same(loaded, cache)
    for one in (loaded, cache):
        one.crop(-2 if name == "llama" else 0)
        one.reorder_cache(torch.arange(batch).flip(0))
    assert torch.equal(step(model, loaded, batch, 1), step(model, cache, batch, 1))


@pytest.mark.parametrize("loader", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_file_of_one_backend_loads_into_every_other(name, kind, loader, backend, path) -> None:
    """What is stored is the same, bit for bit; so is what the loader's kernels make of it and of its own copy."""
    model = model_called(name)
    cache = PagedInt8Cache(model.config, backend=backend, **KINDS[kind])
    padded(model, cache)
    step(model, cache, 3, 1)
    cache.save(path)
    loaded = PagedInt8Cache.load(path, model.config, backend=loader)
    assert {layer.storage.backend for layer in loaded.layers} == {loader}
    assert_same(loaded, cache)
    again = path.with_name("again")
    loaded.save(again)
    assert_same(PagedInt8Cache.load(again, model.config, backend=backend), cache)
    # Tables, rows and scales do not depend on who writes them.
    assert TensorFile(path).checksums == TensorFile(again).checksums


@pytest.mark.parametrize("name", HYBRIDS)
def test_states_that_are_not_keys_come_along(name, backend, path) -> None:
    model = model_called(name)
    cache = PagedInt8Cache(model.config, backend=backend)
    step(model, cache, 2, 25)
    step(model, cache, 2, 1)
    cache.save(path)
    loaded = PagedInt8Cache.load(path, model.config, backend=backend)
    assert_same(loaded, cache)
    assert any(not isinstance(layer, PagedInt8Layer) or hasattr(layer, "linear_part") for layer in loaded.layers)
    for _ in range(2):
        assert torch.equal(step(model, loaded, 2, 1), step(model, cache, 2, 1))
    assert_same(loaded, cache)


def test_another_process_generates_the_same_tokens(path, tiny_model_folder) -> None:
    """What a user does: a prompt, a file, and tokens in another process."""
    begin = f"""
import torch
from transformers import LlamaForCausalLM
from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
model = LlamaForCausalLM.from_pretrained({str(tiny_model_folder)!r}, attn_implementation="int8_paged")
ids = torch.arange(1, 60)[None]
path = {str(path)!r}
"""
    fill = """
cache = PagedInt8Cache(model.config)
with torch.no_grad():
    model(ids[:, :50], **{CACHE_ARGUMENT: cache})
cache.save(path)
"""
    load = "cache = PagedInt8Cache.load(path, model.config)"
    end = """
tokens = model.generate(ids, **{CACHE_ARGUMENT: cache}, max_new_tokens=12, do_sample=False)
print(tokens[0, 59:].tolist())
"""
    said = []
    for middle in (fill, load):
        run = subprocess.run(
            [sys.executable, "-c", begin + middle + end], capture_output=True, text=True, timeout=HANGS
        )
        assert run.returncode == 0, run.stderr[-2000:]
        said.append(run.stdout)
    assert said[0] == said[1]
    assert len(said[0].split(",")) == 12


def test_only_blocks_in_use_are_written_and_shared_ones_once(path) -> None:
    model = model_called("llama")
    cache = PagedInt8Cache(model.config)
    step(model, cache, 1, 160)
    cache.save(path)
    alone = path.stat().st_size
    assert cache.nbytes_used < alone < cache.nbytes_used + 8000  # the header
    cache.batch_repeat_interleave(4)
    cache.save(path)
    assert path.stat().st_size - alone < 1000
    step(model, cache, 4, 1)  # each its own last block
    cache.save(path)
    loaded = PagedInt8Cache.load(path, model.config)
    assert loaded.pool.allocators["full_attention"].num_used == 10 + 4
    assert loaded.nbytes_used == cache.nbytes_used


def test_slots_that_hold_no_token_are_not_written(path) -> None:
    """Memory that was never written may hold anything, also of another cache."""
    model = model_called("gemma2")
    for options in KINDS.values():
        cache, files = PagedInt8Cache(model.config, **options), []
        prompt(model, cache)
        for poison in (127, -128):
            for layer in cache.layers:
                behind = 38 % 16
                for block in layer.room.tokens().block_table[:, 2].tolist():
                    for name in ("k_scales", "v_scales"):
                        getattr(layer.storage, name)[:, block, behind:] = poison
            cache.save(path)
            files.append(path.read_bytes())
        assert files[0] == files[1]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_caches_of_one_pool_are_loaded_into_one_pool(name, backend, path) -> None:
    model = model_called(name)
    first = PagedInt8Cache(model.config, backend=backend)
    beams(model, first)
    first.save(path)
    pool = PagedInt8Pool(backend=backend)
    caches = [PagedInt8Cache.load(path, model.config, pool) for _ in range(3)]
    for cache in caches:
        assert_same(cache, first)
    for tokens in (1, 20):
        expected = step(model, first, 4, tokens)
        for cache in caches:
            assert torch.equal(step(model, cache, 4, tokens), expected)
    del caches, cache
    assert all(allocator.num_used == 0 for allocator in pool.allocators.values())


def test_a_pool_that_cannot_take_the_file_is_left_as_it_was(path) -> None:
    model = model_called("llama")
    cache = PagedInt8Cache(model.config)
    step(model, cache, 1, 100)
    cache.save(path)
    with pytest.raises(CacheFullError, match="max_tokens=64"):
        PagedInt8Cache.load(path, model.config, pool := PagedInt8Pool(max_tokens=64))
    assert not pool.nbytes_used
    options: dict[str, Any] = {"block_size": 32, "rotation": None, "center_keys": False}
    for option, value in options.items():
        with pytest.raises(CacheFileError, match=f"options.{option}: .*, but the pool's is {value}"):
            PagedInt8Cache.load(path, model.config, PagedInt8Pool(**{option: value}))
    # Another prompt, so another centre.
    pool = PagedInt8Pool()
    other = PagedInt8Cache(model.config, pool=pool)
    with torch.no_grad():
        model(random_ids(1, 40, seed=77), **{CACHE_ARGUMENT: other})
    before, used = other.fork(), pool.nbytes_used
    with pytest.raises(CacheFileError, match=r"key_center: the pool holds tokens of another cache.*center_keys=False"):
        PagedInt8Cache.load(path, model.config, pool)
    assert pool.nbytes_used == used
    assert_same(other, before)
    del other, before
    assert_same(PagedInt8Cache.load(path, model.config, pool), cache)  # nobody else has tokens there now


def test_another_model_is_refused_by_the_field_that_differs(path) -> None:
    cache = PagedInt8Cache(model_called("llama").config)
    prompt(model_called("llama"), cache)
    cache.save(path)
    for name, field in (("mistral", "model_type"), ("qwen3", "model_type")):
        with pytest.raises(CacheFileError, match=f"config: it was filled by another model: {field} is"):
            PagedInt8Cache.load(path, model_called(name).config)
    changed = model_called("llama").config
    changed.rope_parameters = {**changed.rope_parameters, "rope_theta": 5.0}
    with pytest.raises(CacheFileError, match=r"rope_parameters is .* in the file and .*5.0.* in this config"):
        PagedInt8Cache.load(path, changed)
    with pytest.raises(TypeError, match="needs the model's config"):
        PagedInt8Cache.load(path, None)


def test_an_interrupted_step_is_not_saved(path) -> None:
    model = model_called("llama")
    cache = PagedInt8Cache(model.config)
    prompt(model, cache)
    rows = torch.randn(2, 2, 1, 16)
    cache.update(rows, rows, 0)
    with pytest.raises(ValueError, match="the last forward pass updated only 1 of"):
        cache.save(path)
    assert not path.exists()
    cache.crop(-1)
    cache.save(path)


def test_what_cannot_be_written_leaves_the_old_file(path, monkeypatch) -> None:
    model = model_called("llama")
    cache = PagedInt8Cache(model.config)
    prompt(model, cache)
    cache.save(path)
    before = path.read_bytes()
    step(model, cache, 2, 1)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(FileNotFoundError):
        cache.save(path.parent / "no folder" / "file")
    step(model, cache, 2, 1)  # and the cache goes on


def test_paths_are_those_that_people_write(tmp_path, monkeypatch) -> None:
    """``~`` is the home, as it is for ``offload_folder``."""
    model = model_called("llama")
    cache = PagedInt8Cache(model.config)
    prompt(model, cache)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    cache.save("~/cache")
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    for path in ("~/cache", Path("~/cache"), tmp_path / "cache"):
        assert_same(PagedInt8Cache.load(path, model.config), cache)
    for call in (cache.save, lambda path: PagedInt8Cache.load(path, model.config)):
        with pytest.raises(ValueError, match="path is empty; give the name of a file"):
            call("")
    with pytest.raises(IsADirectoryError, match="this is a folder"):
        cache.save(tmp_path)
    with pytest.raises(CacheFileError, match="this is a folder"):
        PagedInt8Cache.load(tmp_path, model.config)
    with pytest.raises(CacheFileError, match="there is no such file"):
        PagedInt8Cache.load(tmp_path / "nothing", model.config)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_tiny_model_in_half_precision(name, path) -> None:
    model: Any = model_called(name)
    model.to(torch.bfloat16)
    cache = PagedInt8Cache(model.config)
    prompt(model, cache)
    cache.save(path)
    loaded = PagedInt8Cache.load(path, model.config)
    assert_same(loaded, cache)
    assert loaded.layers[0].keys.dtype == torch.bfloat16
    assert torch.equal(step(model, loaded, 2, 1), step(model, cache, 2, 1))
