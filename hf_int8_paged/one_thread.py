"""A cache serves one thread at a time: a second one inside is refused."""

from __future__ import annotations

import threading


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
