"""Perplexity of a text as decoding sees it: with a cache that is read at every token.

A single forward pass over a window attends to keys and values that are at hand in full precision, and shows no
quantization at all. Here the window's context is fed as a prompt, and the tokens that count are fed after it in chunks
of ``--chunk`` tokens, as in generation. Windows slide as in transformers' guide "Perplexity of fixed-length models":
each starts ``--stride`` tokens after the last, and only the tokens that the last one did not reach are scored.

    python eval/perplexity.py --text-file wiki.test.raw --max-tokens 2000
    accelerate launch --num_processes 2 eval/perplexity.py --batch-size 4 --journal run.jsonl --json run.json
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import add_model_arguments, add_text_arguments, load_model, load_tokens, positive, provenance, write_json
from _journal import Journal
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.kernels import MAX_DECODE_ROWS

CACHES = ("dynamic", "int8")


@dataclass(frozen=True)
class Window:
    """Tokens ``begin`` to ``end`` of the text, of which the first ``prompt`` are fed at once and not scored."""

    begin: int
    end: int
    prompt: int

    @property
    def scored(self) -> int:
        """Tokens whose logits come from the cache: the prompt's own, and the first after it, do not."""
        return self.end - self.begin - self.prompt - 1


def plan_windows(tokens: int, window: int, stride: int, prompt: int) -> list[Window]:
    """Windows over a text, each scored from where the last one ended, but for its first ``prompt + 1`` tokens."""
    windows, reached = [], 0
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        # The last token before the scored ones is fed alone: its logits must come from the cache.
        planned = Window(begin, end, max(prompt, reached - begin - 1))
        if planned.scored > 0:
            windows.append(planned)
        reached = end
        if end == tokens:
            break
    return windows


