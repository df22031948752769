"""Throwing an exception at a chosen line of the package: what the drill enumerates and injects."""

from __future__ import annotations

import gc
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).parent.parent.parent
#: Code that counts as the package's own.
FOLDERS = tuple(str(ROOT / folder) + "/" for folder in ("hf_int8_paged", "kernels/torch-ext/int8_paged_attention"))
KERNELS = FOLDERS[1]
#: A line that an operation passes more often is injected into at its first passes, so many, and at its last one; a line
#: of the kernels, which keep no state between calls but a memo, at its first one only.
FIRST_PASSES = 2
#: Seconds after which one injection counts as hanging.
HANGS = 20


class Point(NamedTuple):
    """One passing of one line: ``line`` of ``file`` for the ``passing``-th time, counted from 0."""

    file: str
    line: int
    passing: int

    def __str__(self) -> str:
        return f"{Path(self.file).relative_to(ROOT)}:{self.line} (passing {self.passing})"


def points_of(operation: Callable[[], object]) -> list[Point]:
    """Every passing of a line of the package by ``operation``, with those of long loops left out."""
    passed: Counter[tuple[str, int]] = Counter()
    found: list[Point] = []

    def note(frame: FrameType) -> None:
        where = frame.f_code.co_filename, frame.f_lineno
        found.append(Point(*where, passed[where]))
        passed[where] += 1

    with _at_every_line(note):
        operation()

    def is_chosen(point: Point) -> bool:
        if point.file.startswith(KERNELS):
            return point.passing == 0
        return point.passing < FIRST_PASSES or point.passing == passed[point.file, point.line] - 1

    return [point for point in found if is_chosen(point)]


def inject(operation: Callable[[], object], point: Point, exception: type[BaseException]) -> BaseException | None:
    """Run ``operation`` and throw ``exception`` before the line of ``point``. Returns what came out, without its
    traceback: an exception that nobody keeps frees what its frames held."""
    passings = 0

    def throw(frame: FrameType) -> None:
        nonlocal passings
        if frame.f_lineno != point.line or frame.f_code.co_filename != point.file:
            return
        passings += 1
        if passings == point.passing + 1:
            sys.settrace(None)
            raise exception("injected")

    try:
        with _at_every_line(throw), _unraisable_is_silent():
            operation()
    except BaseException as error:
        came: BaseException | None = error
        while came is not None:
            came.__traceback__ = None
            came = came.__context__
        return error
    return None


def one_of_each(everything: Iterable[T], what: Callable[[T], Hashable], seed: int) -> list[T]:
    """One for each value of ``what``, chosen at random."""
    shuffled = list(everything)
    random.Random(seed).shuffle(shuffled)
    return list({what(each): each for each in shuffled}.values())


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise `TimeoutError` in what hangs, also in a lock that nobody will release."""

    def hang(*_: Any) -> None:
        raise TimeoutError(f"hangs for {HANGS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def collect_garbage() -> None:
    """Collect what was made since `only_new_garbage`."""
    gc.collect()


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """What lives already is not looked at again, which would take a hundred times as long as an injection."""
    gc.collect()
    gc.freeze()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


@contextmanager
def _at_every_line(act: Callable[[FrameType], None]) -> Iterator[None]:
    def in_package(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            act(frame)
        return in_package

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        return in_package if frame.f_code.co_filename.startswith(FOLDERS) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _unraisable_is_silent() -> Iterator[None]:
    """What is thrown while an object is deleted reaches nobody; Python would print it."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before
