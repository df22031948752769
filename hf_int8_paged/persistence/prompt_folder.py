"""Which files of a folder are a prompt store's own, and which of them nobody needs any more."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from .atomic import SUFFIX

try:
    import fcntl
except ImportError:  # Windows: files that killed processes were writing stay until somebody deletes them
    fcntl = None  # type: ignore[assignment]

#: Ends the names of stored prompts.
ENDING = ".safetensors"
#: A stored prompt: the hash that it is found by.
_STORED = re.compile(rf"[0-9a-f]{{64}}{re.escape(ENDING)}")
#: One that is being written, or was when a process was killed.
_PART = re.compile(rf"\.{_STORED.pattern}\..*{re.escape(SUFFIX)}")


def absolute_folder(folder: Any) -> Path:
    """A folder that stays the same one when the process changes its own; ``~`` is the user's.

    Raises:
        TypeError, ValueError: this is no path.
    """
    path = os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
    if not isinstance(path, str):
        raise TypeError(f"folder must be a path, got {folder!r}")
    if not path:
        raise ValueError("folder is empty; name one, '.' for the one that the process is in")
    return Path(os.path.abspath(os.path.expanduser(path)))


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else makes files that are to replace others, or begins an index anew, in this folder meanwhile."""
    if fcntl is None:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_UN)  # for processes, too, that were forked meanwhile
        os.close(number)


def delete_unknown(folder: Path, known: Collection[str]) -> None:
    """Delete files of a store that no entry names, and those that nobody writes any more: left by killed processes.

    Files with other names are not the store's. What cannot be deleted stays.

    Args:
        folder: of the store, whose only writer the caller is.
        known: names of stored prompts that stay.
    """
    names = [entry.name for entry in os.scandir(folder)]
    for name in names:
        if _STORED.fullmatch(name) and name not in known:
            with contextlib.suppress(OSError):
                os.unlink(folder / name)
    parts = [name for name in names if _PART.fullmatch(name)]
    if fcntl is None or not parts:
        return
    with alone_in(folder):  # between its creation and its lock a file looks abandoned
        for name in parts:
            with contextlib.suppress(OSError), open(folder / name, "rb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(folder / name)
