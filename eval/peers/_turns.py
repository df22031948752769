"""What the scripts of all peers share. They run in environments of their own, which have numpy and no torch."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: Untimed turns of each contestant before the timed ones.
WARMUP = 3
#: Makes a turn: one token is generated, and what the result says is the seconds that it took.
Turn = Callable[[], float]


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the model, a GGUF file")
    parser.add_argument("--contexts", nargs="+", type=int, default=(64, 1024, 4096, 8000), help="tokens")
    parser.add_argument("--rounds", type=int, default=15, help="timed tokens per point (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, required=True, help="write times here")
    return parser.parse_args()


def token_ids(count: int) -> list[int]:
    """Random tokens of the vocabulary's first 40,000: what a cache holds does not matter for time."""
    draw = random.Random(0)
    return [draw.randrange(100, 40_000) for _ in range(count)]


def take_turns(turns: dict[tuple[str, int], Turn], rounds: int) -> list[dict[str, Any]]:
    """Times of each (cache, context): all generate a token in turns, in random order, as in eval/latency_model.py."""
    seconds: dict[tuple[str, int], list[float]] = {contestant: [] for contestant in turns}
    shuffle = random.Random(0)
    for step in range(WARMUP + rounds):
        for contestant in shuffle.sample(list(turns), len(turns)):
            took = turns[contestant]()
            if step >= WARMUP:
                seconds[contestant].append(took)
    return [{"cache": cache, "context": context, "seconds": times} for (cache, context), times in seconds.items()]


def versions(names: Sequence[str]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def skip(path: Path, sentence: str) -> None:
    """Say why nothing was measured, on the screen and in the file; this is no failure."""
    print(sentence)
    write(path, {"skipped": sentence})
