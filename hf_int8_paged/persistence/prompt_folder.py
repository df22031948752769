"""Which files of a folder are a prompt store's own, and which of them nobody needs any more."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .atomic import SUFFIX, alone_in, delete_abandoned

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
    parts = [folder / name for name in names if _PART.fullmatch(name)]
    if parts:
        with alone_in(folder) as alone:
            delete_abandoned(parts if alone else ())
