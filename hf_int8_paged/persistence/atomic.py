"""Writing a file as a whole or not at all, whatever happens in between."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: what a killed process left behind then stays until somebody deletes it
    fcntl = None  # type: ignore[assignment]

#: Ends the names of files that are being written.
SUFFIX = ".part"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of ``path`` when the block ends, and disappears if an exception ends it.

    It is written beside ``path`` and reaches the disk before it gets the name, and so does the name before this
    returns: whoever opens ``path`` finds the old file or the new one, also after the process or the machine stopped at
    any moment. What a process that was killed has left behind, the next one to write the same file deletes.

    Args:
        path: in a folder that exists.

    Raises:
        OSError: the folder does not exist or cannot be written to, or the disk is full. ``path`` is as it was.
    """
    number, name = _part_file(path)
    try:
        with open(number, "wb") as file:
            _give_usual_permissions(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _part_file(path: Path) -> tuple[int, str]:
    """Descriptor and name of a new file beside ``path``, locked for as long as this process has it open. Those that
    nobody has locked, as their process was killed, are deleted first."""
    if fcntl is None:
        return tempfile.mkstemp(prefix=f".{path.name}.", suffix=SUFFIX, dir=path.parent)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # between its creation and its lock a file would look abandoned
        for left in path.parent.glob(f".{_escaped(path.name)}.*{SUFFIX}"):
            with contextlib.suppress(OSError), open(left, "rb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SUFFIX, dir=path.parent)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return number, name
    finally:
        os.close(folder)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _give_usual_permissions(descriptor: int) -> None:
    """Those of a file that `open` makes: temporary ones are for their owner alone."""
    if hasattr(os, "fchmod"):
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(descriptor, 0o666 & ~mask)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
