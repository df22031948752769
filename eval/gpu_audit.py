"""Static audit of the Triton decode kernel: what its machine code allows, told without a GPU.

Compiles variants for GPUs that need not be here, disassembles them and counts the main loop. From the instructions a
warp issues per iteration follows an upper bound on the bandwidth: a multiprocessor issues four instructions per cycle,
so it takes in ``bytes of K and V / (instructions * warps / 4)`` bytes per cycle at most. Beside the bound stands what
latency costs: how often an iteration waits for memory, what is in flight meanwhile (`_memory_trips.py`), and how much
a program executes before and after its loop.

    python eval/gpu_audit.py --json docs/gpu_audit.json

`make gpu-audit` does this; README.md shows `summary` of the file.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from _machine_code import MULTIPROCESSORS, audit_cubin, audit_hsaco, audit_whole, tool
from _memory_trips import bytes_in_flight
from _offline_launches import append, decode, extend
from _triton_offline import TARGETS
from tqdm import tqdm

from hf_int8_paged.kernels.triton.tiles import TOKENS

CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")
HEAD_DIMS, GROUPS, BLOCK_SIZES = (64, 128, 256), (1, 4, 8), (16, 64)
DTYPES = (torch.float16, torch.bfloat16)
#: Scales of K and V: two loads of eight each, by every thread, per tile.
SCALE_LOADS = 4


def audit(
    chip: str,
    head_dim: int,
    group: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float16,
    rotation: str | None = "hadamard",
    integer: bool = True,
) -> dict[str, Any]:
    """Compile the decode kernel as its launcher would on ``chip``, with one first token per sequence as caches have by
    default, and return its figures."""
    compiled = decode(chip, head_dim, group, block_size, dtype, rotation, integer)
    kernel = next(kernel for name, kernel in compiled if name == "decode_kernel")
    variant = {
        "chip": chip,
        "head_dim": head_dim,
        "group": group,
        "block_size": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "rotation": rotation,
        "integer": integer,
    }
    if chip not in MULTIPROCESSORS:
        return variant | audit_hsaco(kernel)
    figures = audit_cubin(kernel, MULTIPROCESSORS[chip])
    bytes_per_warp = TOKENS.value * 2 * head_dim
    wide_loads = figures["loop_loads_by_bytes_per_thread"].get(16, 0) - SCALE_LOADS
    return variant | figures | {
        "bytes_per_iteration": bytes_per_warp * figures["warps"],
        "bytes_in_flight": bytes_in_flight(
            bytes_per_warp * figures["warps"], figures["dependent_trips"], figures["blocks_per_multiprocessor"]
        ),
        "kv_loads_narrower_than_16_bytes": max(0, bytes_per_warp // (16 * 32) - wide_loads),
        "bytes_per_cycle": round(bytes_per_warp * 4 / figures["loop_instructions"], 1),
        "bytes_per_cycle_needed": MULTIPROCESSORS[chip].bytes_per_cycle_needed,
    }  # fmt: skip


#: The other launches of a layer: name -> (what compiles it, query rows or new tokens).
LAUNCHES = {
    "append, a prompt": (append, 512),
    "append, one token": (append, 1),
    "extend": (extend, 128),
    "decode": (lambda chip, head_dim, _: decode(chip, head_dim, 4), 1),
}


def audit_others(chip: str, head_dim: int) -> list[dict[str, Any]]:
    """Figures of all kernels but `audit`'s: a row per kernel of a launch, with a group of 4 and blocks of 16.

    ``instructions_per_tile`` of append is what a warp issues for 16 rows of 128 elements, of K or V, without the slow
    paths of divisions.
    """
    rows = []
    for launch, (compile_for, count) in LAUNCHES.items():
        for name, kernel in compile_for(chip, head_dim, count):
            if name == "decode_kernel":
                continue
            figures = audit_whole(kernel, MULTIPROCESSORS[chip])
            if launch == "append, a prompt":
                tiles = 2 * head_dim / 128 * constant(kernel, "TOKENS") / 16
                figures["instructions_per_tile"] = round(figures["instructions_without_slow_paths"] / tiles)
            rows.append({"launch": launch, "kernel": name, "chip": chip, "head_dim": head_dim} | figures)
    return rows


def audit_float16(head_dim: int) -> dict[str, Any]:
    """Figures of decode attention where it multiplies in float16, on the chip that takes that route."""
    chip = "sm_103"
    kernel = next(kernel for name, kernel in decode(chip, head_dim, 4, integer=False) if name == "decode_kernel")
    figures = audit_whole(kernel, MULTIPROCESSORS[chip])
    return {"launch": "decode in float16", "kernel": "decode_kernel", "chip": chip, "head_dim": head_dim} | figures


def constant(kernel: Any, name: str) -> Any:
    """The value of a kernel's constexpr parameter."""
    return kernel.src.constants[(kernel.src.fn.arg_names.index(name),)]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the NVIDIA variants, and one of the AMD ones."""
    lines = [
        "| chip | head_dim | group | block | q | rotation | registers | spills | loop | bytes/cycle | need | blocks "
        "| trips | in flight | outside the loop | barriers there |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in (r for r in rows if "registers" in r):
        lines.append(
            f"| {r['chip']} | {r['head_dim']} | {r['group']} | {r['block_size']} | {r['dtype']} | {r['rotation']} "
            f"| {r['registers']} | {r['spill_instructions']} | {r['loop_instructions']} | {r['bytes_per_cycle']} "
            f"| {r['bytes_per_cycle_needed']} | {r['blocks_per_multiprocessor']} | {r['dependent_trips']} "
            f"| {r['bytes_in_flight']} | {r['instructions_outside_loop']} | {r['barriers_outside_loop']} |"
        )
    lines += ["", "| chip | head_dim | group | rotation | VGPRs | spills | stack | loop | barriers in it |"]
    lines.append("|---" * 9 + "|")
    for r in (r for r in rows if "vector_registers" in r):
        lines.append(
            f"| {r['chip']} | {r['head_dim']} | {r['group']} | {r['rotation']} | {r['vector_registers']} "
            f"| {r['spills']} | {r['stack_bytes']} | {r['loop_instructions']} | {r['barriers_in_loop']} |"
        )
    return "\n".join(lines)


def table_of_others(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the rows of `audit_others`."""
    lines = [
        "| launch | kernel | chip | head_dim | registers | spills | in the loop | instructions | per tile | loops "
        "| main loop | trips | stores by bytes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        stores = ", ".join(f"{count} x {width}" for width, count in r["stores_by_bytes_per_thread"].items())
        lines.append(
            f"| {r['launch']} | {r['kernel']} | {r['chip']} | {r['head_dim']} | {r['registers']} "
            f"| {r['spill_instructions']} | {r.get('spill_instructions_in_loop', '')} "
            f"| {r['instructions_without_slow_paths']} | {r.get('instructions_per_tile', '')} | {r['loops']} "
            f"| {r.get('loop_instructions', '')} | {r.get('dependent_trips', '')} | {stores} |"
        )
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown table for README.md: head_dim 128, block_size 16, float16 queries, as caches are by default."""
    lines = [
        "| head_dim 128 | group | bytes per cycle and SM | what memory delivers | registers | spills | blocks per SM "
        "| K and V loads under 16 bytes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    chips = {"sm_80": "A100 (sm_80)", "sm_90": "H100 (sm_90)"}
    shown = {"head_dim": 128, "block_size": 16, "dtype": "float16", "rotation": "hadamard", "integer": True}
    for r in (r for r in rows if r["chip"] in chips and shown.items() <= r.items()):
        lines.append(
            f"| {chips[r['chip']]} | {r['group']} | {r['bytes_per_cycle']} | {r['bytes_per_cycle_needed']} "
            f"| {r['registers']} | {r['spill_instructions']} | {r['blocks_per_multiprocessor']} "
            f"| {r['kv_loads_narrower_than_16_bytes']} |"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of torch, triton, and the assemblers in triton's wheel: the older chips' and Blackwell's."""
    found = {"torch": torch.__version__, "triton": triton.__version__}
    for name in ("ptxas", "ptxas-blackwell"):
        release = re.search(r"V(\d[\d.]*)", tool(name, "--version"))
        found[name] = release[1] if release else "unknown"
    return found


def write_json(path: Path, **lists: list[dict[str, Any]]) -> None:
    """A line per variant of each list: few bytes, and differences that can be read."""
    text = json.dumps({"command": shlex.join(["python", *sys.argv]), "versions": versions()}, indent=1)[:-2]
    for name, rows in lists.items():
        text += f',\n "{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]"
    path.write_text(text + "}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=CHIPS, choices=list(TARGETS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--groups", nargs="+", type=int, default=GROUPS)
    parser.add_argument("--block-sizes", nargs="+", type=int, default=BLOCK_SIZES)
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    sizes = (arguments.chips, arguments.head_dims, arguments.groups)
    variants = [*product(*sizes, arguments.block_sizes, DTYPES, ["hadamard"])]
    variants += product(*sizes, arguments.block_sizes[:1], DTYPES[:1], [None])
    rows = [audit(*variant) for variant in tqdm(variants, desc="compiling", unit="kernel")]
    print(table(rows))
    nvidia = product([chip for chip in arguments.chips if chip in MULTIPROCESSORS], arguments.head_dims)
    others = [row for chip, head_dim in tqdm([*nvidia], unit="chip") for row in audit_others(chip, head_dim)]
    others += [audit_float16(head_dim) for head_dim in arguments.head_dims]
    print("", table_of_others(others), sep="\n")
    if arguments.json:
        write_json(arguments.json, variants=rows, kernels=others)


if __name__ == "__main__":
    main()
