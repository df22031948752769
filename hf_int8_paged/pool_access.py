"""Who may touch a pool, and when, and what is put right after an exception: several threads may use one pool, each with
caches of its own."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from .block_allocator import BlockAllocator


class Writer:
    """A cache's announcement that one of its kernels is writing to the pool's tensors: ``with writer: ...``.

    It takes no lock: entering and leaving cost two assignments.
    """

    def __init__(self, access: PoolAccess):
        self._access = access
        #: Thread that is writing, or None.
        self.thread: int | None = None

    def __enter__(self) -> None:
        try:
            self.thread = threading.get_ident()
            while self._access.is_growing:
                self.thread = None
                self._access.wait_for_growth()
                self.thread = threading.get_ident()
        except BaseException:
            self.thread = None
            raise

    def __exit__(self, *_: object) -> None:
        self.thread = None


class Books:
    """What a cache knows of its sequences. It outlives the cache until the pool has taken its blocks back.

    Attributes:
        state: a record that never changes and is replaced as a whole; its ``tables`` say which blocks are held.
    """

    __slots__ = ("state",)

    def __init__(self, state: Any):
        self.state = state


class _Reference(weakref.ref):
    """A reference to whatever keeps books, which knows them when that is gone."""

    __slots__ = ("books",)

    books: Books


class PoolAccess:
    """One lock around a pool's bookkeeping, and a handshake between kernels that write and growth.

    * Blocks are allocated and released inside `exclusive`. No kernel of a step runs in there, so threads compute side
      by side.
    * The tables of all caches are the truth about which blocks are held. What the allocators count is only kept up to
      date beside them; where an exception leaves `exclusive`, whoever enters next counts anew.
    * Growth replaces tensors by larger copies. What a kernel wrote to the old ones in the meantime would be lost, so
      growth waits for the kernels that write, and those that come wait for growth (`Writer`).
    * A cache may be deleted by the garbage collector, at any moment, also in a thread that is inside `exclusive`. No
      Python runs then; its blocks come back when somebody enters next, or asks an allocator.

    Where a lock is held, the block of its ``with`` stands in the same line: between two lines an exception may come,
    and a lock that nobody releases stops all threads.

    Args:
        allocators: of the pool's groups, by name; more may come.
    """

    def __init__(self, allocators: Mapping[str, BlockAllocator] | None = None) -> None:
        self._lock = threading.Lock()
        self._allocators = {} if allocators is None else allocators
        self._live: dict[int, _Reference] = {}
        self._gone: deque[_Reference] = deque()
        self._writers: weakref.WeakSet[Writer] = weakref.WeakSet()
        self._must_count = False
        self.is_growing = False
        #: Counts how often `exclusive` was entered.
        self.turn = 0
        _of_this_process.add(self)

    def join(self) -> Writer:
        """A writer for one more cache."""
        writer = Writer(self)
        with self.exclusive():
            self._writers.add(writer)
        return writer

    def register(self, holder: Any, books: Books) -> None:
        """Count the blocks of these books as held for as long as ``holder`` lives."""
        reference = _Reference(holder, self._gone.append)
        reference.books = books
        self._live[id(reference)] = reference

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody else allocates or releases blocks meanwhile. Not to be entered twice by one thread."""
        # fmt: off
        with self._lock: self._begin(); yield; self._must_count = False  # noqa: E701, E702
        # fmt: on

    def settle(self) -> None:
        """Bring the allocators up to date, if nobody is inside: after exceptions, and for caches that are gone."""
        if (self._gone or self._must_count) and not self._lock.locked():
            # fmt: off
            with self._lock: self._settle()  # noqa: E701
            # fmt: on

    def count_anew(self) -> None:
        """Make the allocators count what the tables of all caches hold. Call it inside `exclusive`."""
        held: dict[int, list[np.ndarray]] = {id(allocator): [] for allocator in self._allocators.values()}
        for reference in list(self._live.values()):
            for table in reference.books.state.tables.values():
                held.setdefault(id(table.allocator), []).append(table.held())
        for allocator in list(self._allocators.values()):
            allocator.count_anew(held[id(allocator)])

    @property
    def any_tokens(self) -> bool:
        """Whether any cache has tokens; those that are padding alone need no block. To be asked inside `exclusive`."""
        return any(reference.books.state.length for reference in list(self._live.values()))

    @contextmanager
    def growing(self) -> Iterator[None]:
        """No kernel writes to the pool meanwhile. Call it inside `exclusive`."""
        try:
            self.is_growing = True
            mine = threading.get_ident()
            for writer in list(self._writers):
                while writer.thread not in (None, mine):
                    time.sleep(0)  # a kernel takes microseconds
            yield
        finally:
            self.is_growing = False

    def wait_for_growth(self) -> None:
        """Return when nobody grows the pool, which only happens under the lock."""
        # fmt: off
        with self._lock: self.is_growing = False  # noqa: E701
        # fmt: on

    def after_fork(self) -> None:
        """In a process that was forked: the thread that forked goes on alone, whatever others held."""
        self._lock, self._must_count, self.is_growing = threading.Lock(), True, False
        for writer in list(self._writers):
            writer.thread = None

    def _begin(self) -> None:
        self._settle()
        self.turn += 1
        self._must_count = True

    def _settle(self) -> None:
        if self._must_count:
            self.count_anew()
            self._must_count = False
        while self._gone:
            reference = self._gone[0]
            self._must_count = True
            if id(reference) in self._live:
                for table in reference.books.state.tables.values():
                    table.allocator.release(table.held())
                del self._live[id(reference)]
            self._must_count = False
            self._gone.popleft()


_of_this_process: weakref.WeakSet[PoolAccess] = weakref.WeakSet()


def _after_fork() -> None:
    for access in list(_of_this_process):
        access.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
