"""How fast decode attention reads the cache: our kernel, PyTorch's attention, and the machine's read bandwidth.

The contestants take turns in one process, one call each per round. Memory is cold: each contestant goes through so
many distinct caches that their bytes exceed four times the last-level cache, as in a model whose layers take turns.
Just before each timed call the same function runs on a few hundred tokens, untimed: its code is warm in every core,
and no contestant pays for the one before it. PyTorch's attention gets contiguous keys and values, with the queries that
share a head packed into query rows. The read sweep is torch's faster reduction (a sum of float32 or a maximum of int32)
over a larger buffer.

    python eval/latency.py --threads 2 --json latency_kernel.json --picture latency_kernel.png
    python eval/latency.py --device cuda

On a GPU (`_latency_cuda.py`) the rivals are float16, and a device copy takes the place of the sweep. For whole models
see `latency_model.py`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import device_called, positive, provenance, write_json
from _latency_race import BLOCK_SIZE, Case, Contestant, int8_calls, race, sdpa_calls, sets_for, warm_up_context

LLC_MULTIPLE = 4


CASES = (
    Case(1, 8, 1, 64, 8192),
    Case(1, 3, 3, 64, 8192),
    Case(1, 8, 4, 128, 8192),
    Case(4, 8, 4, 128, 4096),
    Case(8, 3, 3, 64, 4096),
)


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes, default=32 << 20)


def sweep_calls(cold_bytes: int) -> dict[str, Contestant]:
    buffer = torch.zeros(2 * cold_bytes // 4, dtype=torch.int32)
    reductions = {"sweep_sum": lambda x: x.view(torch.float32).sum(), "sweep_amax": torch.amax}
    return {
        name: Contestant([partial(call, buffer)], buffer.nbytes, partial(call, buffer[: 1 << 17]))
        for name, call in reductions.items()
    }


def run_case(case: Case, rounds: int, cold_bytes: int) -> dict[str, Any]:
    q = torch.randn(case.batch, case.kv_heads * case.group, 1, case.head_dim)
    scales_bytes = 2 * case.elements // case.head_dim
    int8_bytes, sets = case.elements + scales_bytes, sets_for(case.elements + scales_bytes, cold_bytes)
    fp32_sets, bf16_sets = (sets_for(case.elements * size, cold_bytes) for size in (4, 2))
    tiny = replace(case, context=warm_up_context(case))
    ours = partial(int8_calls, q=q)
    contestants = {
        "int8": Contestant(ours(case, sets), int8_bytes, *ours(tiny, 1)),
        "int8_random_order": Contestant(ours(case, sets, random_order=True), int8_bytes, *ours(tiny, 1)),
        "sdpa_fp32": Contestant(sdpa_calls(case, fp32_sets, q), case.elements * 4, *sdpa_calls(tiny, 1, q)),
        "sdpa_bf16": Contestant(
            sdpa_calls(case, bf16_sets, q.bfloat16()), case.elements * 2, *sdpa_calls(tiny, 1, q.bfloat16())
        ),
        **sweep_calls(cold_bytes),
    }
    results = race(contestants, rounds)
    bandwidth = max(results[name]["gb_per_s"] for name in results if name.startswith("sweep"))
    int8 = results["int8"]
    return {
        "case": vars(case),
        "contestants": results,
        "read_bandwidth_gb_per_s": bandwidth,
        "speedup_over_sdpa_fp32": results["sdpa_fp32"]["median_ms"] / int8["median_ms"],
        "speedup_over_sdpa_bf16": results["sdpa_bf16"]["median_ms"] / int8["median_ms"],
        "share_of_read_bandwidth": int8["gb_per_s"] / bandwidth,
        "cost_of_random_order": results["int8_random_order"]["median_ms"] / int8["median_ms"],
    }


def report(result: dict[str, Any]) -> str:
    ours, sdpa = result["contestants"]["int8"], result["contestants"]["sdpa_fp32"]
    case = Case(**result["case"]).in_lines().replace("\n", ", ")
    return (
        f"{case}:\n    {ours['median_ms']:.3f} ms [{ours['p10_ms']:.3f}, {ours['p90_ms']:.3f}]  "
        f"SDPA fp32 {sdpa['median_ms']:.2f} ms = {result['speedup_over_sdpa_fp32']:.2f}x, "
        f"bf16 {result['speedup_over_sdpa_bf16']:.2f}x  "
        f"{ours['gb_per_s']:.1f} of {result['read_bandwidth_gb_per_s']:.1f} GB/s = "
        f"{result['share_of_read_bandwidth']:.0%}  random order {result['cost_of_random_order']:.2f}x"
    )


def draw(results: list[dict[str, Any]], path: Path, title: str) -> None:
    """GB/s as bars, the read bandwidth as a line over each group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {
        "int8": "int8, paged",
        "int8_random_order": "int8, blocks in random order",
        "sdpa_fp32": "SDPA fp32",
        "sdpa_bf16": "SDPA bf16",
        "sdpa_fp16": "SDPA fp16",
        "flash_fp16": "FlashAttention fp16",
        "flex_fp16": "flex_attention fp16",
    }
    labels = {name: label for name, label in labels.items() if all(name in r["contestants"] for r in results)}
    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    width = 0.8 / len(labels)
    for i, (name, label) in enumerate(labels.items()):
        heights = [result["contestants"][name]["gb_per_s"] for result in results]
        times = [result["contestants"][name]["median_ms"] for result in results]
        bars = axes.bar([x + i * width for x in range(len(results))], heights, width, label=label)
        axes.bar_label(bars, [f"{t:.2f} ms" for t in times], rotation=90, fontsize=7, padding=2)
    for x, result in enumerate(results):
        limit = result["read_bandwidth_gb_per_s"]
        line = axes.hlines(limit, x - width / 2, x + (len(labels) - 0.5) * width, colors="black", linestyles="dashed")
    line.set_label("bandwidth")
    ticks = [x + (len(labels) - 1) / 2 * width for x in range(len(results))]
    axes.set_xticks(ticks, [Case(**result["case"]).in_lines() for result in results], fontsize=8)
    axes.set_ylabel("GB/s read (cold memory)")
    axes.set_title(title, fontsize=9)
    axes.margins(y=0.15)
    axes.legend(fontsize=8, ncols=5, loc="upper center")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=40, help="calls per contestant (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="(default: all, %(default)s)")
    parser.add_argument(
        "--case", type=int, nargs=5, action="append", metavar=("BATCH", "KV_HEADS", "GROUP", "HEAD_DIM", "CONTEXT"),
        help="repeatable; instead of the usual five; the context is a multiple of 16",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--picture", type=Path, help="draw the results there")
    args = parser.parse_args()
    cases = [Case(*numbers) for numbers in args.case] if args.case else list(CASES)
    if any(case.context % BLOCK_SIZE for case in cases):
        parser.error(f"the context must be a multiple of {BLOCK_SIZE}")
    device = device_called(args.device)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    made = provenance(device, timed=True)
    machine = made["machine"]
    results: list[dict[str, Any]] = []
    run: Callable[[Case, int, int], dict[str, Any]] = run_case
    if device.type == "cuda":
        import _latency_cuda

        cases = cases if args.case else list(_latency_cuda.CASES)
        machine["last_level_cache_bytes"] = torch.cuda.get_device_properties(device).L2_cache_size
        run, say, chip = partial(_latency_cuda.run_case, device=device), _latency_cuda.report, machine["device"]
    else:
        machine["last_level_cache_bytes"] = last_level_cache()
        say = report
        chip = f"{machine['processor']}, {machine['threads']} threads, {machine['instruction_set']}"
    for case in cases:
        results.append(run(case, args.rounds, LLC_MULTIPLE * machine["last_level_cache_bytes"]))
        print(say(results[-1]), flush=True)
    if args.json:
        write_json(args.json, {**made, "rounds": args.rounds, "results": results})
    if args.picture:
        draw(results, args.picture, f"Decode attention, {chip}")


if __name__ == "__main__":
    main()
