"""What the cache may cost in time, and what it costs on this machine: ``make bench``, by hand and before a release.

    python eval/budgets.py --json eval/results/budgets.json

These times are no tests: on a slow or busy machine a budget may be missed. What can be counted of the same work is
tested (tests/cache/test_overhead.py). Times are CPU times of one thread, of the fastest of many rounds: other work on
the machine only ever adds. The exit status is 1 if a budget is missed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from _common import provenance, write_json
from _workloads import (
    LAYERS,
    SHAPES,
    Bookkeeping,
    Step,
    beams_over_a_prompt,
    layer_over_a_past,
    reorder,
    triton_layer_launching_nothing,
    turns_of_beams,
)

from hf_int8_paged.kernels import why_unavailable


class Budget(NamedTuple):
    """What must not cost more than ``most``, in ``unit``; ``measure(rounds)`` says what it costs."""

    name: str
    most: float
    unit: str
    measure: Callable[[int], float]
    #: Backend whose module must load.
    needs: str = "cpu"


def fastest(call: Callable[[], object], rounds: int, after: Callable[[], object] = lambda: None) -> float:
    """CPU seconds of the fastest round; ``after`` follows each, untimed."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
        after()
    return best


def step_beside_its_kernels(rounds: int) -> float:
    step = Step()
    whole, kernels = fastest(step, rounds, step.undo), fastest(step.kernels_alone(), rounds)
    return (whole - kernels) / LAYERS * 1e6


def conditioning(shape: tuple[int, int, int]) -> Callable[[int], float]:
    def measure(rounds: int) -> float:
        plain, conditioned = (layer_over_a_past(*shape, which) for which in (False, True))
        return (fastest(conditioned, 30 * rounds) - fastest(plain, 30 * rounds)) * 1e6

    return measure


def triton_launchers(rounds: int) -> float:
    with triton_layer_launching_nothing() as (layer, _):
        return fastest(lambda: [layer() for _ in range(50)], rounds) / 50 * 1e6


def reordering_over_a_long_prompt(rounds: int) -> float:
    short, long, turns = beams_over_a_prompt(1024), beams_over_a_prompt(8192), turns_of_beams()
    seconds = [
        tuple(fastest(partial(reorder, cache, turns), 1) for cache in (long, short)) for _ in range(max(rounds // 4, 1))
    ]
    return min(one for one, _ in seconds) / min(other for _, other in seconds)


def bookkeeping(batch: int, beams: int = 1, *, of: Callable[[list[float]], float] = fmean) -> Callable[[int], float]:
    """Of a step, per sequence; ``of`` says what of the times of a whole cycle of steps."""

    def measure(rounds: int) -> float:
        best = [float("inf")] * Bookkeeping.CYCLE
        for _ in range(max(rounds // 10, 1)):
            step = Bookkeeping(batch, beams)
            for _ in range(2):
                best = [min(seconds, fastest(step, 1)) for seconds in best]
        return of(best) / batch * 1e6

    return measure


BUDGETS = (
    Budget("a decode step beside its kernels, per layer", 30, "us", step_beside_its_kernels),
    *(
        Budget("rotation and centring, per layer of {} KV heads, group {}, head_dim {}".format(*shape), 5, "us", timed)
        for shape, timed in ((shape, conditioning(shape)) for shape in SHAPES)
    ),
    Budget("append and decode under Triton up to the launch itself, per layer", 50, "us", triton_launchers, "triton"),
    Budget("reordering 8 beams after 8,192 tokens, by that after 1,024", 1.3, "times", reordering_over_a_long_prompt),
    *(
        Budget(f"bookkeeping of a step{what}, per {who} of {batch:,}", most, "us", bookkeeping(batch, beams, of=of))
        for batch in (256, 1024)
        for what, who, most, beams, of in (
            ("", "sequence", 1, 1, fmean),
            (" that needs a block for each", "sequence", 2, 1, max),
            (" and the reordering before it", "beam", 2, 4, fmean),
        )
    ),
)


def missing(backend: str) -> str | None:
    """Why a budget that needs this backend cannot be measured here."""
    if backend == "triton":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "triton is not installed"
        return None
    return why_unavailable(backend, torch.device("cpu"))


@torch.no_grad()
def judge(budget: Budget, rounds: int) -> dict[str, object]:
    """The budget's row: ``budget``, ``measured`` (``None`` where it cannot be), ``unit`` and ``verdict``."""
    reason = missing(budget.needs)
    measured = None if reason else budget.measure(rounds)
    verdict = f"not measured: {reason}" if measured is None else "kept" if measured <= budget.most else "missed"
    return {
        "name": budget.name,
        "budget": budget.most,
        "measured": measured,
        "unit": budget.unit,
        "verdict": verdict,
    }


def as_line(row: dict[str, object]) -> str:
    measured = "" if row["measured"] is None else f"{row['measured']:.2f}"
    return f"{row['name']:<75} {row['budget']:>6} {measured:>8} {row['unit']:<6} {row['verdict']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="timed rounds of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()
    torch.set_num_threads(1)  # one row of one sequence: threads would only add the time to wake them
    made = provenance(torch.device("cpu"), timed=True)
    print(f"{'':<75} {'budget':>6} {'measured':>8}")
    rows = []
    for budget in BUDGETS:
        rows.append(judge(budget, args.rounds))
        print(as_line(rows[-1]), flush=True)
    if args.json:
        content = made | {"rounds": args.rounds, "budgets": rows}
        write_json(args.json, content)
    return int(any(row["verdict"] == "missed" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
