"""Which file of a folder holds which tokens: an SQLite database, whose locks serve several processes."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .atomic import alone_in

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
#: What `_TABLES` makes.
_NAMES = ("entries", "prefixes", "by_name", "by_use")
_MADE = f"SELECT count(*) FROM sqlite_master WHERE name IN {_NAMES}"
#: Each finds nothing in a database that is sound; the first two also where there are no tables.
_SOUND = (
    "SELECT * FROM pragma_integrity_check WHERE integrity_check != 'ok'",
    "PRAGMA foreign_key_check",
    "SELECT name FROM entries WHERE typeof(name) != 'text' OR typeof(tokens) != 'integer' "
    "OR typeof(bytes) != 'integer' OR typeof(used) != 'real' OR typeof(croppable) != 'integer'",
    "SELECT name FROM prefixes WHERE typeof(hash) != 'text' OR typeof(name) != 'text' OR typeof(tokens) != 'integer'",
)
_ERRORS = (sqlite3.Error, UnicodeDecodeError)
#: Messages of a database that is not what `_TABLES` makes.
_NOT_OURS = ("no such table", "no such column", "unsupported file format", "Could not decode")
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


class DamagedIndexError(OSError):
    """The index was damaged, and has been begun anew: without the entries that it had."""


class PromptIndex:
    """The index of one folder. Every call opens the database anew, so that threads and forked processes may share one;
    folder and database are made where they are not there.

    Entries may be lost, as they say no more than where a copy is: an index that is damaged is begun anew, and is empty
    to those who read it. Whatever else SQLite cannot do is an ``OSError`` that names the folder.

    Args:
        path: of the database.
    """

    def __init__(self, path: Path):
        self._path = path
        with contextlib.suppress(DamagedIndexError), self._open(wait=60):
            pass

    @contextlib.contextmanager
    def _open(self, wait: float) -> Iterator[sqlite3.Connection]:
        try:
            try:
                database = self._connect(wait)
            except _ERRORS as error:
                if not _is_damage(error):
                    raise
                self._begin_anew()
                database = self._connect(wait)
            with contextlib.closing(database):
                yield database
        except _ERRORS as error:
            if _is_damage(error):
                self._begin_anew()
                raise DamagedIndexError(f"{self._of(error)}; it has been begun anew") from error
            raise OSError(self._of(error)) from error

    def _connect(self, wait: float) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._path, timeout=wait, isolation_level=None)
        try:
            database.text_factory = lambda text: text.decode(errors="replace")  # of a damaged one too
            database.execute("PRAGMA foreign_keys = ON")
            (made,) = database.execute(_MADE).fetchone()
            if made < len(_NAMES):
                database.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
        except BaseException:
            database.close()
            raise
        return database

    def _begin_anew(self) -> None:
        """Delete the database, unless another process has done so since its damage was found."""
        with alone_in(self._path.parent):
            try:
                with contextlib.closing(sqlite3.connect(self._path, timeout=60)) as database:
                    (made,) = database.execute(_MADE).fetchone()
                    # Without tables it is the new one, whose maker has yet to get there.
                    if not any(database.execute(check).fetchall() for check in _SOUND[: 4 if made else 2]):
                        return
            except _ERRORS as error:
                if not _is_damage(error):
                    raise OSError(self._of(error)) from error
            # Its journal first, which would be taken for the new one's. Who has the old one open goes on with a file
            # without a name: what it says is lost, and the files that only it knows are deleted with the next prompt.
            for ending in ("-journal", "-wal", "-shm", ""):
                Path(f"{self._path}{ending}").unlink(missing_ok=True)

    def _of(self, error: Exception) -> str:
        return f"the index of the prompt store {self._path.parent}: {error}"

    def write(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """Let ``work`` change the database, as the only writer of all processes; what it does takes effect when it
        ends, or not at all. With an index that turns out to be damaged it is called once more.

        Raises:
            OSError: the index cannot be written to.
        """
        try:
            self._write(work)
        except DamagedIndexError:
            self._write(work)

    def _write(self, work: Callable[[sqlite3.Connection], object]) -> None:
        with self._open(wait=3600) as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                work(database)
                if database.in_transaction:  # `work` may have ended it
                    database.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # it may have ended by itself
                    database.execute("ROLLBACK")
                raise

    def _read(self, query: str, parameters: Sequence[Any], types: tuple[type, ...]) -> list[tuple]:
        try:
            with self._open(wait=60) as database:
                return _rows(database, query, parameters, types)
        except DamagedIndexError:
            return []

    def lengths(self, most: int) -> list[int]:
        """Lengths of whole entries, at most ``most`` tokens."""
        rows = self._read("SELECT DISTINCT tokens FROM entries WHERE tokens <= ?", (most,), (int,))
        return [tokens for (tokens,) in rows]

    def find(self, hashes: dict[str, int]) -> list[Entry]:
        """Files that begin with one of these prefixes, the longest first; of equally long ones, those that need not be
        cropped.

        Args:
            hashes: tokens of each prefix, by its hash.
        """
        found, names = [], list(hashes)
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            rows = self._read(
                "SELECT p.hash, e.name, e.tokens FROM prefixes p JOIN entries e ON e.name = p.name "
                f"WHERE p.hash IN ({','.join('?' * len(some))}) AND (e.croppable OR e.tokens = p.tokens)",
                some,
                (str, str, int),
            )
            found += [Entry(name, tokens, hashes[hash]) for hash, name, tokens in rows]
        return sorted(found, key=lambda entry: (-entry.shared, entry.tokens))

    def touch(self, name: str) -> None:
        """Note that an entry was used, unless another process is writing: then it is no more than forgotten."""
        with contextlib.suppress(OSError), self._open(wait=0.2) as database:
            database.execute("UPDATE entries SET used = ? WHERE name = ?", (time.time(), name))

    def forget(self, name: str) -> None:
        """Take an entry out and delete its file, where that is allowed."""

        def work(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM entries WHERE name = ?", (name,))
            (self._path.parent / name).unlink(missing_ok=True)

        with contextlib.suppress(OSError):
            self.write(work)

    def sizes(self) -> dict[str, int]:
        """Bytes of each entry."""
        return dict(self._read("SELECT name, bytes FROM entries", (), (str, int)))


def _is_damage(error: Exception) -> bool:
    """Whether this says that the file is no database, a damaged one or another one than ours. Python has no class for
    that; what else may happen, a full disk or a locked file for instance, are other subclasses and messages."""
    of_damage = isinstance(error, sqlite3.IntegrityError | UnicodeDecodeError)  # the second: of a message
    return of_damage or type(error) is sqlite3.DatabaseError or str(error).startswith(_NOT_OURS)


def _rows(database: sqlite3.Connection, query: str, parameters: Sequence[Any], types: tuple[type, ...]) -> list[tuple]:
    """Rows whose values are of these types, which nothing but damage makes others."""
    rows = database.execute(query, parameters).fetchall()
    if all(isinstance(value, kind) for row in rows for value, kind in zip(row, types, strict=True)):
        return rows
    raise sqlite3.DatabaseError("a value is of another type than its column")


def add(database: sqlite3.Connection, entry: Entry, size: int, croppable: bool, prefixes: dict[str, int]) -> None:
    """Add an entry, inside `PromptIndex.write`, and its prefixes: tokens by hash."""
    row = (entry.name, entry.tokens, size, time.time(), croppable)
    database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)", row)
    rows = [(hash, entry.name, tokens) for hash, tokens in prefixes.items()]
    database.executemany("INSERT OR REPLACE INTO prefixes VALUES (?, ?, ?)", rows)


def evict(database: sqlite3.Connection, max_bytes: int, but: str) -> list[str]:
    """Take those used longest ago out, until the rest fits, inside `PromptIndex.write`; returns their names.

    Args:
        max_bytes: that the rest may have.
        but: name of the entry that stays.
    """
    rows = _rows(database, "SELECT name, bytes FROM entries ORDER BY used", (), (str, int))
    total, gone = sum(size for _, size in rows), []
    for name, size in rows:
        if total <= max_bytes:
            break
        if name != but:
            gone.append(name)
            total -= size
    database.executemany("DELETE FROM entries WHERE name = ?", [(name,) for name in gone])
    return gone
