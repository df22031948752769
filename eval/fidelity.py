"""What a quantized cache costs: next-token distributions against those of the unquantized model.

Decode-style: after a prompt, every row attends to quantized keys and values only, its own included. The variants named
in `_variants.py` are fake-quantized, so that a window takes two forward passes; ``package`` feeds the window through
PagedInt8Cache itself, at most 16 rows at a time, which read their own keys from the blocks too. A test shows that both
ways give the same logits.

    python eval/fidelity.py --text-file wiki.test.raw --window 2048 --windows 20 --json eval/results/fidelity.json
    accelerate launch --num_processes 2 eval/fidelity.py ...
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import add_model_arguments, add_text_arguments, load_model, load_tokens, positive, provenance, write_json
from _divergence import divergence
from _fidelity_report import draw, markdown, summarize
from _journal import Journal
from _variants import EXCEPTIONS, VARIANTS, VariantCache
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import is_hqq_available

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.kernels import MAX_DECODE_ROWS

PACKAGE = "package"
#: Records of greedy continuations carry this in place of a window's first token.
GREEDY = "greedy"


def make_cache(model: PreTrainedModel, name: str) -> Cache:
    return (
        PagedInt8Cache(model.config) if name == PACKAGE else VariantCache(model.config, (VARIANTS | EXCEPTIONS)[name])
    )


@torch.inference_mode()
def logits_after_prompt(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits ``[tokens - prompt, vocabulary]`` of the rows after the prompt.

    Args:
        cache: an empty cache. A `PagedInt8Cache` is fed in chunks that decode attention serves.
        ids: ``[1, tokens]``.
        prompt: tokens that attend to each other in full precision.
    """
    model(ids[:, :prompt], **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    rest = ids[:, prompt:]
    size = MAX_DECODE_ROWS if isinstance(cache, PagedInt8Cache) else rest.shape[1]
    return torch.cat([model(chunk, **{CACHE_ARGUMENT: cache}).logits[0] for chunk in rest.split(size, dim=1)])


class Attention:
    """Sets the attention implementation that a variant is measured with."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.dense = model.config._attn_implementation

    def use_for(self, name: str) -> None:
        self.model.set_attn_implementation("int8_paged" if name == PACKAGE else self.dense)


def measure_windows(
    model: PreTrainedModel,
    head: torch.Tensor,
    ids: torch.Tensor,
    args: argparse.Namespace,
    journal: Journal,
    state: PartialState,
) -> None:
    """Add a record for each window of this process and each variant that the journal does not hold yet. Every window
    begins with the tokens ``head``."""
    attention, done = Attention(model), {(r["variant"], r["begin"]) for r in journal.records}
    begins = range(0, len(ids) - args.window + 1, args.window)[: args.windows]
    todo = [
        (begin, [name for name, most in args.variants.items() if i < most and (name, begin) not in done])
        for i, begin in enumerate(begins)
    ]
    mine = [(begin, names) for begin, names in todo if names][state.process_index :: state.num_processes]
    with tqdm(total=sum(len(n) for _, n in mine), desc="windows x variants", disable=not state.is_main_process) as bar:
        for begin, names in mine:
            window = torch.cat([head, ids[begin : begin + args.window - len(head)]])[None].to(state.device)
            attention.use_for("dense")
            with torch.inference_mode():
                dense = model(window, use_cache=False).logits[0, args.prompt : -1]
            for name in names:
                attention.use_for(name)
                logits = logits_after_prompt(model, make_cache(model, name), window, args.prompt)[:-1]
                found = divergence(logits, dense, window[0, args.prompt + 1 :])
                journal.add({
                    "variant": name,
                    "begin": begin,
                    "kld": [float(f"{x:.4g}") for x in found.kld.tolist()],
                    "same_top": int(found.same_top.sum()),
                    "nll": float(found.nll.sum()),
                    "nll_dense": float(found.nll_dense.sum()),
                })  # fmt: skip
                bar.update()


def prompts(head: torch.Tensor, ids: torch.Tensor, args: argparse.Namespace) -> Iterator[tuple[int, torch.Tensor]]:
    """Prompts of ``head`` and 128 tokens, spread over the text."""
    length = min(128, len(ids) // max(1, args.greedy_prompts))
    for i in range(args.greedy_prompts):
        begin = i * (len(ids) // args.greedy_prompts)
        yield begin, torch.cat([head, ids[begin : begin + length]])[None]


def measure_greedy(
    model: PreTrainedModel,
    head: torch.Tensor,
    ids: torch.Tensor,
    args: argparse.Namespace,
    journal: Journal,
    state: PartialState,
) -> None:
    """Add a record for each prompt and variant: how many greedy tokens are those of the unquantized model."""
    attention, done = Attention(model), {(r["variant"], r["begin"]) for r in journal.records if GREEDY in r}
    todo = [(b, p, [n for n in args.variants if (n, f"{GREEDY} {b}") not in done]) for b, p in prompts(head, ids, args)]
    mine = [item for item in todo if item[2]][state.process_index :: state.num_processes]
    with tqdm(total=sum(len(n) for *_, n in mine), desc="greedy texts", disable=not state.is_main_process) as bar:
        for begin, prompt, names in mine:
            attention.use_for("dense")
            want = continuation(model, prompt.to(state.device), DynamicCache(config=model.config), args.greedy_tokens)
            for name in names:
                attention.use_for(name)
                got = continuation(model, prompt.to(state.device), make_cache(model, name), args.greedy_tokens)
                unlike = (got != want).nonzero()
                agreed = int(unlike[0]) if len(unlike) else args.greedy_tokens
                journal.add({"variant": name, "begin": f"{GREEDY} {begin}", GREEDY: agreed})
                bar.update()


def continuation(model: PreTrainedModel, prompt: torch.Tensor, cache: Cache, tokens: int) -> torch.Tensor:
    """The next ``tokens`` greedy tokens ``[tokens]``; the end-of-text token does not end them."""
    out = model.generate(  # type: ignore[operator]  # of the mixin that every causal model class has
        prompt,
        attention_mask=torch.ones_like(prompt),
        **{CACHE_ARGUMENT: cache},
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :].cpu()


def available_variants() -> list[str]:
    return [name for name in VARIANTS if is_hqq_available() or not name.startswith("hqq")] + [PACKAGE]


def variant(text: str) -> tuple[str, int | None]:
    name, colon, most = text.partition(":")
    known = [*available_variants(), *EXCEPTIONS]
    if name not in known:
        raise argparse.ArgumentTypeError(f"unknown variant {name!r}; choose from {', '.join(known)}")
    return name, positive(most) if colon else None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument(
        "--variants",
        type=variant,
        nargs="+",
        metavar="NAME[:WINDOWS]",
        default=[(name, None) for name in available_variants()],
        help=f"each with the most windows to take, if fewer than --windows; default: {', '.join(available_variants())} "
        f"(hqq needs `pip install hqq`); more: {', '.join(EXCEPTIONS)}",
    )
    parser.add_argument("--window", type=positive, default=2048, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--windows", type=positive, default=20, help="most windows (default: %(default)s)")
    parser.add_argument("--prompt", type=positive, default=16, help="unquantized first tokens (default: %(default)s)")
    parser.add_argument(
        "--bare", action="store_true", help="windows without the tokens that the tokenizer puts in front of a text"
    )
    parser.add_argument("--greedy-prompts", type=int, default=0, help="texts to continue greedily (default: none)")
    parser.add_argument("--greedy-tokens", type=positive, default=256, help="length of each (default: %(default)s)")
    parser.add_argument("--journal", type=Path, help="JSON lines of finished windows: run again to go on after a kill")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--picture", type=Path, help="draw divergence against bytes per token to this file")
    args = parser.parse_args()
    args.variants = {name: args.windows if most is None else most for name, most in args.variants}
    if args.prompt > args.window - 2:
        parser.error(f"--prompt {args.prompt} leaves no token of --window {args.window} to compare")
    return args


def main() -> None:
    args = parse_arguments()
    state = PartialState(cpu=args.device == "cpu")
    if args.device and state.num_processes == 1:
        state.device = torch.device(args.device)
    with state.local_main_process_first():
        model, tokenizer = load_model(args, state.device)
        ids = load_tokens(args, tokenizer)
        # What the tokenizer puts in front of a text, if anything: Gemma is lost without it.
        head = torch.tensor([] if args.bare else tokenizer("").input_ids, dtype=torch.long)
    if len(head) >= args.prompt:
        raise SystemExit(f"--prompt must be above {len(head)}, the tokens that the tokenizer puts in front of a text")
    if len(ids) < args.window:
        raise SystemExit(f"the text has {len(ids)} tokens, less than one window of {args.window}")
    settings = {
        "model": args.model, "dtype": args.dtype, "text": str(args.text_file or f"{args.dataset} {args.config}"),
        "window": args.window, "prompt": args.prompt, "greedy_tokens": args.greedy_tokens,
    } | ({"bare": True} if args.bare else {})  # fmt: skip
    journal = Journal(args.journal, settings)
    if state.is_main_process:
        journal.start()
    state.wait_for_everyone()
    before = len(journal.records)
    measure_windows(model, head, ids, args, journal, state)
    measure_greedy(model, head, ids, args, journal, state)
    new = gather_object(journal.records[before:]) if state.num_processes > 1 else journal.records[before:]
    if state.is_main_process:
        report(args, settings, journal.records[:before] + new, model, state.device)


def report(
    args: argparse.Namespace,
    settings: dict[str, Any],
    records: list[dict[str, Any]],
    model: PreTrainedModel,
    device: torch.device,
) -> None:
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    results = {name: summarize([r for r in records if r["variant"] == name], name, head_dim) for name in args.variants}
    table = markdown(results)
    print(table)
    if args.markdown is not None:
        args.markdown.write_text(table + "\n", encoding="utf-8")
    if args.json is not None:
        write_json(args.json, {"settings": settings, "results": results, **provenance(device)})
    if args.picture is not None:
        draw(results, args.picture, f"{args.model}, windows of {args.window}")


if __name__ == "__main__":
    main()
