"""All benchmarks of the CPU backend, and one table of what they found: ``make bench``, on a machine that is idle.

Each benchmark is a script of this folder that writes a result file of its own; this one runs them one after the other
and reads the files. Kernels and a whole model run under every instruction set that the processor has
(``HF_INT8_PAGED_CPU_ISA``). Goals stand beside what was measured; the exit status is 1 if one is missed.

    python eval/bench.py --results eval/results
    python eval/bench.py --only kernel growth --no-run     # the table of results that are there already
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hf_int8_paged.kernels.cpu import backend as cpu
from hf_int8_paged.kernels.cpu.library import ISA_VARIABLE

FOLDER = Path(__file__).parent
#: Beside which a share of read bandwidth is held, by query heads per KV head.
BANDWIDTH_GOALS = {1: 0.70, 3: 0.55, 4: 0.55}


class Row(NamedTuple):
    """A line of the table: ``ours`` is what was measured, ``goal`` what it should be at most or at least, if anything.

    ``kept`` is None without a goal.
    """

    what: str
    ours: str
    beside: str
    goal: str = ""
    kept: bool | None = None


class Benchmark(NamedTuple):
    """A script with its arguments, the name of its result file, and how rows are read out of that.

    Without arguments it is not run here: its file is shown where another command has written it.
    """

    name: str
    arguments: list[str]
    result: str
    rows: Callable[[dict[str, Any]], Iterator[Row]]
    environment: dict[str, str]


def at_most(what: str, value: float, goal: float, beside: str, unit: str = "") -> Row:
    return Row(what, f"{value:.2f}{unit}", beside, f"<= {goal:g}{unit}", value <= goal)


def at_least(what: str, value: float, goal: float, beside: str, unit: str = "") -> Row:
    return Row(what, f"{value:.2f}{unit}", beside, f">= {goal:g}{unit}", value >= goal)


def kernel_rows(content: dict[str, Any]) -> Iterator[Row]:
    for result in content["results"]:
        case = result["case"]
        shape = "{batch} x {kv_heads} KV heads x {group}, head_dim {head_dim}, {context} tokens".format(**case)
        beside = (
            f"{result['contestants']['int8']['median_ms']:.2f} ms, SDPA {result['speedup_over_sdpa_fp32']:.1f}x as long"
        )
        yield at_least(shape, result["share_of_read_bandwidth"], BANDWIDTH_GOALS[case["group"]], beside)


def model_rows(content: dict[str, Any]) -> Iterator[Row]:
    """One batch, one dtype: level over the context, below DynamicCache, and the slopes of all caches."""
    rows = {(row["cache"], row["context"]): row for row in content["results"] if row["batch"] == 1}
    contexts = sorted({context for _, context in rows})
    for context in contexts:
        ours, theirs = rows["PagedInt8Cache", context], rows["DynamicCache", context]
        spread = (theirs["ms_quartile_3"] - theirs["ms_quartile_1"]) / theirs["ms"]
        beside = ", ".join(f"{name} {row['ms']:.1f}" for (name, at), row in rows.items() if at == context)
        yield at_most(f"ms per token at {context}, over DynamicCache's", ours["ms"] / theirs["ms"], 1 + spread, beside)
    if {64, 8000} <= set(contexts):
        ours = rows["PagedInt8Cache", 8000]["ms"] / rows["PagedInt8Cache", 64]["ms"]
        theirs = rows["DynamicCache", 8000]["ms"] / rows["DynamicCache", 64]["ms"]
        yield at_most("ms per token at 8,000 tokens over 64", ours, 1.12, f"DynamicCache {theirs:.2f}")
    slopes = {row["cache"]: row["ms_per_1000_tokens"] for row in content["slopes"] if row["batch"] == 1}
    beside = ", ".join(f"{name} {slope:.2f}" for name, slope in slopes.items())
    share = slopes["PagedInt8Cache"] / slopes["DynamicCache"]
    yield at_most("slope over DynamicCache's", share, 1 / 7, f"ms per 1,000 tokens: {beside}")


def chunk_rows(content: dict[str, Any]) -> Iterator[Row]:
    for memory in content["memory"]:
        case, share = memory["case"], memory["shares"]["int8"]
        if share is not None:
            chunk = f"chunk of {case['chunk']} over {case['past']} tokens, head_dim {case['head_dim']}"
            gathered = memory["shares"]["gather_sdpa"]
            yield at_most(
                f"{chunk}: peak over the dense past", 100 * share, 1, f"gathered {100 * gathered:.0f} %", " %"
            )
    for result in content["results"]:
        case = result["case"]
        what = f"chunk of {case['chunk']} over {case['past']} tokens, head_dim {case['head_dim']}"
        ours = result["contestants"]["int8"]["median_ms"]
        beside = f"{ours:.1f} ms; gather and SDPA {result['speedup_over_gather_sdpa']:.1f}x"
        yield at_least(what + ": SDPA over ours", result["speedup_over_sdpa"], 1, beside)


def prompt_rows(content: dict[str, Any]) -> Iterator[Row]:
    for result in content["results"]:
        what = f"prompt of {content['tokens']} tokens in chunks of {result['chunk']}, over DynamicCache's"
        beside = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["median_seconds"].items())
        yield at_most(what, result["ours_over_dynamic"], 1, beside)


def growth_rows(content: dict[str, Any]) -> Iterator[Row]:
    ways = {way["way"]: way["worst"] for way in content["ways"]}
    what = f"longest step while growing to {content['tokens']} tokens, over the median beside it"
    yield at_most(what, ways["segments"], 1.5, f"copying {ways['copying']:.2f}")


def budget_rows(content: dict[str, Any]) -> Iterator[Row]:
    for row in content["budgets"]:
        if row["measured"] is None:
            yield Row(row["name"], "", row["verdict"])
        else:
            yield at_most(row["name"], row["measured"], row["budget"], "", " " + row["unit"])


def peer_rows(content: dict[str, Any]) -> Iterator[Row]:
    for contestant in content["contestants"]:
        if "skipped" in contestant:
            yield Row(contestant["name"], "", contestant["skipped"])
        for cache in contestant.get("caches", ()):
            points = ", ".join(f"{point['ms']:.1f} at {point['context']}" for point in cache["points"])
            slope = f"{cache['ms_per_1000_tokens']:.2f} ms"
            yield Row(
                f"{contestant['name']}, {cache['cache']}: slope per 1,000 tokens", slope, f"ms per token: {points}"
            )


def benchmarks(threads: int) -> list[Benchmark]:
    """All of them, for this processor. The fastest instruction set runs without a variable's help."""
    several = ["--threads", str(threads)]
    found = []
    for i, isa in enumerate(name for name in cpu.isas() if name != "portable"):
        chosen = {ISA_VARIABLE: isa} if i else {}
        for count in sorted({1, threads}):
            arguments = ["latency.py", "--threads", str(count)]
            found.append(Benchmark("kernel", arguments, f"latency_kernel_{isa}_{count}", kernel_rows, chosen))
        arguments = [
            "latency_model.py",
            *several,
            "--batches",
            "1",
            "--contexts",
            "16",
            "64",
            "128",
            "8000",
            "--rounds",
            "75",
        ]
        found.append(Benchmark("model", arguments, f"latency_model_{isa}", model_rows, chosen))
    found += [
        Benchmark("chunks", ["chunks.py", "--threads", str(n)], f"chunks_{n}", chunk_rows, {})
        for n in sorted({1, threads})
    ]
    found += [
        Benchmark("prompts", ["prompts.py", *several], "prompts", prompt_rows, {}),
        Benchmark("growth", ["growth.py", *several], "growth", growth_rows, {}),
        Benchmark("budgets", ["budgets.py"], "budgets", budget_rows, {}),
        Benchmark("peers", [], "peers", peer_rows, {}),  # make bench-peers
    ]
    return found


