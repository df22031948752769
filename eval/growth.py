"""The longest step while a context grows: where the pool gets more memory, and the steps beside it.

A model generates token after token. Whenever its pool is about to grow, steps are timed one by one: some before, the
one that grows, and some that are the first to touch the new memory. Between two growths the cache is filled with random
keys and values, untimed. All of it is done several times, each time with a new cache, and of each step the fastest one
counts: what growth costs comes back every time, what else the machine does adds to some of them only.

* ``segments``: growth adds memory and moves nothing.
* ``copying``: growth copies all blocks to larger memory, as backends do that cannot read several segments.

    python eval/growth.py --threads 2 --json eval/results/growth.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import add_model_arguments, device_called, load_model, positive, provenance, write_json
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.kernels.cpu import backend as cpu

WAYS = {"segments": True, "copying": False}
#: Steps that are timed before a growth, and from it on.
BEFORE, AFTER = 6, 8


class Step(NamedTuple):
    """One timed step: how many tokens the cache had, whether the pool grew, and seconds."""

    context: int
    grew: bool
    seconds: float


def capacity(cache: PagedInt8Cache) -> int:
    """Tokens that the pool's blocks have room for."""
    return min(allocator.num_blocks for allocator in cache.pool.allocators.values()) * cache.pool.block_size


def fill(model: PreTrainedModel, cache: PagedInt8Cache, tokens: int) -> None:
    """Append random keys and values to every layer."""
    config = model.config
    keys = torch.randn(1, config.num_key_value_heads, tokens, config.head_dim, dtype=model.dtype, device=model.device)
    for layer in range(config.num_hidden_layers):
        cache.update(keys, keys, layer)


@torch.no_grad()
def grow(model: PreTrainedModel, tokens: int) -> tuple[list[Step], int]:
    """Timed steps on the way to ``tokens`` tokens, and the bytes allocated then."""
    cache = PagedInt8Cache(model.config)
    steps: list[Step] = []
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    fill(model, cache, 2)
    while True:
        room = capacity(cache) - cache.get_seq_length()
        if cache.get_seq_length() + room >= tokens:
            return steps, cache.nbytes_allocated
        if room > BEFORE:
            fill(model, cache, room - BEFORE)
        for _ in range(BEFORE + AFTER):
            context, held = cache.get_seq_length(), capacity(cache)
            positions = torch.tensor([[context]], device=model.device)
            start = time.perf_counter()
            model(ids, **{CACHE_ARGUMENT: cache}, position_ids=positions, use_cache=True, logits_to_keep=1)
            steps.append(Step(context, capacity(cache) > held, time.perf_counter() - start))


def growths(runs: list[list[Step]]) -> list[dict[str, Any]]:
    """For each growth its context, the longest step from it on, and the median of those around it, in milliseconds."""
    fastest = [min(same, key=lambda step: step.seconds) for same in zip(*runs, strict=True)]
    rows = []
    for i, step in enumerate(fastest):
        if not step.grew:
            continue
        around = [s.seconds for s in fastest[max(i - BEFORE, 0) : i + AFTER] if abs(s.context - step.context) < 16]
        longest = max(s.seconds for s in fastest[i : i + AFTER] if s.context - step.context < AFTER)
        median = statistics.median(around)
        rows.append(
            {
                "context": step.context,
                "growing_step_ms": step.seconds * 1e3,
                "longest_step_ms": longest * 1e3,
                "median_step_ms": median * 1e3,
                "longest_over_median": longest / median,
            }
        )
    return rows


def report(way: str, rows: list[dict[str, Any]]) -> str:
    worst = max(rows, key=lambda row: row["longest_over_median"])
    return (
        f"{way}: {len(rows)} growths up to {rows[-1]['context']} tokens; the longest step takes "
        f"{worst['longest_over_median']:.2f} times the median beside it ({worst['longest_step_ms']:.1f} of "
        f"{worst['median_step_ms']:.1f} ms, at {worst['context']} tokens)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=positive, default=131_072, help="context to grow to (default: %(default)s)")
    parser.add_argument("--runs", type=positive, default=3, help="of each way (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="(default: all, %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = device_called(args.device)
    made = provenance(device, timed=True)
    model, _ = load_model(args, device)
    model.set_attn_implementation("int8_paged")
    runs: dict[str, list[list[Step]]] = {way: [] for way in WAYS}
    nbytes = 0
    for _ in tqdm(range(args.runs), leave=False):
        for way, in_segments in WAYS.items():
            cpu.SEGMENTS = in_segments
            steps, nbytes = grow(model, args.tokens)
            runs[way].append(steps)
    cpu.SEGMENTS = True
    results = {way: growths(of_way) for way, of_way in runs.items()}
    for way, rows in results.items():
        print(report(way, rows))
    if args.json:
        ways = [
            {"way": way, "worst": max(r["longest_over_median"] for r in rows), "growths": rows}
            for way, rows in results.items()
        ]
        write_json(args.json, {**made, "tokens": args.tokens, "nbytes_allocated": nbytes, "ways": ways})


if __name__ == "__main__":
    main()
