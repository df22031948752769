"""Numbers of bytes as people write them."""

from __future__ import annotations

import re
from decimal import Decimal

_UNITS = {"": 1, "b": 1, "byte": 1, "bytes": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}


def parse_bytes(text: str) -> int:
    """Bytes that a text such as ``"8GiB"``, ``"1.5 GB"`` or ``"4096"`` means; fractions of a byte are dropped.

    Raises:
        ValueError: it means none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = None if match is None else _UNITS.get(match[2].lower())
    if match is None or unit is None:
        raise ValueError(f"{text!r} is no number of bytes; write it as '8GiB', '500MB' or 4096")
    return int(Decimal(match[1]) * unit)


def bytes_as_text(count: float) -> str:
    """A number of bytes in the largest binary unit that leaves at least 1, with up to four digits, or more before the
    point where there is no larger unit. `parse_bytes` reads it, to within half of the last digit."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            break
        count /= 1024
    whole = unit == "bytes" or abs(count) >= 1000  # "g" would write 100,000 as 1e+05
    return f"{count:.0f} {unit}" if whole else f"{count:.4g} {unit}"
