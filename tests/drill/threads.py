"""Many requests of several threads from one pool: accounting exact, tokens right.

``python -m tests.drill.threads`` carries out 2,000 requests with 8 threads and prints the counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import threading
from collections import Counter
from pathlib import Path

import torch

from hf_int8_paged import PagedInt8Pool

from . import requests


def drill(threads: int, total: int, seed: int = 0, max_tokens: int | None = None) -> Counter[str]:
    """Let threads carry out requests from one pool; returns what came of them.

    Args:
        threads: how many.
        total: requests of all together.
        seed: of their order.
        max_tokens: limit of the pool: some requests are then refused.
    """
    model = requests.model()
    right = requests.right_answers(model)
    pool = PagedInt8Pool(max_tokens=max_tokens, **requests.OPTIONS)
    counts = [Counter[str]() for _ in range(threads)]
    barrier = threading.Barrier(threads)

    def work(number: int) -> None:
        draw = random.Random(seed * 1000 + number)
        barrier.wait()
        for _ in range(number, total, threads):
            try:
                requests.serve_checked(model, draw.randrange(requests.KINDS), right, pool, counts[number])
            except BaseException as error:
                counts[number][f"failure: {type(error).__name__}: {error}"] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns often, so that a race of a few instructions shows
    torch.set_num_threads(1)
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.setswitchinterval(interval)
    found = sum(counts, Counter[str]())
    gc.collect()
    found.update(f"failure: {wrong}" for wrong in requests.check_empty(pool))
    return found


def main() -> int:
    """Command line; the exit status says whether anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts there")
    options = parser.parse_args()
    failed, counts = 0, {}
    for limit in (None, 600):
        found = drill(options.threads, options.requests // 2, options.seed, limit)
        counts["no limit" if limit is None else f"max_tokens={limit}"] = dict(sorted(found.items()))
        failed += sum(count for what, count in found.items() if what.startswith("failure"))
        for what, count in sorted(found.items()):
            print(f"{options.threads} threads, max_tokens={limit}: {count:7} {what}", flush=True)
    print(f"{failed} failures")
    if options.json is not None:
        result = {"threads": options.threads, "requests": options.requests, "counts": counts, "failures": failed}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
