"""Writing a file as a whole or not at all, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: what a killed process left behind then stays until somebody deletes it
    fcntl = None  # type: ignore[assignment]

#: Ends the names of files that are being written.
SUFFIX = ".part"
#: Bytes of a file's name that stand in the one of its part, which has a dot, 9 for a random part and the suffix too.
_NAME_MAX = 255 - 10 - len(SUFFIX)
#: Of file systems that keep no order of names to wait for.
_NOTHING_TO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of ``path`` when the block ends, and disappears if an exception ends it.

    It is written beside ``path`` and reaches the disk before it gets the name, and so does the name before this
    returns: whoever opens ``path`` finds the old file or the new one, also after the process or the machine stopped at
    any moment. What a process that was killed has left behind, the next one to write the same file deletes.

    As with `open`, a symbolic link stays and the file that it names is written; permissions are those of the file that
    was there, and of a new one what the process' mask leaves.

    Args:
        path: in a folder that exists.

    Raises:
        OSError: the folder does not exist or cannot be written to, the disk is full, or ``path`` is a folder, a device
            or a pipe. It is as it was.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    permissions = _permissions(path)
    number, name = _part_file(path, 0o666 if permissions is None else permissions)
    try:
        with open(number, "wb") as file:
            if permissions is not None and hasattr(os, "fchmod"):
                with contextlib.suppress(OSError):  # a file system without; it was made with no more than these
                    os.fchmod(file.fileno(), permissions)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file; elsewhere closing it would give up its lock
            os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _permissions(path: Path) -> int | None:
    """Of the file that is there, or None."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "this is a folder; give the name of a file in it", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "this is no regular file, and would be replaced by one", str(path))
    return mode & 0o777


def _part_file(path: Path, permissions: int) -> tuple[int, Path]:
    """Descriptor and name of a new file beside ``path``, locked for as long as this process has it open. Those that
    nobody has locked, as their process was killed, are deleted first."""
    name = path.name
    while len(os.fsencode(name)) > _NAME_MAX:
        name = name[:-1]
    with alone_in(path.parent) as alone:
        if alone:
            delete_abandoned(path.parent.glob(f".{_escaped(name)}.*{SUFFIX}"))
        number, part = _new_file(path.parent, name, permissions)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return number, part


def _new_file(folder: Path, name: str, permissions: int) -> tuple[int, Path]:
    """A file that was not there, with what the process' mask leaves of the permissions."""
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
    while True:
        part = folder / f".{name}.{secrets.token_hex(4)}{SUFFIX}"
        with contextlib.suppress(FileExistsError):
            return os.open(part, flags, permissions), part


def delete_abandoned(parts: Iterable[Path]) -> None:
    """Delete those of some files that nobody has locked: the processes that wrote them were killed. Call it inside
    `alone_in`, as between its creation and its lock a file looks abandoned."""
    for part in parts:
        with contextlib.suppress(OSError), open(part, "rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Whether nobody else is in here for the same folder: False where folders cannot be locked."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        alone = False
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        yield alone
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child that was forked meanwhile has it open for longer
        os.close(descriptor)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOTHING_TO_SYNC:
            raise
    finally:
        os.close(descriptor)
