"""Which key centre serves many requests: divergence from the unquantized model with centres from different texts.

Windows of a text are fed to PagedInt8Cache 16 rows at a time, as decoding does. The centre is the mean key of: each
window's first 256 tokens (what PagedInt8Cache does with a prompt of that length), another text's first tokens, tokens
drawn from the vocabulary (what continuous batching does by itself); or there is none.

    python eval/batching_centers.py --text-file wikitext-2-test.txt --json eval/results/batching_centers.json
"""

from __future__ import annotations

import argparse
import importlib.resources
from pathlib import Path

import torch
from _centred_pool import CentredPool
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
from _divergence import divergence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.batching import key_centers
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.kernels import MAX_DECODE_ROWS

OWN, OTHER, DRAWN, NONE = "own prompt", "another text", "drawn tokens", "no centre"


@torch.inference_mode()
def quantized_logits(model: PreTrainedModel, window: torch.Tensor, centers: dict[int, torch.Tensor]) -> torch.Tensor:
    """Logits ``[tokens, vocabulary]`` of a window ``[1, tokens]`` whose rows read quantized keys and values only."""
    cache = PagedInt8Cache(model.config, pool=CentredPool(centers))
    chunks = [window[:, :1], *window[:, 1:].split(MAX_DECODE_ROWS, dim=1)]
    return torch.cat([model(chunk, **{CACHE_ARGUMENT: cache}).logits[0] for chunk in chunks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--window", type=positive, default=1024, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--windows", type=positive, default=4, help="most windows (default: %(default)s)")
    parser.add_argument("--calibration", type=positive, default=256, help="tokens of a centre (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    model, tokenizer = load_model(args, device_called(args.device))
    ids = load_tokens(args, tokenizer)
    passage = importlib.resources.files("hf_int8_paged.tools").joinpath("demo_passage.txt").read_text(encoding="utf-8")
    other = tokenizer(passage, return_tensors="pt").input_ids[0, : args.calibration]
    fixed = {OTHER: key_centers(model, other), DRAWN: key_centers(model), NONE: {}}
    windows = ids[: len(ids) // args.window * args.window].view(-1, 1, args.window)[: args.windows]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (OWN, *fixed)}
    same: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    for window in tqdm(windows.to(model.device), desc="windows"):
        model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            dense = model(window, use_cache=False).logits[0, :-1]
        model.set_attn_implementation("int8_paged")
        for name in found:
            centers = key_centers(model, window[0, : args.calibration]) if name == OWN else fixed[name]
            result = divergence(quantized_logits(model, window, centers)[:-1], dense, window[0, 1:])
            found[name].append(result.kld)
            same[name].append(result.same_top)
    rows = {
        name: {
            "kld": float(torch.cat(klds).mean()),
            "kld_99": float(torch.cat(klds).quantile(0.99)),
            "top_1": float(torch.cat(same[name]).double().mean()),
        }
        for name, klds in found.items()
    }
    for name, row in rows.items():
        print(f"{name:14} KLD {row['kld']:.3e}, 99th percentile {row['kld_99']:.2e}, top-1 {row['top_1']:.2%}")
    if args.json:
        sizes = {"window": args.window, "windows": len(windows), "calibration": args.calibration}
        write_json(args.json, provenance(model.device) | {"model": args.model, **sizes, "centres": rows})


if __name__ == "__main__":
    main()
