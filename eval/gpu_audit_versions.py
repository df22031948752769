"""The decode kernel's machine code under several releases of Triton.

The kernel keeps K and V out of shared memory by an order of operands that Triton must leave alone; whether a release
does, shows in the barriers and shared-memory stores of the main loop. Each release is laid over the environment by
PYTHONPATH, in a process of its own; the environment's own release comes last.

    python eval/gpu_audit_versions.py --overlays .venv/overlays/triton-3.6.0 --json docs/gpu_versions.json

`make gpu-audit-versions` installs the releases and does this. The exit status is 1 where a release of which the project
says that it is fast enough (`LAYOUTS_KEPT`) is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_int8_paged.kernels.triton.device import LAYOUTS_KEPT

CHIPS, HEAD_DIMS, GROUP = ("sm_80", "sm_90", "sm_100"), (64, 128, 256), 4
#: Of each variant's figures.
SHOWN = (
    "chip",
    "head_dim",
    "registers",
    "spill_instructions_in_loop",
    "barriers_in_loop",
    "shared_memory_stores_in_loop",
    "loop_instructions",
    "dependent_trips",
    "blocks_per_multiprocessor",
    "instructions_outside_loop",
    "barriers_outside_loop",
)
ONE_RELEASE = """
import json, sys
sys.path.insert(0, sys.argv[1])
from gpu_audit import audit, versions
chips, head_dims, group = json.loads(sys.argv[2])
rows = [audit(chip, head_dim, group) for chip in chips for head_dim in head_dims]
print(json.dumps([versions() | row for row in rows]))
"""


def figures(overlay: Path | None, chips: list[str], head_dims: list[int]) -> list[dict[str, Any]]:
    """Rows of the release in ``overlay``, or of the environment's own: its version and ``SHOWN``."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment.pop("TRITON_INTERPRET", None)
    if overlay is not None:
        environment["PYTHONPATH"] = str(overlay.resolve())
    arguments = [str(Path(__file__).parent), json.dumps([chips, head_dims, GROUP])]
    run = subprocess.run(
        [sys.executable, "-c", ONE_RELEASE, *arguments], check=True, text=True, stdout=subprocess.PIPE, env=environment
    )
    return [{"triton": row["triton"]} | {name: row[name] for name in SHOWN} for row in json.loads(run.stdout)]


def release(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(part) for part in version.split(".")[:2])


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences about the rows that do not keep what is said of their release."""
    found = []
    for row in rows:
        passes_shared_memory = row["barriers_in_loop"] > 0 or row["shared_memory_stores_in_loop"] > 0
        where = f"triton {row['triton']}, {row['chip']}, head_dim {row['head_dim']}"
        if release(row["triton"]) >= LAYOUTS_KEPT and passes_shared_memory:
            found.append(
                f"{where}: {row['barriers_in_loop']} barriers and {row['shared_memory_stores_in_loop']} shared-memory "
                "stores in the main loop"
            )
        if release(row["triton"]) >= LAYOUTS_KEPT and row["spill_instructions_in_loop"] and row["head_dim"] <= 128:
            found.append(f"{where}: {row['spill_instructions_in_loop']} spill instructions in the main loop")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    names = ("triton", *SHOWN)
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlays", nargs="*", type=Path, default=[], help="folders, each with a release of triton")
    parser.add_argument("--chips", nargs="+", default=CHIPS)
    parser.add_argument("--head-dims", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    rows = [
        row for overlay in (*arguments.overlays, None) for row in figures(overlay, arguments.chips, arguments.head_dims)
    ]
    print(table(rows))
    if arguments.json:
        head = json.dumps({"command": "make gpu-audit-versions"}, indent=1)[:-2]
        lines = ",\n".join(json.dumps(row) for row in rows)
        arguments.json.write_text(f'{head},\n "variants": [\n{lines}\n]}}\n', encoding="utf-8")
    sys.exit("\n".join(faults(rows)) or 0)


if __name__ == "__main__":
    main()
