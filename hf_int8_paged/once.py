"""Messages that a process needs to hear once."""

from __future__ import annotations

import logging

_said: set[str] = set()


def say_once(level: int, message: str) -> None:
    """Log ``message`` under the package's name, the first time it comes."""
    if message not in _said:
        _said.add(message)
        logging.getLogger("hf_int8_paged").log(level, message)


def dense_read() -> None:
    """Say that another attention implementation reads a dequantized copy."""
    say_once(
        logging.WARNING,
        "PagedInt8Cache is read by another attention implementation, through a dequantized copy: right, but slow. "
        'For the fast path call model.set_attn_implementation("int8_paged").',
    )
