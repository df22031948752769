"""The folder of a prompt store: whose files are in it, and what happens to it behind the store's back."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_int8_paged import PagedInt8Cache, PromptStore
from hf_int8_paged.persistence import prompt_index
from tests.models import random_ids

from .histories import model_called
from .prompts import feed, stored

IDS = random_ids(1, 60)


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_files_of_others_stay(tmp_path: Path) -> None:
    """Weights, own saves, and names that look almost like the store's; what a killed process has left goes."""
    model, store = model_called("llama"), PromptStore(tmp_path)
    others = [tmp_path / name for name in ("model.safetensors", f"{'A' * 64}.safetensors", f"{'a' * 63}.safetensors")]
    for path in others:
        path.write_bytes(b"weights")
    left, folder = tmp_path / f"{'0a' * 32}.safetensors", tmp_path / f"{'0b' * 32}.safetensors"
    left.write_bytes(b"a file without an entry")
    folder.mkdir()  # cannot be deleted as a file, and stops nobody
    stored(store, model, IDS)
    assert all(path.read_bytes() == b"weights" for path in others)
    assert not left.exists()
    assert store.get(model, IDS)[1] == 59
    store.clear()
    assert all(path.exists() for path in others)
    assert files_in(tmp_path) == sorted([*others, folder])


@pytest.mark.skipif(os.name == "nt", reason="part files are locked on POSIX")
def test_what_killed_processes_were_writing_is_deleted(tmp_path: Path) -> None:
    import fcntl

    model, store = model_called("llama"), PromptStore(tmp_path)
    name = f".{'0a' * 32}.safetensors"
    for act in (lambda: stored(store, model, IDS), store.clear):
        left, written, other = (tmp_path / x for x in (f"{name}.abc.part", f"{name}.def.part", ".mine.xyz.part"))
        for path in (left, written, other):
            path.write_bytes(b"half a prompt")
        with written.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            act()
            assert (left.exists(), written.exists(), other.exists()) == (False, True, True)


def _delete_files(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _cleared(store: PromptStore, model: Any) -> int:
    store.clear()
    return len(store)


#: Calls of a store with one prompt, which answer 0 where it is lost.
_USES: tuple[Callable[[PromptStore, Any], int], ...] = (
    lambda store, model: store.get(model, IDS)[1],
    lambda store, model: len(store),
    lambda store, model: store.nbytes,
    lambda store, model: PromptStore(store.folder, max_bytes="1GiB").get(model, IDS)[1],
    _cleared,
)


def test_a_folder_that_is_emptied_or_deleted_is_an_empty_store(tmp_path: Path) -> None:
    model, folder = model_called("llama"), tmp_path / "prompts"
    store = PromptStore(folder)
    for lose in (_delete_files, shutil.rmtree):
        for use in _USES:
            stored(store, model, IDS)
            lose(folder)
            assert use(store, model) == 0
        stored(store, model, IDS)
        lose(folder)
        stored(store, model, IDS)
        assert store.get(model, IDS)[1] == 59


def test_the_folder_is_the_one_it_was_where_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model, store = model_called("llama"), PromptStore("prompts")
    stored(store, model, IDS)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store.get(model, IDS)[1] == 59
    assert store.folder == tmp_path / "prompts"
    assert PromptStore("~/prompts").folder == tmp_path / "home" / "prompts"
    with pytest.raises(ValueError, match="folder is empty"):
        PromptStore("")
    with pytest.raises(TypeError, match="folder must be a path, got 5"):
        PromptStore(5)  # type: ignore[arg-type]


def damage(index: Path, where: str) -> None:
    """Beginning: no database any more. Middle: opens, and fails where its rows are read."""
    data = bytearray(index.read_bytes())
    for place in range(0, 100) if where == "beginning" else range(4096, len(data)):
        data[place] = 0xA5
    index.write_bytes(data)


@pytest.mark.parametrize("where", ["beginning", "middle"])
def test_a_damaged_index_is_begun_anew(tmp_path: Path, where: str) -> None:
    """Its prompts are lost, as they can be; no call raises."""
    model, store = model_called("llama"), PromptStore(tmp_path)
    index = tmp_path / "index.sqlite"
    for use in _USES:
        stored(store, model, IDS)
        damage(index, where)
        assert use(store, model) == 0
    stored(store, model, IDS)
    damage(index, where)
    stored(store, model, IDS[:, :40])
    assert (store.get(model, IDS)[1], len(store), len(files_in(tmp_path))) == (40, 1, 1)
    stored(store, model, IDS)
    assert store.get(model, IDS)[1] == 59


def test_several_threads_find_the_damage_at_once(tmp_path: Path) -> None:
    """One begins the index anew, and none deletes another's new one."""
    model, ids = model_called("llama"), [random_ids(1, 40, seed=seed) for seed in range(4)]
    store, failures = PromptStore(tmp_path), []
    for _ in range(3):
        stored(store, model, IDS)
        damage(tmp_path / "index.sqlite", "beginning")
        together = threading.Barrier(len(ids))

        def work(mine: Any, together: threading.Barrier = together) -> None:
            try:
                cache = PagedInt8Cache(model.config)
                feed(model, cache, mine)
                together.wait()
                store.put(cache, mine, model)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(x,)) for x in ids]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        store.get(model, IDS)
        assert len(store) == len(files_in(tmp_path))


