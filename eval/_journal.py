"""Results of single windows as JSON lines, so that a run which was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """A file of one JSON record per line; the first line holds the settings that all records were made with.

    Several processes may append to one file at once: each record is written by a single ``write``.

    Args:
        path: the file, or ``None`` to keep records in memory only.
        settings: what must be the same for records to belong together.

    Raises:
        ValueError: the file holds records of other settings.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._settings = json.loads(json.dumps(settings))
        if path is not None and path.exists():
            self._read(path)

    def start(self) -> None:
        """Write the first line, if there is none. Called by one process, before any adds a record."""
        if self.path is not None and not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"settings": self._settings})

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.path is not None:
            self._write(record)

    def _read(self, path: Path) -> None:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off when the run was killed
            if number:
                self.records.append(record)
            elif record.get("settings") != self._settings:
                raise ValueError(
                    f"{path} was made with other settings: {record.get('settings')}, now {self._settings}; "
                    "name another file, or delete it"
                )

    def _write(self, record: dict[str, Any]) -> None:
        with open(self.path, "ab+") as file:  # type: ignore[arg-type]
            line = json.dumps(record).encode() + b"\n"
            if file.tell() and not _ends_with_newline(file):
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
