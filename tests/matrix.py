"""The whole suite under other versions, instruction sets and loads: ``make test-matrix``.

    python tests/matrix.py --rows oldest newest

makes what environments are missing, runs the suite in each row's, and writes what ran and what it said into
eval/results/compatibility.json and, made from it, docs/compatibility.md. A row whose result is there for the same
sources is not run again. It needs the standard library only; ``python3.10`` and the like are looked for on the path and
among pyenv's versions.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JSON = ROOT / "eval" / "results" / "compatibility.json"
MARKDOWN = ROOT / "docs" / "compatibility.md"
#: What a result depends on.
SOURCES = ("hf_int8_paged", "kernels", "tests", "eval/*.py", "examples", "setup.py", "pyproject.toml")

#: Printed by an environment's Python: what the table says of it.
ASK = """
import importlib.metadata, json, platform
from hf_int8_paged.kernels import why_unavailable
from hf_int8_paged.kernels.cpu import backend as cpu
import torch
names = ("torch", "transformers", "accelerate", "triton")
found = {name: importlib.metadata.version(name) for name in names}
isa = cpu.selected_isa() if why_unavailable("cpu", torch.device("cpu")) is None else "none"
print(json.dumps({"python": platform.python_version(), **found, "instruction_set": isa}))
"""
#: A busy loop that ends with the process that started it.
BUSY = "import os; p = os.getppid()\nwhile os.getppid() == p: sum(range(10**6))"


@dataclass(frozen=True)
class Row:
    """A run of the suite: in which environment, and what beside it."""

    #: Python's minor version and what is installed, the project's development packages besides; `None`: this Python.
    python: str | None = None
    requirements: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    workers: int = 2
    threads: int = 1
    #: Busy processes beside the suite.
    load: int = 0


ROWS = {
    "oldest": Row("3.10", ("torch==2.11.0", "transformers==5.18.0", "accelerate==1.10.*", "triton==3.6.*"), workers=1),
    # Threads that wait do so asleep: beside other work, two that spin would be a hundred times as slow.
    "newest": Row(
        "3.13",
        ("torch", "transformers", "accelerate", "triton"),
        {"OMP_WAIT_POLICY": "passive"},
        workers=1,
        threads=2,
    ),
    "avx2": Row(environment={"HF_INT8_PAGED_CPU_ISA": "avx2"}),
    "portable-busy": Row(environment={"HF_INT8_PAGED_CPU_ISA": "portable"}, load=2),
}


def interpreter(version: str) -> str | None:
    """Path of a Python of this minor version, or ``None``."""
    if version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        return sys.executable
    found = shutil.which(f"python{version}")
    # pyenv's shims are on the path for versions that are not activated, and fail.
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
        return found
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = sorted(pyenv.glob(f"{version}.*/bin/python"))
    return str(candidates[-1]) if candidates else None


def prepare(row: Row, folder: Path, upgrade: bool) -> str:
    """The row's Python, with this project installed in place; ``upgrade`` fetches newer releases where there are any.

    Raises:
        LookupError: there is no Python of that version.
        subprocess.CalledProcessError: an installation failed.
    """
    if row.python is None:
        return sys.executable
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    if not python.exists():
        base = interpreter(row.python)
        if base is None:
            raise LookupError(f"no Python {row.python} was found")
        subprocess.run([base, "-m", "venv", str(folder)], check=True)
    marker = folder / ".installed"
    if not marker.exists() or upgrade:
        # torch first: resolved with the rest, several of its releases might be fetched.
        subprocess.run([*pip, *["--upgrade"] * upgrade, *row.requirements], check=True)
        subprocess.run([*pip, *row.requirements, "setuptools>=77", "-e", f"{ROOT}[dev]"], check=True)
        marker.touch()
    else:
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", str(ROOT)], check=True)
    return str(python)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[list[subprocess.Popen]]:
    """So many processes that compute nothing, until the block ends."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield loops
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def counts(junit: Path) -> dict[str, Any]:
    """Numbers of tests by outcome, and the names of those that failed, from pytest's XML report."""
    outcomes: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for case in xml.etree.ElementTree.parse(junit).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            outcomes["failed"] += 1
            outcomes["failures"].append(f"{case.get('classname')}.{case.get('name')}")
        else:
            outcomes["skipped" if "skipped" in kinds else "passed"] += 1
    return outcomes


