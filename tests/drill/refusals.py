"""Memory refused at every operation that may ask for some, and what the caller finds then.

``python -m tests.drill.refusals`` refuses at every one of every scenario of the drill and prints the counts, with
``--lines`` at one of each line of the package that may ask. The caller meets `CacheFullError`; the cache holds what it
held before, and goes on: the operation, made once more, leads to what an undisturbed one leads to.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_int8_paged import CacheFullError

from .drill import BACKENDS, Failure, check_accounting, contents, react, right_outcomes
from .injection import FOLDERS, one_of_each, only_new_garbage
from .scenarios import KINDS, SCENARIOS, World


class Refusal(NamedTuple):
    """Memory refused to the ``number``-th operation on tensors, counted from 0, of a scenario's last operation.

    Attributes:
        line: of the package, ``path:number``, from which this operation comes; empty for the caller's own.
    """

    scenario: str
    kind: str
    backend: str
    number: int
    line: str


class _Refusing(TorchDispatchMode):
    """Raises torch's own error in place of one operation on tensors; every allocation of torch's is within one."""

    def __init__(self, number: int = -1):
        super().__init__()
        self.number = number
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.lines.append(_line_that_asks())
        if len(self.lines) == self.number + 1:
            raise torch.OutOfMemoryError("injected: out of memory")
        return func(*args, **(kwargs or {}))


def _line_that_asks() -> str:
    """The innermost line of the package on the stack."""
    frame = inspect.currentframe()
    while frame is not None and not frame.f_code.co_filename.startswith(FOLDERS):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def run(operation: Callable[[], object], number: int = -1) -> tuple[list[str], BaseException | None]:
    """Run an operation with memory refused once; returns the lines from which operations on tensors came, and what was
    raised."""
    mode, raised = _Refusing(number), None
    try:
        with mode:
            operation()
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        within = any(frame.f_code.co_filename.startswith(FOLDERS) for frame, _ in frames)
        raised = error if within else _OfTheCaller()
        came: BaseException | None = error
        while came is not None:  # an exception that somebody keeps keeps what its frames held
            came.__traceback__ = None
            came = came.__context__
    return mode.lines, raised


class _OfTheCaller(Exception):
    """The operation was none of the package's."""


def refusals() -> Iterator[Refusal]:
    """All there are."""
    for name, scenario in SCENARIOS.items():
        for kind in scenario.kinds:
            for backend in BACKENDS:
                world = World(kind, backend)
                for action in scenario.history:
                    action(world)
                lines, _ = run(lambda s=scenario, w=world: s.operation(w))  # type: ignore[misc]
                yield from (Refusal(name, kind, backend, number, line) for number, line in enumerate(lines))


def one_at_each_line(everywhere: Iterable[Refusal], seed: int) -> list[Refusal]:
    """One at every line that asks, for each kind of cache whose operations pass it, chosen at random."""
    return one_of_each(everywhere, lambda refusal: (refusal.kind, refusal.line), seed)


def check(refusal: Refusal) -> str:
    """Refuse and go on. Returns what the caller met.

    Raises:
        Failure: anything but what this module promises.
    """
    scenario = SCENARIOS[refusal.scenario]
    fresh, after_reset = right_outcomes(refusal.scenario, refusal.kind, refusal.backend)
    world = World(refusal.kind, refusal.backend)
    for action in scenario.history:
        action(world)
    before = contents(world.main) if "main" in world.caches else None
    _, raised = run(lambda: scenario.operation(world), refusal.number)
    met = "finished"
    if isinstance(raised, _OfTheCaller):
        return "the caller's own operation"
    if raised is not None:
        if not isinstance(raised, CacheFullError):
            raise Failure(f"raises {type(raised).__name__}")
        met = "CacheFullError"
        if before is not None and not getattr(world.main._sequences, "broken", None) and contents(world.main) != before:
            raise Failure("the cache holds something else than before")
    if "main" in world.caches:
        met += f", {react(world, scenario, 'repeats', raised is None, fresh, after_reset)}"
    check_accounting(world)
    return met


def drill(chosen: list[Refusal]) -> tuple[Counter[str], Counter[str]]:
    """Carry out these refusals. Returns how often each outcome came, and each failure."""
    outcomes, failures = Counter[str](), Counter[str]()
    with only_new_garbage(), torch.no_grad():
        for refusal in chosen:
            try:
                outcomes[check(refusal)] += 1
            except Failure as error:
                failures[f"{refusal.kind}: {error}"] += 1
                print(error, refusal, flush=True)
    return outcomes, failures


def drill_everywhere(chosen: list[Refusal], workers: int) -> dict[str, Any]:
    """The same in several processes; prints the counts and returns them as they stand in the JSON file."""
    chunks = [chosen[i :: 4 * workers] for i in range(4 * workers)]
    outcomes, failures = Counter[str](), Counter[str]()
    with ProcessPoolExecutor(workers, get_context("spawn")) as processes:
        for of_chunk in processes.map(drill, chunks):
            outcomes.update(of_chunk[0])
            failures.update(of_chunk[1])
    for name, counts in (("outcome", outcomes), ("failure", failures)):
        for what, count in counts.most_common():
            print(f"{name:8} {count:7} {what}", flush=True)
    return {"places": len(chosen), "outcomes": dict(sorted(outcomes.items())), "failures": sum(failures.values())}


def main() -> int:
    """Command line; the exit status says whether anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument("--kind", choices=sorted(KINDS), help="of the cache (default: all)")
    parser.add_argument("--lines", action="store_true", help="one refusal at each line that asks, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--json", type=Path, help="write the counts of these kinds there, and leave those of others")
    options = parser.parse_args()
    if options.json is not None and (options.lines or options.only):
        parser.error("--json is for the counts of all places: leave --lines and --only out")
    chosen = [refusal for refusal in refusals() if options.only in refusal.scenario]
    if options.lines:
        chosen = one_at_each_line(chosen, options.seed)
    failed = 0
    for kind in [options.kind] if options.kind else KINDS:
        of_kind = [refusal for refusal in chosen if refusal.kind == kind]
        print(f"{kind}: {len(of_kind)} places", flush=True)
        counts = drill_everywhere(of_kind, options.workers)
        failed += counts["failures"]
        if options.json is not None:
            held = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
            options.json.write_text(json.dumps({**held, kind: counts}, indent=1) + "\n", encoding="utf-8")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
