"""A cache serves one thread at a time, and every call of it is carried out as a whole or not at all."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from threading import get_ident
from typing import Any, TypeVar

from .full import refused_memory

_F = TypeVar("_F", bound=Callable)


class OneThread:
    """Who is inside a cache, and what it takes to undo a call that an exception ended.

    A call enters and, as the very last thing that it does, empties `inside`. One that an exception ended before that,
    wherever this was, is still inside when the same thread enters again.

    Attributes:
        inside: empty while nobody is inside. Else it holds ``"thread"``, who is; of an update ``"start"``, the tokens
            that its layer held before; and of another operation ``"before"``, the ``checkpoint()`` of the sequences.
            To be emptied by ``inside.clear()``, in the line that returns to the caller: an exception at that line
            leaves a call that counts as interrupted, and after it there is no other line.
    """

    def __init__(self) -> None:
        self.inside: dict[str, Any] = {}

    def enter(self) -> bool:
        """Let the calling thread in. Returns whether a call was interrupted before, which is to be undone first.

        Raises:
            RuntimeError: another thread is inside.
        """
        mine = get_ident()
        if self.inside:
            owner = self.inside.get("thread")
            if owner is not None and owner != mine and owner in {thread.ident for thread in threading.enumerate()}:
                _refuse()
            if owner is not None:
                self.inside["thread"] = mine
                return True
            self.inside.pop("start", None)  # a layer was updated without its cache
        if self.inside.setdefault("thread", mine) != mine:
            _refuse()
        return False

    def __reduce__(self) -> tuple:
        # A copy of a cache is another cache.
        return OneThread, ()


def _refuse() -> None:
    raise RuntimeError(
        "another thread is inside this PagedInt8Cache; give each thread a cache of its own: fork() shares the "
        "blocks, and caches of one PagedInt8Pool may be used by several threads at once"
    )


def whole(method: _F) -> _F:
    """A method of a cache that refuses a thread while another one is inside, and that changes everything or nothing."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        sequences = self._sequences
        guard = sequences.guard
        if guard.enter():
            undo_interrupted(self)
        try:
            if method.__name__ != "reset":
                sequences.refuse_if_broken()
            guard.inside["before"] = sequences.checkpoint()
            result = method(self, *args, **kwargs)
            return guard.inside.clear() or result
        except BaseException as error:
            undo_interrupted(self, method.__name__)
            full = refused_memory(error, sequences.broken)
            guard.inside.clear()
            if full is not None:
                raise full from error
            raise

    return guarded  # type: ignore[return-value]


def undo_interrupted(cache: Any, operation: str = "an operation") -> None:
    """Undo the call that an exception ended.

    Args:
        cache: whose ``_sequences.guard`` knows of it.
        operation: its name, for messages.
    """
    sequences = cache._sequences
    inside = sequences.guard.inside
    if "before" in inside:
        sequences.restore(inside["before"], operation, can_undo=not cache._own_layers())
    elif "start" in inside:
        sequences.take_back(inside["start"])
        cache._take_back_others()
    inside.pop("before", None)
    inside.pop("start", None)
