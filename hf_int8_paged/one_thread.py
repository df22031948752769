"""A cache serves one thread at a time: a second one inside is refused."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable)


class OneThread:
    """``with guard: ...`` refuses a thread that enters while another one is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "another thread is inside this PagedInt8Cache; give each thread a cache of its own: fork() shares the "
                "blocks, and caches of one PagedInt8Pool may be used by several threads at once"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        # A copy of a cache is another cache.
        return OneThread, ()


def one_thread(method: _F) -> _F:
    """A method of a cache that refuses a thread while another one is inside the cache's ``_sequences.guard``."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._sequences.guard:
            return method(self, *args, **kwargs)

    return guarded  # type: ignore[return-value]
