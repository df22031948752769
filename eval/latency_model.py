"""Milliseconds per token of a whole model against the length of its context, for each kind of cache.

Every cache is filled with random keys and values up to each context length (what they hold does not matter for time),
then all contestants, at all context lengths, generate a token in turns, in random order, in one process. The median of
their forward passes is reported.

    python eval/latency_model.py --threads 2 --json eval/results/latency_model.json --picture docs/latency_model.png
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _common import DTYPES, add_model_arguments, device_called, load_model, positive, provenance, write_json
from tqdm import tqdm
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.utils import is_hqq_available

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT

CONTEXTS = (16, 64, 1024, 2048, 4096, 8000)
BATCHES = (1, 8)

#: name -> (attention implementation, maker of a cache for this model and this many sequences and tokens)
CONTESTANTS: dict[str, tuple[str, Callable[[PreTrainedModel, int, int], Cache]]] = {
    "DynamicCache": ("sdpa", lambda model, batch, tokens: DynamicCache(config=model.config)),
    "StaticCache": ("sdpa", lambda model, batch, tokens: StaticCache(model.config, max_cache_len=tokens)),
    "PagedInt8Cache": ("int8_paged", lambda model, batch, tokens: PagedInt8Cache(model.config)),
}
#: What ``--compiled`` adds: the step that ``generate`` compiles where a cache is preallocated.
COMPILED: dict[str, tuple[str, Callable[[PreTrainedModel, int, int], Cache]]] = {
    "StaticCache, compiled": CONTESTANTS["StaticCache"],
    "PagedInt8Cache, compiled": (
        "int8_paged",
        lambda model, batch, tokens: PagedInt8Cache(model.config, max_batch_size=batch, max_cache_len=tokens),
    ),
}
if is_hqq_available():
    CONTESTANTS["QuantizedCache (HQQ)"] = (
        "sdpa",
        lambda model, batch, tokens: QuantizedCache("hqq", model.config, nbits=8, axis_key=1, axis_value=1),
    )


def filled(
    model: PreTrainedModel, make: Callable[[PreTrainedModel, int, int], Cache], batch: int, tokens: int, room: int
) -> Cache:
    """A cache with ``tokens`` random tokens in every layer, and room for ``room`` more."""
    cache, config = make(model, batch, tokens + room), model.config
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def time_steps(
    model: PreTrainedModel,
    batch: int,
    contexts: Sequence[int],
    rounds: int,
    warmup: int = 3,
    compile_config: CompileConfig | None = None,
) -> dict[tuple[int, str], list[float]]:
    """Seconds per forward pass of one token, a list for each context length and contestant. All take turns: a machine
    that slows down for a while slows all of them."""
    compile_config = compile_config or CompileConfig()
    runners = list(itertools.product(contexts, CONTESTANTS))
    caches = {
        (context, name): filled(model, CONTESTANTS[name][1], batch, context, warmup + rounds)
        for context, name in runners
    }
    ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    times: dict[tuple[int, str], list[float]] = {runner: [] for runner in runners}
    shuffle = random.Random(0)
    graphs = 2 * len(contexts) * len(CONTESTANTS)  # one for each cache's sizes
    with torch._dynamo.config.patch(recompile_limit=graphs):
        for step in tqdm(range(warmup + rounds), desc=f"batch {batch}", leave=False):
            for context, name in shuffle.sample(runners, len(runners)):
                model.set_attn_implementation(CONTESTANTS[name][0])
                positions = torch.full((batch, 1), context + step, device=model.device)
                forward = model.get_compiled_call(compile_config) if name in COMPILED else model
                start = time.perf_counter()
                forward(
                    ids,
                    **{CACHE_ARGUMENT: caches[context, name]},
                    position_ids=positions,
                    use_cache=True,
                    logits_to_keep=1,
                )
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                if step >= warmup:
                    times[context, name].append(time.perf_counter() - start)
    return times


def summary(times: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles([1000 * t for t in times], n=4)
    return {"ms": quartiles[1], "ms_quartile_1": quartiles[0], "ms_quartile_3": quartiles[2]}


def slope(points: list[tuple[int, float]]) -> float:
    """Milliseconds per 1,000 tokens of context, from the shortest context of at least 64 tokens to the longest."""
    inside = [(context, ms) for context, ms in points if context >= 64]
    (first, start), (last, end) = inside[0], inside[-1]
    return 1000 * (end - start) / (last - first)


def draw(results: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    panels = sorted({(r["batch"], r["dtype"]) for r in results})
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False)
    for axis, (batch, dtype) in zip(axes[0], panels):
        for name in CONTESTANTS:
            rows = [r for r in results if (r["batch"], r["dtype"], r["cache"]) == (batch, dtype, name)]
            contexts = [r["context"] for r in rows]
            axis.plot(contexts, [r["ms"] for r in rows], marker="o", label=name)
            axis.fill_between(
                contexts, [r["ms_quartile_1"] for r in rows], [r["ms_quartile_3"] for r in rows], alpha=0.2
            )
        axis.set(title=f"batch {batch}, {dtype}", xlabel="tokens in context", ylabel="ms per token", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_model_arguments(parser)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="weights and cache (default: that of --dtype)")
    parser.add_argument("--batches", nargs="+", type=positive, default=BATCHES, help="sequences (default: %(default)s)")
    parser.add_argument("--contexts", nargs="+", type=positive, default=CONTEXTS, help="tokens (default: %(default)s)")
    parser.add_argument("--max-batch-tokens", type=positive, default=33_000, help="skip batch x context above this")
    parser.add_argument("--rounds", type=positive, default=15, help="timed tokens per point (default: %(default)s)")
    parser.add_argument("--compiled", action="store_true", help="preallocated caches with a compiled step, too")
    parser.add_argument("--threads", type=positive, help="torch threads (default: torch's own)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--picture", type=Path, help="draw it into this file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = device_called(args.device)
    made = provenance(device, timed=True)
    if args.compiled:
        CONTESTANTS.update(COMPILED)
    results: list[dict] = []
    for dtype in args.dtypes or [args.dtype]:
        args.dtype = dtype
        model, _ = load_model(args, device)
        for batch in args.batches:
            contexts = [context for context in args.contexts if batch * context <= args.max_batch_tokens]
            times = time_steps(model, batch, contexts, args.rounds)
            for context in contexts:
                of_context = {name: summary(times[context, name]) for name in CONTESTANTS}
                fields = {"dtype": dtype, "batch": batch, "context": context}
                results += [{**fields, "cache": name, **figures} for name, figures in of_context.items()]
                line = "  ".join(f"{name} {figures['ms']:.1f}" for name, figures in of_context.items())
                print(f"{dtype} batch {batch} context {context:5}: ms per token  {line}", flush=True)
    slopes = []
    for dtype, batch in sorted({(r["dtype"], r["batch"]) for r in results}):
        for name in CONTESTANTS:
            rows = [r for r in results if (r["dtype"], r["batch"], r["cache"]) == (dtype, batch, name)]
            if sum(r["context"] >= 64 for r in rows) > 1:
                per_1000 = slope([(r["context"], r["ms"]) for r in rows])
                slopes.append({"dtype": dtype, "batch": batch, "cache": name, "ms_per_1000_tokens": per_1000})
                print(f"{dtype} batch {batch}: {name} {per_1000:.2f} ms more per 1,000 tokens of context")
    if args.json:
        write_json(args.json, {**made, "results": results, "slopes": slopes})
    if args.picture:
        draw(results, args.picture)


if __name__ == "__main__":
    main()
