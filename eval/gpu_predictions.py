"""Predicts how long decode attention takes on GPUs that are not here, from its machine code.

The two kernels are compiled as their launcher would on that GPU, and the busiest multiprocessor is simulated
(`_warp_simulator.py`): when each warp issues each instruction, by the stalls and scoreboards in the machine code. What
that does not tell is assumed, and written down beside the result. Nothing here was timed.

    python eval/gpu_predictions.py --json docs/gpu_predictions.json --picture docs/gpu_predictions.png

`make gpu-audit` does this. `make bench-gpu` sets the predictions beside its measurements.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _decode_trace import phases
from _machine_code import MULTIPROCESSORS, disassemble, resident_blocks
from _offline_launches import Sizes, decode
from _sass import Program
from _schedule_model import chunks_of, segments_of_programs
from _triton_offline import Launch
from _warp_simulator import Assumptions, simulate
from tqdm import tqdm

from hf_int8_paged.kernels.triton.tiles import TOKENS

HEAD_DIM, KV_HEADS, GROUP, BLOCK_SIZE = 128, 8, 4, 16
#: (sequences, tokens of each)
WORKLOADS = ((1, 8192), (1, 32768), (1, 131072), (32, 4096))
LATENCIES = (600, 800, 1000)
#: Of what the first kernel has just written.
L2_LATENCY = 300
#: For both kernels: the start of the first, and the gap before the second.
LAUNCH_MICROSECONDS = 3.0


@dataclass(frozen=True)
class Gpu:
    """What data sheets say.

    A product of 16 x 32 with 32 x 8 bytes keeps a quarter of a multiprocessor busy for as many cycles as the peak of
    dense int8 operations gives. Blackwell's, for which its code waits as for a load, is taken to be like Ampere's.
    """

    name: str
    chip: str
    processors: int
    gigahertz: float
    terabytes_per_second: float
    tensor_core_busy: int

    def bytes_per_cycle(self, share: float) -> float:
        """Of one multiprocessor, with this share of the peak."""
        return share * self.terabytes_per_second * 1e3 / self.gigahertz / self.processors


GPUS = (
    Gpu("A100", "sm_80", 108, 1.41, 2.04, 8),
    Gpu("H100", "sm_90", 132, 1.75, 3.35, 4),
    Gpu("B200", "sm_100", 148, 1.93, 8.0, 8),
)


def predict(gpu: Gpu, batch: int, tokens: int) -> dict[str, Any]:
    """Microseconds of decode attention of ``batch`` sequences of ``tokens``.

    Two more figures tell the range that the shortest and the longest latency of memory give.
    """
    sizes = Sizes(batch, KV_HEADS, -(-tokens // BLOCK_SIZE), gpu.processors)
    launches: list[Launch] = []
    compiled = decode(gpu.chip, HEAD_DIM, GROUP, sizes=sizes, launches=launches)
    bytes_read = batch * KV_HEADS * tokens * (2 * HEAD_DIM + 4)
    split, join = (disassemble(kernel) for _, kernel in compiled)
    work = segments_of_programs(chunks_of(np.full(batch, tokens)), KV_HEADS, launches[0].grid[0])
    slots = -(-launches[0].grid[0] // (batch * KV_HEADS)) + 1  # programs that may leave a part of a unit
    joined = [[-(-slots // launches[1].arguments["SLOT_TILE"])]] * launches[1].grid[0]
    iteration_bytes = TOKENS.value * (2 * HEAD_DIM + 4)
    cycles = [
        (kernel_cycles(gpu, split, work, latency, iteration_bytes), kernel_cycles(gpu, join, joined, L2_LATENCY, None))
        for latency in LATENCIES
    ]
    times = [LAUNCH_MICROSECONDS + sum(each) / gpu.gigahertz / 1e3 for each in cycles]
    nominal = len(LATENCIES) // 2
    return {
        "gpu": gpu.name,
        "batch": batch,
        "tokens": tokens,
        "microseconds": round(times[nominal], 1),
        "microseconds_from": round(times[0], 1),
        "microseconds_to": round(times[-1], 1),
        "split_kernel": round(cycles[nominal][0] / gpu.gigahertz / 1e3, 1),
        "join_kernel": round(cycles[nominal][1] / gpu.gigahertz / 1e3, 1),
        "at_peak_bandwidth": round(bytes_read / gpu.terabytes_per_second / 1e6, 1),
        "terabytes_per_second": round(bytes_read / times[nominal] / 1e6, 2),
    }


def kernel_cycles(
    gpu: Gpu,
    kernel: tuple[Program, dict[str, int]],
    work: list[list[int]],
    latency: float,
    loop_bytes: float | None,
) -> float:
    """Of the multiprocessor that has most to do. ``work``: iterations of each segment of each program."""
    assumed = Assumptions(memory_latency=latency, tensor_core_busy=gpu.tensor_core_busy)
    program, resources = kernel
    parts = phases(program, loop_bytes, assumed)
    shares = [[parts.trace(each) for each in work[at :: gpu.processors]] for at in range(gpu.processors)]
    return simulate(
        max(shares, key=lambda traces: sum(map(len, traces))),
        resources["warps"],
        resident_blocks(resources, MULTIPROCESSORS[gpu.chip]),
        gpu.bytes_per_cycle(assumed.share_of_peak_bandwidth),
        assumed,
    )


def assumptions() -> dict[str, Any]:
    """All that is not read off the machine code."""
    return {
        "cycles": {name: value for name, value in asdict(Assumptions()).items() if name != "tensor_core_busy"},
        "memory_latency_from_to": [LATENCIES[0], LATENCIES[-1]],
        "l2_latency": L2_LATENCY,
        "launch_microseconds": LAUNCH_MICROSECONDS,
        "gpus": [asdict(gpu) for gpu in GPUS],
        "model": [
            "a program runs on the multiprocessor of its number, and the one with most instructions decides",
            "a multiprocessor has its part of the bandwidth and lends none",
            "loads of K, V, scales and block ids take the latency of memory, and bandwidth in the order of issue",
            "what the second kernel joins comes from the L2 cache; stores take nothing",
            "masks of first and last tiles are executed for all tiles",
            "the units of floats, integers and loads are never the limit",
        ],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted GB/s, with the range of latencies, against the peak of each GPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(GPUS), figsize=(11, 3.6), layout="constrained")
    for gpu, axis in zip(GPUS, axes):
        mine = [row for row in rows if row["gpu"] == gpu.name]
        labels = [f"{row['batch']} x {row['tokens'] // 1024}k" for row in mine]
        speeds = [1e3 * row["terabytes_per_second"] for row in mine]
        total = [speed * row["microseconds"] for speed, row in zip(speeds, mine)]
        slowest = [each / row["microseconds_to"] for each, row in zip(total, mine)]
        fastest = [each / row["microseconds_from"] for each, row in zip(total, mine)]
        below = [speed - least for speed, least in zip(speeds, slowest)]
        above = [most - speed for speed, most in zip(speeds, fastest)]
        axis.bar(labels, speeds, yerr=[below, above], capsize=4, color="#4878a8")
        axis.axhline(1e3 * gpu.terabytes_per_second, color="black", linewidth=1, label="peak of the memory")
        axis.set_title(f"{gpu.name} ({gpu.chip})")
        axis.set_xlabel("sequences x tokens")
        axis.set_ylim(0, 1.1e3 * gpu.terabytes_per_second)
    axes[0].set_ylabel("GB/s, predicted, not timed")
    axes[0].legend(loc="upper left", fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the predictions and what they assume here")
    parser.add_argument("--picture", type=Path, help="draw predicted GB/s against the peak here")
    arguments = parser.parse_args()
    cases = [(gpu, *workload) for gpu in GPUS for workload in WORKLOADS]
    rows = [predict(*case) for case in tqdm(cases, desc="simulating", unit="case")]
    print("| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|", sep="\n")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    if arguments.json:
        head = json.dumps({"command": "make gpu-audit", "assumptions": assumptions()}, indent=1)[:-2]
        lines = ",\n".join(json.dumps(row) for row in rows)
        arguments.json.write_text(f'{head},\n "predictions": [\n{lines}\n]}}\n', encoding="utf-8")
    if arguments.picture:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
