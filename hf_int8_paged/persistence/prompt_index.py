"""Which file of a folder holds which tokens: an SQLite database, whose locks serve several processes."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_TABLES = """
CREATE TABLE IF NOT EXISTS entries (
    name TEXT PRIMARY KEY, tokens INTEGER NOT NULL, bytes INTEGER NOT NULL, used REAL NOT NULL,
    croppable INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS prefixes (
    hash TEXT NOT NULL, name TEXT NOT NULL REFERENCES entries (name) ON DELETE CASCADE, tokens INTEGER NOT NULL,
    PRIMARY KEY (hash, name)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_name ON prefixes (name);
CREATE INDEX IF NOT EXISTS by_use ON entries (used);
"""
#: Hashes in one query.
_AT_ONCE = 500


class Entry(NamedTuple):
    """A file that begins with the tokens that were asked for.

    Attributes:
        name: of the file.
        tokens: that it holds.
        shared: of them, those that the prompt begins with.
    """

    name: str
    tokens: int
    shared: int


class PromptIndex:
    """The index of one folder. Every call opens the database anew, so that threads and forked processes may share one.

    Args:
        path: of the database.
    """

    def __init__(self, path: Path):
        self._path = path
        with self._open(wait=60) as database:
            database.executescript(_TABLES)

    @contextlib.contextmanager
    def _open(self, wait: float) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._path, timeout=wait, isolation_level=None)
        try:
            database.execute("PRAGMA foreign_keys = ON")
            yield database
        finally:
            database.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The only writer of all processes; what is done takes effect when the block ends, or not at all."""
        with self._open(wait=3600) as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")

    def lengths(self, most: int) -> list[int]:
        """Lengths of whole entries, at most ``most`` tokens."""
        with self._open(wait=60) as database:
            rows = database.execute("SELECT DISTINCT tokens FROM entries WHERE tokens <= ?", (most,))
            return [tokens for (tokens,) in rows]

    def find(self, hashes: dict[str, int]) -> list[Entry]:
        """Files that begin with one of these prefixes, the longest first; of equally long ones, those that need not be
        cropped.

        Args:
            hashes: tokens of each prefix, by its hash.
        """
        found, names = [], list(hashes)
        with self._open(wait=60) as database:
            for start in range(0, len(names), _AT_ONCE):
                some = names[start : start + _AT_ONCE]
                rows = database.execute(
                    "SELECT p.hash, e.name, e.tokens FROM prefixes p JOIN entries e ON e.name = p.name "
                    f"WHERE p.hash IN ({','.join('?' * len(some))}) AND (e.croppable OR e.tokens = p.tokens)",
                    some,
                )
                found += [Entry(name, tokens, hashes[hash]) for hash, name, tokens in rows]
        return sorted(found, key=lambda entry: (-entry.shared, entry.tokens))

    def touch(self, name: str) -> None:
        """Note that an entry was used, unless another process is writing: then it is no more than forgotten."""
        with contextlib.suppress(sqlite3.OperationalError), self._open(wait=0.2) as database:
            database.execute("UPDATE entries SET used = ? WHERE name = ?", (time.time(), name))

    def sizes(self) -> dict[str, int]:
        """Bytes of each entry."""
        with self._open(wait=60) as database:
            return dict(database.execute("SELECT name, bytes FROM entries"))


def add(database: sqlite3.Connection, entry: Entry, size: int, croppable: bool, prefixes: dict[str, int]) -> None:
    """Add an entry, inside `PromptIndex.writing`, and its prefixes: tokens by hash."""
    row = (entry.name, entry.tokens, size, time.time(), croppable)
    database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)", row)
    rows = [(hash, entry.name, tokens) for hash, tokens in prefixes.items()]
    database.executemany("INSERT OR REPLACE INTO prefixes VALUES (?, ?, ?)", rows)


def evict(database: sqlite3.Connection, max_bytes: int, but: str) -> list[str]:
    """Take those used longest ago out, until the rest fits, inside `PromptIndex.writing`; returns their names.

    Args:
        max_bytes: that the rest may have.
        but: name of the entry that stays.
    """
    (total,) = database.execute("SELECT coalesce(sum(bytes), 0) FROM entries").fetchone()
    gone = []
    for name, size in database.execute("SELECT name, bytes FROM entries WHERE name != ? ORDER BY used", (but,)):
        if total <= max_bytes:
            break
        gone.append(name)
        total -= size
    database.executemany("DELETE FROM entries WHERE name = ?", [(name,) for name in gone])
    return gone
