"""How long a whole prompt takes when it comes in chunks, for each kind of cache.

A model reads a prompt of random tokens, a chunk at a time, as serving engines and `generate` with
``prefill_chunk_size`` do. The contestants take turns, in one process; the median of their times counts, and the last
logits are compared.

    python eval/prompts.py --threads 2 --json eval/results/prompts.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _common import add_model_arguments, device_called, load_model, positive, provenance, write_json
from latency_model import CONTESTANTS
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_int8_paged.cache_argument import CACHE_ARGUMENT

CACHES = ("DynamicCache", "PagedInt8Cache")


@torch.no_grad()
def read(model: PreTrainedModel, name: str, ids: torch.Tensor, chunk: int) -> tuple[float, torch.Tensor]:
    """Seconds that the prompt ``ids`` ``[1, tokens]`` takes in chunks, and the logits of its last token."""
    implementation, make = CONTESTANTS[name]
    model.set_attn_implementation(implementation)
    cache = make(model, 1, ids.shape[1])
    start = time.perf_counter()
    for first in range(0, ids.shape[1], chunk):
        part = ids[:, first : first + chunk]
        positions = torch.arange(first, first + part.shape[1], device=ids.device)[None]
        out = model(part, **{CACHE_ARGUMENT: cache}, position_ids=positions, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start, out.logits[0, -1].float()


def race(model: PreTrainedModel, ids: torch.Tensor, chunk: int, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in CACHES}
    logits: dict[str, torch.Tensor] = {}
    for i in range(rounds):
        for name in CACHES if i % 2 else reversed(CACHES):
            seconds, logits[name] = read(model, name, ids, chunk)
            times[name].append(seconds)
    medians = {name: statistics.median(own) for name, own in times.items()}
    theirs, ours = (logits[name].log_softmax(-1) for name in CACHES)
    return {
        "chunk": chunk,
        "seconds": times,
        "median_seconds": medians,
        "ours_over_dynamic": medians["PagedInt8Cache"] / medians["DynamicCache"],
        "kld_of_the_last_token": float((theirs.exp() * (theirs - ours)).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--tokens", type=positive, default=8000, help="of the prompt (default: %(default)s)")
    parser.add_argument("--chunks", type=positive, nargs="+", default=[512, 2048, 8000], help="(default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, help="of each chunk length (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="(default: all, %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = device_called(args.device)
    made = provenance(device, timed=True)
    model, _ = load_model(args, device)
    ids = torch.randint(model.config.vocab_size, (1, args.tokens), device=device)
    for name in CACHES:
        read(model, name, ids[:, :64], 32)
    results = []
    for chunk in tqdm(args.chunks, leave=False):
        results.append(race(model, ids, chunk, args.rounds))
        medians = results[-1]["median_seconds"]
        said = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in medians.items())
        print(
            f"{args.tokens} tokens in chunks of {chunk}: {said}, ratio {results[-1]['ours_over_dynamic']:.2f}",
            flush=True,
        )
    if args.json:
        write_json(args.json, {**made, "tokens": args.tokens, "dtype": args.dtype, "results": results})


if __name__ == "__main__":
    main()