def in_batches(windows: list[Window], size: int) -> Iterator[list[Window]]:
    """Windows of the same shape together, as many as ``size``, in the order of the text."""
    batch: list[Window] = []
    for window in windows:
        same = batch and (window.end - window.begin, window.prompt) == (batch[0].end - batch[0].begin, batch[0].prompt)
        if batch and (len(batch) == size or not same):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    cache: Cache,
    ids: torch.Tensor,
    prompt: int,
    chunk: int,
    on_tokens: Callable[[int], Any] = lambda tokens: None,
) -> torch.Tensor:
    """Negative log likelihoods, float64 ``[batch, tokens - prompt - 1]``, of the tokens after the first fed chunk row.

    Args:
        ids: ``[batch, tokens]``.
        prompt: tokens that are fed at once before the others.
        chunk: tokens fed per forward pass after that.
        on_tokens: called with the number of tokens of each forward pass after the prompt.
    """
    model(ids[:, :prompt], **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    losses = []
    last = ids.shape[1] - 1
    for start in range(prompt, last, chunk):
        stop = min(start + chunk, last)
        logits = model(ids[:, start:stop], **{CACHE_ARGUMENT: cache}).logits.float()
        targets = ids[:, start + 1 : stop + 1]
        losses.append(torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none").double())
        on_tokens(stop - start)
    return torch.cat(losses, dim=1)


def measure(
    model: PreTrainedModel,
    ids: torch.Tensor,
    windows: list[Window],
    name: str,
    args: argparse.Namespace,
    journal: Journal,
    state: PartialState,
) -> None:
    """Score this process's share of the windows that the journal does not hold yet, and add them to it."""
    done = {record["begin"] for record in journal.records if record["cache"] == name}
    todo = list(in_batches([w for w in windows if w.begin not in done], args.batch_size))
    mine = todo[state.process_index :: state.num_processes]
    steps = sum(w.scored for batch in mine for w in batch[:1])
    with tqdm(total=steps, desc=name, unit="token", disable=not state.is_main_process) as bar:
        for batch in mine:
            cache = DynamicCache(config=model.config) if name == "dynamic" else PagedInt8Cache(model.config)
            inputs = torch.stack([ids[w.begin : w.end] for w in batch]).to(state.device)
            started = time.perf_counter()
            losses = score(model, cache, inputs, batch[0].prompt, args.chunk, bar.update).sum(1).tolist()
            seconds = (time.perf_counter() - started) / len(batch)
            for window, nll in zip(batch, losses):
                journal.add({
                    "cache": name, "begin": window.begin, "tokens": window.scored, "nll": nll, "seconds": seconds,
                })  # fmt: skip


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    # A fixed order, so that the sum does not depend on which process had which window.
    records = sorted({record["begin"]: record for record in records}.values(), key=lambda record: record["begin"])
    tokens = sum(record["tokens"] for record in records)
    nll = math.fsum(record["nll"] for record in records)
    return {
        "perplexity": math.exp(nll / tokens),
        "nll_per_token": nll / tokens,
        "tokens": tokens,
        "windows": len(records),
        "seconds": sum(record["seconds"] for record in records),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--cache", choices=CACHES, nargs="+", default=list(CACHES), help="default: both")
    parser.add_argument("--window", type=positive, default=1024, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--stride", type=positive, help="tokens from window to window (default: half a window)")
    parser.add_argument("--prompt", type=positive, default=16, help="least tokens fed at once (default: %(default)s)")
    parser.add_argument("--chunk", type=positive, default=1, help="tokens per pass after that (default: %(default)s)")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        help="windows at once, which then share one key centre (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--journal", type=Path, help="JSON lines of finished windows: run again to go on after a kill")
    args = parser.parse_args()
    args.stride = max(1, args.window // 2) if args.stride is None else args.stride
    if args.stride > args.window:
        parser.error(f"--stride {args.stride} is larger than --window {args.window}: tokens between would be left out")
    if args.prompt > args.window - 2:
        parser.error(f"--prompt {args.prompt} leaves no token of --window {args.window} to score")
    return args


def main() -> None:
    args = parse_arguments()
    state = PartialState(cpu=args.device == "cpu")
    if args.device and state.num_processes == 1:
        state.device = torch.device(args.device)
    with state.local_main_process_first():
        model, tokenizer = load_model(args, state.device)
        ids = load_tokens(args, tokenizer)
    windows = plan_windows(len(ids), args.window, args.stride, args.prompt)
    if not windows:
        raise SystemExit(f"the text has {len(ids)} tokens: none is left to score after a prompt of {args.prompt}")
    settings = {
        "model": args.model, "dtype": args.dtype, "text": str(args.text_file or f"{args.dataset} {args.config}"),
        "text_tokens": len(ids), "window": args.window, "stride": args.stride, "prompt": args.prompt,
        "chunk": args.chunk,
    }  # fmt: skip
    journal = Journal(args.journal, settings)
    if state.is_main_process:
        journal.start()
        print(describe(settings, len(windows)))
    state.wait_for_everyone()
    before = list(journal.records)
    dense_attention = model.config._attn_implementation
    for name in args.cache:
        model.set_attn_implementation("int8_paged" if name == "int8" else dense_attention)
        measure(model, ids, windows, name, args, journal, state)
    new = gather_object(journal.records[len(before) :]) if state.num_processes > 1 else journal.records[len(before) :]
    if state.is_main_process:
        report(args, settings, before + new, state.device)


def describe(settings: dict[str, Any], windows: int) -> str:
    chunk, prompt = settings["chunk"], settings["prompt"]
    note = f"; a chunk of more than {MAX_DECODE_ROWS} tokens sees its own keys unquantized"
    return (
        f"{settings['text_tokens']:,} tokens of {settings['text']}, {windows} windows of {settings['window']}, stride "
        f"{settings['stride']}. Scored tokens are fed {chunk} at a time after a prompt of {prompt} or more"
        f"{note if chunk > MAX_DECODE_ROWS else ''}."
    )


def report(
    args: argparse.Namespace, settings: dict[str, Any], records: list[dict[str, Any]], device: torch.device
) -> None:
    results = {name: summarize([r for r in records if r["cache"] == name]) for name in args.cache}
    for name, result in results.items():
        print(f"{name:>8}: perplexity {result['perplexity']:.4f} over {result['tokens']:,} tokens")
    content: dict[str, Any] = {"settings": settings, "results": results}
    if len(results) == 2:
        change = results["int8"]["perplexity"] / results["dynamic"]["perplexity"] - 1
        content["int8_against_dynamic_percent"] = 100 * change
        print(f"    int8 against dynamic: {100 * change:+.3f} %")
    if args.json is not None:
        write_json(args.json, {**content, **provenance(device)})


if __name__ == "__main__":
    main()
