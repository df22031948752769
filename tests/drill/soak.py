"""A server's hours in small: requests of several threads from one pool with a limit in bytes, saved and loaded, for as
long as asked. Memory must be flat, every token right, and the pool empty at the end.

``python -m tests.drill.soak --seconds 1800`` prints the counts and writes them as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from hf_int8_paged import PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from tests.models import random_ids

from . import requests

#: Most bytes of the pool.
MAX_BYTES = 8 << 20
#: Memory may grow by this part of what it was after the first fifth: allocators keep some of what they are given back.
TOLERANCE = 0.05


def resident() -> int:
    """Bytes of memory that this process has, of its own."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def soak(seconds: float, threads: int = 4, seed: int = 0) -> dict[str, Any]:
    """Serve for so long; returns counts, memory over time and failures."""
    model = requests.model()
    right = requests.right_answers(model)
    pool = PagedInt8Pool(max_bytes=MAX_BYTES, **requests.OPTIONS)
    counts = [Counter[str]() for _ in range(threads)]
    ends, memory, most = time.monotonic() + seconds, [resident()], 0

    def work(number: int) -> None:
        draw = random.Random(seed * 1000 + number)
        while time.monotonic() < ends:
            try:
                requests.serve_checked(model, draw.randrange(requests.KINDS), right, pool, counts[number])
                if draw.random() < 0.05:
                    counts[number][_save_and_load(model, draw.randrange(9), pool)] += 1
            except BaseException as error:
                counts[number][f"failure: {type(error).__name__}: {error}"] += 1

    torch.set_num_threads(1)
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    while time.monotonic() < ends:
        time.sleep(min(1.0, seconds / 40))
        memory.append(resident())
        most = max(most, pool.nbytes_allocated)
    for worker in workers:
        worker.join()
    found = sum(counts, Counter[str]())
    gc.collect()
    found.update(f"failure: {wrong}" for wrong in requests.check_empty(pool))
    if most > MAX_BYTES:
        found[f"failure: {most} bytes were allocated"] += 1
    part = max(len(memory) // 5, 1)
    begin, end = max(memory[part : 2 * part] or memory), max(memory[-part:])
    if end > begin * (1 + TOLERANCE):
        found[f"failure: memory grew from {begin} to {end} bytes"] += 1
    return {
        "seconds": seconds,
        "threads": threads,
        "max_bytes": MAX_BYTES,
        "counts": dict(sorted(found.items())),
        "pool_bytes_at_most": most,
        "blocks_held_at_the_end": sum(allocator.num_used for allocator in pool.allocators.values()),
        "resident_bytes": {"second_fifth": begin, "last_fifth": end},
        "failures": sum(count for what, count in found.items() if what.startswith("failure")),
    }


@torch.no_grad()
def _save_and_load(model: Any, seed: int, pool: PagedInt8Pool) -> str:
    cache = PagedInt8Cache(model.config, **requests.OPTIONS)
    model(random_ids(2, 50, seed=seed), **{CACHE_ARGUMENT: cache})
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "cache")
        loaded = PagedInt8Cache.load(Path(folder) / "cache", model.config, pool)
    ids = random_ids(2, 1, seed=seed)
    said = [model(ids, **{CACHE_ARGUMENT: one}).logits for one in (loaded, cache)]
    return "saved and loaded" if torch.equal(*said) else "failure: other logits after loading"


def main() -> int:
    """Command line; the exit status says whether anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    result = soak(options.seconds, options.threads)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return bool(result["failures"])


if __name__ == "__main__":
    sys.exit(main())
