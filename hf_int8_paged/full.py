"""A limit is reached, or memory was refused: one error, after which a cache is what it was before."""

from __future__ import annotations

import errno

import torch

#: What torch's allocators say in a plain RuntimeError: those of the CPU, of accelerators and of host memory.
_REFUSALS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")


class CacheFullError(RuntimeError):
    """The cache's limit is reached, or memory was refused. The cache stays valid at its old length, unless the message
    says that what was begun could not be undone."""


def refused_memory(error: BaseException, broken: str | None = None) -> CacheFullError | None:
    """The `CacheFullError` for an exception by which an allocator has refused memory, or None for any other.

    Args:
        error: the exception.
        broken: name of what it has ended and could not be undone, or None if the cache is what it was before.
    """
    refused = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if isinstance(error, OSError):
        refused = error.errno == errno.ENOMEM
    elif isinstance(error, RuntimeError) and not isinstance(error, CacheFullError):
        refused = refused or any(words in str(error).lower() for words in _REFUSALS)
    if not refused:
        return None
    what = str(error).strip().split("\n")[0][:200] or type(error).__name__
    then = "the cache still holds what it held before"
    if broken is not None:
        then = f"{broken} could not be undone: reset() forgets all tokens, after which the cache can be used again"
    return CacheFullError(
        f"memory was refused ({what}); {then}. Free sequences, shorten the prompt, or give the cache less to grow into "
        "by max_bytes or max_tokens"
    )
