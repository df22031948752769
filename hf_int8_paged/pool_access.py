"""Who may touch a pool, and when: several threads may use one pool, each with caches of its own."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Clearable(Protocol):
    """What holds blocks of a pool: a `BlockTable`."""

    def clear(self) -> None: ...


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


class PoolAccess:
    """One lock around a pool's bookkeeping, and a handshake between kernels that write and growth.

    * Blocks are allocated and released inside `exclusive`. No kernel of a step runs in there, so threads compute side
      by side.
    * Growth replaces tensors by larger copies. What a kernel wrote to the old ones in the meantime would be lost, so
      growth waits for the kernels that write, and those that come wait for growth (`Writer`).
    * A cache may be deleted by the garbage collector, at any moment, also in a thread that is inside `exclusive`. Its
      tables are then cleared by whoever leaves next (`clear_later`).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._dropped: deque[Clearable] = deque()
        self._writers: weakref.WeakSet[Writer] = weakref.WeakSet()
        self.is_growing = False

    def join(self) -> Writer:
        """A writer for one more cache."""
        writer = Writer(self)
        with self.exclusive():
            self._writers.add(writer)
        return writer

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody else allocates or releases blocks meanwhile. Not to be entered twice by one thread."""
        try:
            with self._lock:
                self._clear_dropped()
                yield
        finally:
            self._clear_if_unlocked()

    @contextmanager
    def growing(self) -> Iterator[None]:
        """No kernel writes to the pool meanwhile. Call it inside `exclusive`."""
        self.is_growing = True
        try:
            mine = threading.get_ident()
            for writer in list(self._writers):
                while writer.thread not in (None, mine):
                    time.sleep(0)  # a kernel takes microseconds
            yield
        finally:
            self.is_growing = False

    def wait_for_growth(self) -> None:
        with self._lock:
            pass

    def clear_later(self, tables: list[Clearable]) -> None:
        """Clear these tables, which nobody uses any more: now, or as soon as the lock is free."""
        self._dropped.extend(tables)
        self._clear_if_unlocked()

    def _clear_if_unlocked(self) -> None:
        # Again after the release: another one may have been dropped while the lock was held.
        while self._dropped and self._lock.acquire(blocking=False):
            try:
                self._clear_dropped()
            finally:
                self._lock.release()

    def _clear_dropped(self) -> None:
        while self._dropped:
            self._dropped.popleft().clear()
