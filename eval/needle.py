"""Does the model find a pass key in a long context as well with the quantized cache?

The key stands at some depth of a text. The text is read first; then the question comes, as a second turn, so that its
every token, and every token of the answer, reads what the cache holds. An answer counts if the key is in it.

    python eval/needle.py --text-file wiki.test.raw --json eval/results/needle.json --picture docs/needle.png
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from _common import (
    add_model_arguments,
    add_text_arguments,
    device_called,
    load_model,
    load_tokens,
    positive,
    provenance,
    write_json,
)
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT

NEEDLE = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
TASK = "Somewhere in the following text a pass key is hidden. Find it and remember it.\n\n"
QUESTION = "\n\nWhat is the pass key?"
ANSWER = " The pass key is"
ANSWER_TOKENS = 10
#: name -> (title, attention implementation for it, or None for the model's own)
CACHES = {"dense": ("DynamicCache", None), "int8": ("PagedInt8Cache", "int8_paged")}


def haystack(
    text: torch.Tensor, tokenizer: PreTrainedTokenizerBase, key: str, tokens: int, depth: float, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a context with the key, and of the question: ``[1, tokens]`` together.

    Args:
        text: ids of the text, ``[length]``, taken from ``start`` on and round its end.
        depth: 0 puts the key first, 1 last.
    """
    mark = "<here>"
    whole = TASK + mark + QUESTION
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": whole}]
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    first, last = (whole + ANSWER.lstrip() if tokenizer.chat_template else whole + ANSWER).split(mark)

    def ids(words: str, special: bool = False) -> torch.Tensor:
        return tokenizer(words, add_special_tokens=special, return_tensors="pt").input_ids[0]

    head, needle = ids(first, not tokenizer.chat_template), ids(NEEDLE.format(key=key))
    question = ids(last)
    room = tokens - len(head) - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"{tokens} tokens are too few: key and question take {tokens - room}")
    filler = text.roll(-start).repeat(-(-room // len(text)))[:room]
    before = round(depth * room)
    return torch.cat([head, filler[:before], needle, filler[before:]])[None], question[None]


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Cache, context: torch.Tensor, question: Any
) -> str:
    """The greedy continuation of context and question, which are fed one after the other."""
    model(context, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    ids = torch.cat([context, question], dim=1)
    out = model.generate(  # type: ignore[operator]  # of the mixin that every causal model class has
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE_ARGUMENT: cache},
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :]))


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: torch.Tensor, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One record per length, depth and trial, with both answers."""
    dense_attention, records = model.config._attn_implementation, []
    points = [(n, d, t) for n in args.lengths for d in args.depths for t in range(args.trials)]
    for tokens, depth, trial in tqdm(points, desc="needles"):
        chance = random.Random(f"{tokens} {depth} {trial}")
        key, start = f"{chance.randrange(10_000, 100_000)}", chance.randrange(len(text))
        context, question = (x.to(model.device) for x in haystack(text, tokenizer, key, tokens, depth, start))
        record: dict[str, Any] = {"tokens": tokens, "depth": depth, "trial": trial, "key": key}
        for name, (_, implementation) in CACHES.items():
            model.set_attn_implementation(implementation or dense_attention)
            cache = (DynamicCache if name == "dense" else PagedInt8Cache)(config=model.config)
            text_of = answer(model, tokenizer, cache, context, question)
            record[name] = {"answer": text_of, "found": key in text_of}
        model.set_attn_implementation(dense_attention)
        records.append(record)
    return records


def found_share(records: list[dict[str, Any]], name: str, tokens: int, depth: float) -> float:
    hits = [r[name]["found"] for r in records if (r["tokens"], r["depth"]) == (tokens, depth)]
    return sum(hits) / len(hits)


def draw(records: list[dict[str, Any]], args: argparse.Namespace, path: Path) -> None:
    """Two heat maps, length against depth: the share of keys found."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CACHES), figsize=(10, 3.6), layout="constrained", sharey=True)
    for axis, (name, (title, _)) in zip(axes, CACHES.items()):
        shares = [[found_share(records, name, tokens, depth) for tokens in args.lengths] for depth in args.depths]
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                axis.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(args.lengths)), [f"{n:,}" for n in args.lengths])
        axis.set_yticks(range(len(args.depths)), [f"{d:.0%}" for d in args.depths])
        axis.set(title=title, xlabel="tokens")
    axes[0].set_ylabel("depth of the key")
    figure.colorbar(image, ax=axes, label=f"pass keys found, of {args.trials}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def depth(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_text_arguments(parser)
    lengths, depths = (512, 1024, 2048, 4096), (0.0, 0.25, 0.5, 0.75, 1.0)
    parser.add_argument("--lengths", type=positive, nargs="+", default=lengths, help="default: %(default)s")
    parser.add_argument("--depths", type=depth, nargs="+", default=depths, help="default: %(default)s")
    parser.add_argument("--trials", type=positive, default=2, help="keys per point (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--picture", type=Path, help="draw the heat maps to this file")
    args = parser.parse_args()
    device = device_called(args.device)
    model, tokenizer = load_model(args, device)
    records = measure(model, tokenizer, load_tokens(args, tokenizer), args)
    found = {name: sum(r[name]["found"] for r in records) for name in CACHES}
    unlike = sum(r["dense"]["found"] != r["int8"]["found"] for r in records)
    same = sum(r["dense"]["answer"] == r["int8"]["answer"] for r in records)
    for name, (title, _) in CACHES.items():
        print(f"{title:>15}: {found[name]} of {len(records)} pass keys found")
    print(f"    one found it and the other did not: {unlike}; the same answer, word for word: {same}")
    if args.json is not None:
        summary = {"points": len(records), "found": found, "found_by_one_only": unlike, "same_answer": same}
        write_json(args.json, {**provenance(device), "summary": summary, "records": records})
    if args.picture is not None:
        draw(records, args, args.picture)


if __name__ == "__main__":
    main()
