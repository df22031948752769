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
from _machine_code import MULTIPROCESSORS, audit_cubin, audit_hsaco, tool
from _memory_trips import bytes_in_flight
from _triton_offline import TARGETS, compiling_for
from tqdm import tqdm

from hf_int8_paged.kernels import FirstTokens, KvCacheQuant, Scoring, Tokens
from hf_int8_paged.kernels.triton.decode import launch_decode
from hf_int8_paged.kernels.triton.tiles import TOKENS
from hf_int8_paged.kernels.triton.tuning import Chip

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
    kv_heads, num_blocks = 2, 64
    slots = (kv_heads, num_blocks, block_size)
    storage = KvCacheQuant(
        k=torch.empty(*slots, head_dim, dtype=torch.int8),
        v=torch.empty(*slots, head_dim, dtype=torch.int8),
        k_scales=torch.empty(slots, dtype=torch.float16),
        v_scales=torch.empty(slots, dtype=torch.float16),
        backend="triton",
        tile_order="v_transposed",
        rotation=rotation,
    )
    q = torch.empty(2, kv_heads * group, 1, head_dim, dtype=dtype)
    table, lens = torch.empty(2, num_blocks, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    rows = torch.empty(2, kv_heads, 1, head_dim, dtype=dtype)
    first_tokens = FirstTokens(rows, rows, lens, lens, lens, limit=1)
    with compiling_for(TARGETS[chip]) as compiled:
        launch_decode(
            torch.empty_like(q), q, storage, Tokens.at(table, lens), Scoring(head_dim**-0.5), first_tokens,
            chip=Chip(chip, 132), integer=integer,
        )  # fmt: skip
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
    lines += ["", "| chip | head_dim | group | rotation | VGPRs | spills | stack |", "|---|---|---|---|---|---|---|"]
    for r in (r for r in rows if "vector_registers" in r):
        lines.append(
            f"| {r['chip']} | {r['head_dim']} | {r['group']} | {r['rotation']} | {r['vector_registers']} "
            f"| {r['spills']} | {r['stack_bytes']} |"
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


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line per variant: few bytes, and differences that can be read."""
    head = {"command": shlex.join(["python", *sys.argv]), "versions": versions()}
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "variants": [\n{lines}\n]}}\n', encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=list(TARGETS), choices=list(TARGETS))
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
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
