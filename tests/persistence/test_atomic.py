"""Files that are written as a whole: whose they are, under which name, and on which file systems."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_int8_paged.persistence import atomic
from hf_int8_paged.persistence.atomic import replacing

fcntl = pytest.importorskip("fcntl")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="permissions, links and locks of POSIX")


@pytest.fixture(params=[0o022, 0o027, 0o000])
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write(path: Path, data: bytes = b"new") -> None:
    with replacing(path) as file:
        file.write(data)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_has_the_permissions_of_one_that_open_makes(mask, tmp_path, monkeypatch) -> None:
    """The process' mask is not touched, as other threads make files meanwhile."""

    def refuse(_: int) -> int:
        raise AssertionError("the mask is all threads' own")

    with monkeypatch.context() as patched:
        patched.setattr(os, "umask", refuse)
        write(tmp_path / "file")
    assert mode(tmp_path / "file") == 0o666 & ~mask


@pytest.mark.parametrize("permissions", [0o600, 0o664, 0o444])
def test_a_file_that_is_replaced_passes_its_permissions_on(permissions, tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(permissions)
    with replacing(path) as file:
        (part,) = tmp_path.glob(".file.*.part")
        assert mode(part) & ~permissions == 0  # nobody may read more of it while it is written
        file.write(b"new")
    assert (mode(path), path.read_bytes()) == (permissions, b"new")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_the_file_behind_it_is_written(there, tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    if there:
        target.write_bytes(b"old")
    link.symlink_to(Path("elsewhere", "target"))
    write(link)
    assert (link.is_symlink(), target.read_bytes()) == (True, b"new")
    assert sorted(tmp_path.iterdir()) == [target.parent, link]
    assert list(target.parent.iterdir()) == [target]


def test_links_in_a_circle_are_refused(tmp_path) -> None:
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "link")


def test_what_is_no_file_is_not_replaced(tmp_path) -> None:
    with pytest.raises(IsADirectoryError, match=f"'{tmp_path}'"):
        write(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"no regular file.*pipe"):
        write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert list(tmp_path.parent.glob(".*.part")) == []


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "漢" * 85, "n" * 241])
def test_a_name_may_be_as_long_as_the_file_system_takes(name, tmp_path) -> None:
    write(tmp_path / name)
    with replacing(tmp_path / name) as file:
        assert len(list(tmp_path.iterdir())) == 2  # two names, whatever they share
        file.write(b"newer")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"newer")]


def test_file_systems_without_locks(tmp_path, monkeypatch) -> None:
    """Nothing tells an abandoned file from one that is being written there: all stay."""

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with replacing(tmp_path / "file") as first:
        write(tmp_path / "file", b"second")
        first.write(b"first")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"first"


def test_where_only_the_folder_cannot_be_locked_nothing_is_deleted(tmp_path, monkeypatch) -> None:
    """A file would look abandoned between its creation and its lock."""
    abandoned = tmp_path / ".file.abcdefgh.part"
    abandoned.write_bytes(b"")
    flock = fcntl.flock

    def files_only(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(9, "Bad file descriptor")
        flock(descriptor, operation)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", files_only)
        write(tmp_path / "file")
    assert abandoned.exists()
    write(tmp_path / "file")
    assert not abandoned.exists()


def test_a_fork_while_a_file_is_made_keeps_no_lock_of_the_folder(tmp_path, monkeypatch) -> None:
    """A descriptor of the same opening, as a forked process has it, outlives the parent's."""
    opened, inherited = os.open, []

    def noted(path, flags, *mode) -> int:
        descriptor = opened(path, flags, *mode)
        if Path(path) == tmp_path:
            inherited.append(os.dup(descriptor))
        return descriptor

    monkeypatch.setattr(os, "open", noted)
    write(tmp_path / "file")
    monkeypatch.undo()
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for descriptor in (folder, *inherited):
        os.close(descriptor)
    assert inherited


def test_without_locks_a_file_is_closed_before_it_gets_its_name(tmp_path, monkeypatch) -> None:
    """Windows renames no file that is open."""
    monkeypatch.setattr(atomic, "fcntl", None)
    replace = os.replace

    def closed_before(source: str, target: Path) -> None:
        assert file.closed
        replace(source, target)

    monkeypatch.setattr(os, "replace", closed_before)
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("number", [22, 95])
def test_file_systems_that_cannot_sync_a_folder(number, tmp_path, monkeypatch) -> None:
    sync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "no such thing here")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"