def test_what_the_index_cannot_do_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the error names the folder, and the file without an entry does not stay."""
    model, store = model_called("llama"), PromptStore(tmp_path)

    def full(*args: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("hf_int8_paged.prompt_store.add", full)
    with pytest.raises(OSError, match=f"prompt store {tmp_path}.* disk is full"):
        stored(store, model, IDS)
    assert not files_in(tmp_path)
    assert len(store) == 0
    monkeypatch.undo()
    stored(store, model, IDS)
    assert store.get(model, IDS)[1] == 59
    (tmp_path / "index.sqlite").unlink()
    (tmp_path / "index.sqlite").mkdir()
    for use in (lambda: store.get(model, IDS), lambda: len(store), store.clear, lambda: PromptStore(tmp_path)):
        with pytest.raises(OSError, match=f"prompt store {tmp_path}.*unable to open database file"):
            use()


def test_a_store_that_cannot_be_written_to_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file is passed over there, and cannot be forgotten."""
    model, store = model_called("llama"), PromptStore(tmp_path)
    stored(store, model, IDS[:, :40])
    stored(store, model, IDS)
    longest = max(files_in(tmp_path), key=lambda path: path.stat().st_size)
    longest.write_bytes(longest.read_bytes()[:-1] + b"?")
    real = sqlite3.connect

    def read_only(path: Path, **options: Any) -> sqlite3.Connection:
        return real(f"file:{path}?mode=ro", uri=True, **options)

    monkeypatch.setattr(prompt_index.sqlite3, "connect", read_only)
    assert PromptStore(tmp_path).get(model, IDS)[1] == 40
    with pytest.raises(OSError, match="readonly database"):
        store.clear()


def test_a_prompt_whose_file_is_gone_is_stored_again(tmp_path: Path) -> None:
    model, store = model_called("llama"), PromptStore(tmp_path)
    stored(store, model, IDS)
    (path,) = files_in(tmp_path)
    path.unlink()
    stored(store, model, IDS)
    assert files_in(tmp_path) == [path]
    assert store.get(model, IDS)[1] == 59


def test_an_entry_that_says_another_length_than_its_file_is_forgotten(tmp_path: Path) -> None:
    model, store = model_called("llama"), PromptStore(tmp_path)
    stored(store, model, IDS)
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        database.execute("UPDATE entries SET tokens = 48")
    cache, known = store.get(model, IDS)
    assert cache.get_seq_length() == known == 0
    assert len(store) == 0


def test_a_smaller_limit_counts_at_once(tmp_path: Path) -> None:
    model, store = model_called("llama"), PromptStore(tmp_path)
    for seed in range(4):
        stored(store, model, random_ids(1, 50, seed=seed))
    half = store.nbytes // 2
    smaller = PromptStore(tmp_path, max_bytes=half)
    assert 0 < store.nbytes <= half
    assert len(files_in(tmp_path)) == len(store) == 2
    stored(store, model, random_ids(1, 50, seed=9))
    assert store.nbytes > half
    stored(smaller, model, random_ids(1, 50, seed=9))  # is there already
    assert 0 < store.nbytes <= half
    assert store.get(model, random_ids(1, 50, seed=9))[1] == 49


def test_a_prompt_above_the_limit_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = model_called("llama"), PromptStore(tmp_path, max_bytes=1000)
    monkeypatch.setattr(PagedInt8Cache, "save", lambda *_: pytest.fail("it was written"))
    with pytest.raises(ValueError, match=r"takes \d+ bytes, more than max_bytes=1000 of the store"):
        stored(store, model, IDS)
