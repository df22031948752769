"""Many requests at once: requests and tokens per second over a trace, at equal bytes for keys and values.

A trace has prompts with common beginnings, short and long ones, that arrive by a seeded Poisson process. Contestants,
one after the other in one run and in each round in another order: transformers' continuous batching with its own pages,
the same engine over int8 blocks, and `generate` in static batches. Of several rounds the fastest counts.

    python eval/throughput.py --text-file wiki.test.raw --dtype bfloat16 --json eval/results/throughput.json \\
        --picture docs/throughput.png
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

from _common import (
    add_model_arguments,
    add_text_arguments,
    device_called,
    load_model,
    load_tokens,
    positive,
    provenance,
    write_json,
)
from _serving import Served, Way, continuously, dense_bytes_per_token, in_static_batches
from _trace import TraceOptions, trace_of
from tqdm.auto import tqdm

OWN, INT8, STATIC = "engine, own pages", "engine, int8 blocks", "generate, static batches"


def contestants(page_size: int, batch_tokens: int) -> dict[str, Way]:
    serve = functools.partial(continuously, page_size=page_size, batch_tokens=batch_tokens)
    return {
        OWN: functools.partial(serve, int8=False),
        INT8: functools.partial(serve, int8=True),
        STATIC: in_static_batches,
    }


def row_of(name: str, budget: int, rounds: list[Served], requests: int) -> dict[str, Any]:
    """What stands in the result of a contestant's rounds at one budget."""
    best = min(rounds, key=lambda served: served.seconds)
    return {
        "contestant": name,
        "budget": budget,
        "nbytes": best.nbytes,
        "slots": best.slots,
        "seconds": [round(served.seconds, 3) for served in rounds],
        "requests_per_second": requests / best.seconds,
        "tokens_per_second": best.tokens / best.seconds,
        "latency_median": statistics.median(best.latencies),
        "latency_longest": max(best.latencies),
        "samples": best.samples,
    }


def measure(args: argparse.Namespace, model: Any, trace: list, budgets: list[int]) -> list[dict[str, Any]]:
    ways = contestants(args.page_size, args.batch_tokens)
    rows = []
    for budget in budgets:
        rounds: dict[str, list[Served]] = {name: [] for name in ways}
        for i in tqdm(range(args.rounds), desc=f"{budget / 2**20:.1f} MiB"):
            names = list(ways)
            for name in names[i % len(names) :] + names[: i % len(names)]:
                rounds[name].append(ways[name](model, trace, budget))
        rows += [row_of(name, budget, served, len(trace)) for name, served in rounds.items()]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'':26} {'MiB':>7} {'slots':>8} {'requests/s':>11} {'tokens/s':>9} {'median s':>9} {'longest s':>10}")
    for row in rows:
        print(
            f"{row['contestant']:26} {row['nbytes'] / 2**20:7.1f} {row['slots']:8d} {row['requests_per_second']:11.2f} "
            f"{row['tokens_per_second']:9.1f} {row['latency_median']:9.2f} {row['latency_longest']:10.2f}"
        )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Throughput over budget; blocks over time of int8 blocks at the smallest budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name in (OWN, INT8, STATIC):
        own = [row for row in rows if row["contestant"] == name]
        left.plot(
            [row["budget"] / 2**20 for row in own], [row["tokens_per_second"] for row in own], marker="o", label=name
        )
    left.set_xlabel("MiB for keys and values")
    left.set_ylabel("tokens per second")
    left.set_ylim(bottom=0)
    left.legend()
    samples = next(row["samples"] for row in rows if row["contestant"] == INT8)
    seconds = [x["second"] for x in samples]
    own = [x["used"] - x["shared"] for x in samples]
    series = [own, *([x[kind] for x in samples] for kind in ("shared", "kept", "free"))]
    labels = ["of one request", "shared", "kept for their content", "free"]
    right.stackplot(seconds, series, labels=labels, colors=["#4477aa", "#228833", "#ccbb44", "#dddddd"])
    right.set_xlabel("seconds")
    right.set_ylabel("int8 blocks, smallest budget")
    right.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_text_arguments(parser)
    group = parser.add_argument_group("trace")
    group.add_argument("--requests", type=positive, default=64, help="(default: %(default)s)")
    group.add_argument("--rate", type=float, default=8.0, help="arrivals per second (default: %(default)s)")
    group.add_argument("--shared", type=positive, default=256, help="tokens of a system prompt (default: %(default)s)")
    group.add_argument("--system-prompts", type=positive, default=4, help="different ones (default: %(default)s)")
    group.add_argument("--short", type=positive, default=64, help="longest short prompt (default: %(default)s)")
    group.add_argument("--long", type=positive, default=768, help="longest long prompt (default: %(default)s)")
    group.add_argument("--new-tokens", type=positive, default=64, help="most new tokens (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[2, 4, 16],
        help="bytes for keys and values, in longest requests of the model's dtype (default: %(default)s)",
    )
    group.add_argument("--page-size", type=positive, default=32, help="tokens of a block (default: %(default)s)")
    group.add_argument("--batch-tokens", type=positive, default=512, help="tokens of a step (default: %(default)s)")
    group.add_argument("--rounds", type=positive, default=3, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--picture", type=Path, help="draw it to this file")
    args = parser.parse_args()
    device = device_called(args.device)
    result = provenance(device, timed=True) | {"model": args.model}
    model, tokenizer = load_model(args, device)
    options = TraceOptions(
        args.requests, args.rate, args.shared, args.system_prompts, args.short, args.long, args.new_tokens, args.seed
    )
    trace = trace_of(options, load_tokens(args, tokenizer))
    budgets = [int(x * options.longest * dense_bytes_per_token(model)) for x in args.budgets]
    rows = measure(args, model, trace, budgets)
    show(rows)
    if args.json:
        sizes = {"page_size": args.page_size, "batch_tokens": args.batch_tokens, "rounds": args.rounds}
        write_json(args.json, result | {"dtype": args.dtype, "trace": options._asdict(), **sizes, "rows": rows})
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
