"""The day a GPU is there: what to find out first, in this order, within eight minutes, and what came of it.

Each section runs in a process of its own for as many seconds as it is given. When it ends, however it ends, the result
file is written anew: a section that fails, crashes or takes too long is recorded with what it left, and the next one
goes on.

    python eval/gpu_day.py tests --json eval/results/gpu_tests.json
    python eval/gpu_day.py bench --json eval/results/gpu_bench.json

`make test-gpu bench-gpu` does this. ``--dry-run`` executes the same lines on the CPU, so that no minute of a GPU is
lost to a typo: tests are collected, and measurements are made on little with invented times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import device_called, provenance, write_json

ROOT = Path(__file__).parents[1]
#: Characters of a section's output that are kept.
KEPT = 4000


@dataclass(frozen=True)
class Section:
    """A part of the day.

    Attributes:
        seconds: after which it is ended.
        tests: arguments for pytest; else a measurement of `_gpu_measurements.py`.
    """

    seconds: int
    tests: tuple[str, ...] = ()

    def command(self, name: str, part: Path, dry_run: bool) -> list[str]:
        if not self.tests:
            script = str(ROOT / "eval" / "_gpu_measurements.py")
            return [sys.executable, script, name, "--part", str(part), *["--dry-run"] * dry_run]
        how = ["--collect-only", "-q"] if dry_run else ["-m", "gpu", "-q", "-rfE", "--tb=short", "--maxfail=20"]
        return [sys.executable, "-m", "pytest", *how, *self.tests]


#: The kernels' tests compile many variants: side by side on all processors.
NUMERICS = (
    "tests/kernels",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/*/*triton*.py")) if "test_" not in path.name),
    "-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile",
)  # fmt: skip
SECTIONS = {
    "tests": {
        "numerics": Section(150, NUMERICS),
        "races": Section(40, ("tests/gpu", "-k", "same_bits")),
        "graphs": Section(30, ("tests/gpu", "-k", "captured")),
        "devices": Section(20, ("tests/gpu", "-k", "second_device")),
        "models": Section(40, ("tests/gpu", "-k", "generates")),
    },
    "bench": {
        "kernels": Section(60),
        "flex": Section(60),
        "model": Section(80),
    },
}


def run(name: str, section: Section, dry_run: bool) -> dict[str, Any]:
    """Run a section to its end, or to the end of its time."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_INT8_PAGED_TEST_SEED=str(int(time.time())))
    limit = section.seconds
    if dry_run:
        limit *= 10  # processors are slow and perhaps busy
        if section.tests:
            environment["TRITON_INTERPRET"] = "1"  # without it, and without a GPU, the tests of a GPU do not exist
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output", "w+", encoding="utf-8") as output:
        part = Path(folder) / "part.json"
        command = section.command(name, part, dry_run)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(limit)
            status = "passed" if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = f"ended after its {limit} seconds"
        output.seek(0)
        text = output.read()[-KEPT:]
        results = json.loads(part.read_text(encoding="utf-8")) if part.exists() else []
    seconds = round(time.monotonic() - start, 1)
    return {"section": name, "status": status, "seconds": seconds, "results": results, "output": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=SECTIONS)
    parser.add_argument("--only", nargs="+", help="sections instead of all")
    parser.add_argument("--json", type=Path, help="write the results there, after each section")
    parser.add_argument("--dry-run", action="store_true", help="execute the lines on the CPU; nothing is measured")
    arguments = parser.parse_args()
    sections = SECTIONS[arguments.part]
    if unknown := set(arguments.only or ()) - sections.keys():
        parser.error(f"there is no section {sorted(unknown)[0]!r}; there are {', '.join(sections)}")
    device = device_called("cpu" if arguments.dry_run else "cuda")
    made = provenance(device, timed=True) | {"dry_run": arguments.dry_run}
    done = []
    for name in arguments.only or sections:
        done.append(run(name, sections[name], arguments.dry_run))
        print(f"{name}: {done[-1]['status']}, {done[-1]['seconds']} s", flush=True)
        if done[-1]["status"] != "passed" or not sections[name].tests:
            print(done[-1]["output"], flush=True)
        if arguments.json:
            write_json(arguments.json, {**made, "sections": done})
    sys.exit(any(each["status"] != "passed" for each in done))


if __name__ == "__main__":
    main()
