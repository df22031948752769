"""Reading a header's values one by one, each with its type and range."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any


class Fields:
    """The values of one JSON object.

    Args:
        values: the object; anything else is refused.
        where: its name, for messages.
        error: makes the exception for a field and what is wrong with it.
    """

    def __init__(self, values: Any, where: str, error: Callable[[str, str], Exception]):
        self._where, self._error = where, error
        if not isinstance(values, dict):
            raise error(where or "header", f"{_shown(values)} is no object with names")
        self._values = values

    def refuse(self, name: str, what: str) -> Exception:
        """The exception for a field, to be raised."""
        return self._error(f"{self._where}.{name}" if self._where else name, what)

    def any(self, name: str) -> Any:
        """A value of any type."""
        if name not in self._values:
            raise self.refuse(name, "it is missing")
        return self._values[name]

    def integer(self, name: str, low: int, high: int | None = None) -> int:
        """An integer from ``low`` to ``high``."""
        value = self.any(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            most = "" if high is None else f" and at most {high}"
            raise self.refuse(name, f"{_shown(value)} is no integer of at least {low}{most}")
        return value

    def optional_integer(self, name: str, low: int, high: int | None = None) -> int | None:
        """The same, or None."""
        return None if self.any(name) is None else self.integer(name, low, high)

    def boolean(self, name: str) -> bool:
        """True or False."""
        value = self.any(name)
        if not isinstance(value, bool):
            raise self.refuse(name, f"{_shown(value)} is neither true nor false")
        return value

    def string(self, name: str, choices: Collection[str] | None = None) -> str:
        """A string, one of ``choices`` if there are any."""
        value = self.any(name)
        if not isinstance(value, str) or (choices is not None and value not in choices):
            known = "a string" if choices is None else f"one of {', '.join(choices)}"
            raise self.refuse(name, f"{_shown(value)} is not {known}")
        return value

    def optional_string(self, name: str, choices: Collection[str] | None = None) -> str | None:
        """The same, or None."""
        return None if self.any(name) is None else self.string(name, choices)

    def elements(self, name: str, length: int | None = None) -> list[Any]:
        """A list, of ``length`` elements if that is given."""
        value = self.any(name)
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise self.refuse(name, f"{_shown(value)} is no list" + ("" if length is None else f" of {length}"))
        return value

    def inner(self, name: str) -> Fields:
        """An object within this one."""
        return Fields(self.any(name), f"{self._where}.{name}" if self._where else name, self._error)

    def names(self) -> list[str]:
        """Names of all fields."""
        return list(self._values)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