def run(benchmark: Benchmark, path: Path) -> None:
    """Run a script. A budget that it misses is an exit status of its own, and no failure."""
    script, *arguments = benchmark.arguments
    command = [sys.executable, str(FOLDER / script), *arguments, "--json", str(path)]
    shown = " ".join([*(f"{k}={v}" for k, v in benchmark.environment.items()), "python", f"eval/{script}", *arguments])
    print(f"$ {shown}", flush=True)
    done = subprocess.run(command, env=os.environ | benchmark.environment, check=False)
    if done.returncode not in (0, 1) or not path.exists():
        raise SystemExit(f"eval/bench.py: {shown} failed with exit status {done.returncode}")


def table(benchmark: Benchmark, content: dict[str, Any]) -> list[str]:
    """The lines of one result file, under a heading that says what machine it is from."""
    machine = content["machine"]
    load = content.get("load_average_before")
    loaded = f", load {load[0]:.1f} before and {content['load_average_after'][0]:.1f} after" if load else ""
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    lines = [f"\n{benchmark.result}: {machine['processor']}, {machine.get('instruction_set', '?')}, {threads}{loaded}"]
    for row in benchmark.rows(content):
        verdict = "" if row.kept is None else "kept" if row.kept else "MISSED"
        lines.append(f"  {row.what:<88} {row.ours:>10} {row.goal:>12} {verdict:<6} {row.beside}".rstrip())
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({benchmark.name for benchmark in benchmarks(1)})
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder of the result files")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all, %(default)s)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument("--no-run", action="store_true", help="only read the result files that are there")
    args = parser.parse_args()
    chosen = [benchmark for benchmark in benchmarks(args.threads) if benchmark.name in args.only]
    paths = [args.results / f"{benchmark.result}.json" for benchmark in chosen]
    lines, missed = [], False
    for benchmark, path in zip(chosen, paths, strict=True):
        if benchmark.arguments and not args.no_run:
            run(benchmark, path)
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            lines += table(benchmark, content)
            missed |= any(row.kept is False for row in benchmark.rows(content))
        else:
            lines.append(f"\n{benchmark.result}: not measured")
    print("\n".join(lines))
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
