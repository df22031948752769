"""Milliseconds per generated token, and how they grow with the context, beside OpenVINO and llama.cpp.

Each peer gets an environment of its own, is measured by its script in eval/peers/, and is skipped with a sentence
where it cannot be installed. All generate one token of one sequence of SmolLM2-135M-Instruct. Its weights are the same
but not their precision: both peers read the 4-bit GGUF file, transformers computes with what was dequantized from it.
So the times at short contexts do not compare; how much longer a token takes per 1,000 tokens of context does, as that
is the cache's doing.

    python eval/bench_peers.py --json eval/results/peers.json

`make bench-peers` does this. llama.cpp is compiled, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import positive, provenance, write_json
from latency_model import slope, summary

from hf_int8_paged.tools.demo_model import GGUF_FILE, DemoModelError, fetch_gguf

HERE = Path(__file__).parent
CONTEXTS = (64, 1024, 4096, 8000)
DTYPES = ("float32", "bfloat16")
_INSTALLATION_TIMEOUT_S = 3600
GGUF_WEIGHTS = f"4 bit, {GGUF_FILE}"


class Peer(NamedTuple):
    name: str
    script: str
    requirements: tuple[str, ...]


PEERS = (
    Peer("llama.cpp", "with_llama_cpp.py", ("llama-cpp-python==0.3.36",)),
    Peer("OpenVINO", "with_openvino.py", ("openvino==2026.4.1", "openvino-genai==2026.4.1.0")),
)


class Skipped(Exception):
    """Why a peer is not measured, in a sentence."""


def interpreter(environment: Path) -> Path:
    folder, suffix = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
    return environment / folder / f"python{suffix}"


def install(peer: Peer, environment: Path) -> Path:
    """The Python of the peer's environment, which is made where it is missing or has other versions."""
    marker, wanted = environment / "installed.txt", " ".join(peer.requirements)
    python = interpreter(environment)
    if python.exists() and marker.exists() and marker.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {wanted}", flush=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *peer.requirements]
    try:
        for command in ([sys.executable, "-m", "venv", "--clear", str(environment)], pip):
            done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALLATION_TIMEOUT_S, check=False)
            if done.returncode:
                said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
                raise Skipped(f"{peer.name} was skipped, as {wanted} could not be installed; pip's last line: {said}")
    except subprocess.TimeoutExpired:
        raise Skipped(f"{peer.name} was skipped, as {wanted} was not installed in an hour.") from None
    marker.write_text(wanted, encoding="utf-8")
    return python


def gguf_file(folder: Path) -> Path:
    """The demo model's GGUF file, downloaded once."""
    if not (folder / GGUF_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            shutil.move(fetch_gguf(Path(scratch), lambda step: print(step, flush=True)), folder / GGUF_FILE)
    return folder / GGUF_FILE


def sizes(args: argparse.Namespace) -> list[str]:
    return ["--contexts", *map(str, args.contexts), "--rounds", str(args.rounds), "--threads", str(args.threads)]


def run(command: list[str], name: str) -> dict[str, Any]:
    """What a script writes as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run([*command, "--json", str(result)], check=False)
        if done.returncode or not result.exists():
            raise Skipped(f"{name} was skipped, as its script ended with status {done.returncode}.")
        return json.loads(result.read_text(encoding="utf-8"))


def with_slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each cache its rows and the slope over their contexts."""
    found = []
    for cache in dict.fromkeys(row["cache"] for row in rows):
        own = sorted((row for row in rows if row["cache"] == cache), key=lambda row: row["context"])
        points = [{key: value for key, value in row.items() if key != "cache"} for row in own]
        per_1000 = slope([(row["context"], row["ms"]) for row in own])
        found.append({"cache": cache, "ms_per_1000_tokens": per_1000, "points": points})
    return found


def measure_peer(peer: Peer, args: argparse.Namespace) -> dict[str, Any]:
    python = install(peer, args.environments / peer.script.removeprefix("with_").removesuffix(".py"))
    gguf = gguf_file(args.environments)
    content = run([str(python), str(HERE / "peers" / peer.script), "--gguf", str(gguf), *sizes(args)], peer.name)
    if "skipped" in content:
        raise Skipped(content["skipped"])
    rows = [
        {"cache": row["cache"], "context": row["context"], **summary(row["seconds"])} for row in content.pop("times")
    ]
    return {**content, "weights": GGUF_WEIGHTS, "caches": with_slopes(rows)}


def measure_transformers(args: argparse.Namespace) -> dict[str, Any]:
    """transformers' own cache and this package's, by eval/latency_model.py."""
    command = [sys.executable, str(HERE / "latency_model.py"), "--device", "cpu", "--batches", "1"]
    content = run([*command, "--dtypes", *DTYPES, *sizes(args)], "transformers")
    figures = ("context", "ms", "ms_quartile_1", "ms_quartile_3")
    rows = [
        {"cache": f"{row['cache']}, {row['dtype']}", **{name: row[name] for name in figures}}
        for row in content["results"]
    ]
    return {"versions": content["versions"], "weights": "dequantized from that file", "caches": with_slopes(rows)}


def measured(name: str, measure: Any) -> dict[str, Any]:
    """What ``measure()`` finds between two looks at the machine's load, or why it found nothing."""
    before = os.getloadavg()
    try:
        content = measure()
    except (Skipped, DemoModelError) as reason:
        print(reason, flush=True)
        return {"name": name, "skipped": str(reason)}
    return {"name": name, "load_average": {"before": before, "after": os.getloadavg()}, **content}


def table(contestants: list[dict[str, Any]], contexts: list[int]) -> str:
    """Markdown: one row per cache, those that were skipped below."""
    head = ["", "cache", "weights", *(f"ms at {context}" for context in contexts), "ms per 1,000 tokens"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for contestant in contestants:
        for row in contestant.get("caches", ()):
            times = [f"{point['ms']:.1f}" for point in row["points"]]
            cells = [
                contestant["name"],
                row["cache"],
                contestant["weights"],
                *times,
                f"{row['ms_per_1000_tokens']:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(contestant["skipped"] for contestant in contestants if "skipped" in contestant)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=Path(".peers"), help="(default: %(default)s)")
    parser.add_argument("--contexts", nargs="+", type=positive, default=CONTEXTS, help="tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=15, help="timed tokens per point (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    args.contexts = sorted(set(args.contexts))
    if len(args.contexts) < 2 or args.contexts[0] < 64 or args.rounds < 2:
        parser.error("a slope needs two contexts of at least 64 tokens, and quartiles two rounds")
    args.environments = args.environments.absolute()
    torch.set_num_threads(args.threads)
    contestants = [measured("transformers", lambda: measure_transformers(args))]
    contestants += [measured(peer.name, lambda peer=peer: measure_peer(peer, args)) for peer in PEERS]
    print(table(contestants, args.contexts))
    if args.json:
        write_json(args.json, {**provenance(torch.device("cpu")), "rounds": args.rounds, "contestants": contestants})


if __name__ == "__main__":
    main()