def run(name: str, folder: Path, arguments: list[str], upgrade: bool) -> dict[str, Any]:
    """Run the suite, or what pytest's arguments say of it, in a row's environment. The record for the table."""
    row = ROWS[name]
    try:
        python = prepare(row, folder / f"py{row.python}-{name}".replace("3.", "3"), upgrade)
    except (LookupError, subprocess.CalledProcessError) as error:
        return {"problem": str(error)}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(row.threads), **row.environment}
    asked = subprocess.run([python, "-c", ASK], env=environment, capture_output=True, text=True, cwd=ROOT)
    if asked.returncode:
        return {"problem": asked.stderr.strip().splitlines()[-1]}
    folder.mkdir(parents=True, exist_ok=True)
    junit = (folder / f"{name}.xml").resolve()
    junit.unlink(missing_ok=True)
    parallel = ["-n", str(row.workers), "--dist", "loadfile"] if row.workers > 1 else []
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}", *parallel, *arguments]
    start = time.monotonic()
    with busy(row.load):
        subprocess.run(command, env=environment, cwd=ROOT)
    seconds = round(time.monotonic() - start)
    if not junit.exists():
        return {"problem": "pytest left no report"}
    settings = {"workers": row.workers, "threads": row.threads, "load": row.load}
    return {**json.loads(asked.stdout.splitlines()[-1]), **settings, **counts(junit), "seconds": seconds}


def digest() -> str:
    """Of the sources that a result depends on, changes that are not committed included."""
    content = b"".join(
        subprocess.run(["git", *command, "--", *SOURCES], cwd=ROOT, check=True, capture_output=True).stdout
        for command in (["ls-files", "-s"], ["diff"])
    )
    return hashlib.sha256(content).hexdigest()[:12]


def as_markdown(records: dict[str, dict[str, Any]]) -> str:
    """docs/compatibility.md, from what was recorded of each row."""
    lines = [
        "# Compatibility",
        "",
        "Written by `make test-matrix` from `eval/results/compatibility.json`: the test suite under the oldest and",
        "the newest versions that are supported, under other instruction sets, and beside other work. CI runs",
        "`make test-versions`, the short form: the cache's tests under the oldest and the newest transformers.",
        "",
        "| row | Python | torch | transformers | accelerate | triton | instruction set | workers x threads "
        "| busy loops beside it | what | passed | failed | skipped | seconds | date |",
        "|---|---|---|---|---|---|---|---|---|---|--:|--:|--:|--:|---|",
    ]
    columns = ("python", "torch", "transformers", "accelerate", "triton", "instruction_set")
    failures = []
    for name, record in records.items():
        if "problem" in record:
            cells = [name, "not run: " + record["problem"].replace("|", "\\|")]
        else:
            cells = [name, *(record[column] for column in columns), f"{record['workers']} x {record['threads']}"]
            cells += [str(record["load"]), f"`{record['arguments']}`" if record["arguments"] else "all tests"]
            cells += [str(record[column]) for column in ("passed", "failed", "skipped", "seconds")]
            cells.append(record["date"])
            failures += [f"* {name}: `{failure}`" for failure in record["failures"]]
        lines.append("| " + " | ".join(cells) + " |")
    if failures:
        lines += ["", "## Failed", "", *failures]
    return "\n".join(lines) + "\n"


def record_row(name: str, record: dict[str, Any], target: Path, table: Path) -> None:
    """Put a row's record beside those of the other rows, and make the table anew."""
    records = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    records[name] = record
    ordered = {name: records[name] for name in ROWS if name in records}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
    table.write_text(as_markdown(ordered), encoding="utf-8")


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=ROWS, help="which ones (default: all)")
    parser.add_argument("--environments", type=Path, default=ROOT / ".matrix", help="folder (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="also rows with a result of the same sources")
    parser.add_argument("--upgrade", action="store_true", help="fetch newer releases into environments that are there")
    parser.add_argument("--json", type=Path, default=JSON, help="results (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, default=MARKDOWN, help="table (default: %(default)s)")
    parser.add_argument(
        "--pytest", default="", metavar="ARGS", help="arguments for pytest, such as files, in one string"
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    sources, wrong = digest(), []
    for name in options.rows or ROWS:
        done = json.loads(options.json.read_text(encoding="utf-8")).get(name, {}) if options.json.exists() else {}
        what = {"arguments": options.pytest, "sources": sources}
        if not options.again and "problem" not in done and what.items() <= done.items():
            print(f"{name}: done on {done['date']}, {done['failed']} failed", flush=True)
        else:
            print(f"{name}: running", flush=True)
            date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
            done = run(name, options.environments, shlex.split(options.pytest), options.upgrade) | what | {"date": date}
            record_row(name, done, options.json, options.markdown)
        if "problem" in done or done["failed"] or not done["passed"]:
            wrong.append(name)
    print(f"wrong: {', '.join(wrong)}" if wrong else "all rows passed", flush=True)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
