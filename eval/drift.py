"""Does the error grow with the length of what is generated?

Greedy tokens are generated through the quantized cache. Then the unquantized model reads the same tokens, and the KL
divergence between both next-token distributions is taken at every position. Its slope over the position comes with a
95 % confidence interval, from the means of consecutive stretches of text, as neighbours depend on each other. With
several prompts, it is that of their mean divergence at each position.

    python eval/drift.py --text-file wiki.test.raw --json eval/results/drift.json --picture docs/drift.png
"""

from __future__ import annotations

import argparse
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
from _divergence import divergence
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT

#: Rows of a forward pass of the unquantized model.
CHUNK = 512


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens ``[tokens]`` through the quantized cache, and the logits ``[tokens, vocabulary]`` behind them."""
    cache, ids, chosen, logits = PagedInt8Cache(model.config), prompt, [], []
    for _ in tqdm(range(tokens), desc="tokens"):
        logits.append(model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1).logits[0, -1])
        chosen.append(logits[-1].argmax())
        ids = chosen[-1].view(1, 1)
    return torch.stack(chosen), torch.stack(logits)


@torch.inference_mode()
def teacher_forced(model: PreTrainedModel, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The unquantized model's logits ``[tokens, vocabulary]`` for the same tokens."""
    ids, cache = torch.cat([prompt, tokens[None, :-1]], dim=1), DynamicCache(config=model.config)
    rows = [model(chunk, **{CACHE_ARGUMENT: cache}).logits[0] for chunk in tqdm(ids.split(CHUNK, dim=1), desc="dense")]
    return torch.cat(rows)[prompt.shape[1] - 1 :]


def slope(values: torch.Tensor, stretches: int) -> dict[str, float]:
    """Change of ``values`` per 1,000 positions by least squares over the means of stretches, with a 95 % interval."""
    from scipy import stats

    size = len(values) // stretches
    means = values[: size * stretches].view(stretches, size).mean(1)
    middles = (torch.arange(stretches, dtype=torch.float64) + 0.5) * size / 1000
    fit = stats.linregress(middles.numpy(), means.numpy())
    half = stats.t.ppf(0.975, stretches - 2) * fit.stderr
    return {
        "per_1000_tokens": float(fit.slope),
        "low": float(fit.slope - half),
        "high": float(fit.slope + half),
        "stretches": stretches,
    }


def draw(kld: torch.Tensor, result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.8), layout="constrained")
    axes.plot(kld.clamp(min=1e-12), ".", markersize=2, alpha=0.4, label="every token")
    size = len(kld) // result["stretches"]
    means = kld[: size * result["stretches"]].view(-1, size).mean(1)
    axes.step(range(0, size * len(means), size), means, where="post", color="black", label=f"means of {size}")
    axes.set_yscale("log")
    axes.set(xlabel="position among the generated tokens", ylabel="KL divergence, nats")
    axes.set_title(
        f"slope {result['per_1000_tokens']:.1e} per 1,000 tokens [{result['low']:.1e}, {result['high']:.1e}]",
        fontsize=10,
    )
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--prompts", type=positive, default=1, help="spread over the text (default: %(default)s)")
    parser.add_argument("--prompt", type=positive, default=128, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=positive, default=4000, help="to generate (default: %(default)s)")
    parser.add_argument("--stretches", type=positive, default=20, help="for the slope (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--picture", type=Path, help="draw the divergence of every position to this file")
    args = parser.parse_args()
    if args.stretches < 3 or args.tokens < args.stretches:
        parser.error(f"--stretches must be at least 3 and at most --tokens, got {args.stretches}")
    device = device_called(args.device)
    model, tokenizer = load_model(args, device)
    head = torch.tensor(tokenizer("").input_ids, dtype=torch.long)
    ids = load_tokens(args, tokenizer)
    dense_attention = model.config._attn_implementation
    runs, texts = [], []
    for begin in range(0, len(ids), len(ids) // args.prompts)[: args.prompts]:
        prompt = torch.cat([head, ids[begin : begin + args.prompt]])[None].to(device)
        model.set_attn_implementation("int8_paged")
        tokens, logits = generate(model, prompt, args.tokens)
        model.set_attn_implementation(dense_attention)
        runs.append(divergence(logits, teacher_forced(model, prompt, tokens), tokens))
        texts.append(tokens)
    kld = torch.stack([found.kld for found in runs]).mean(0).cpu()
    result: dict[str, Any] = {
        "tokens": len(kld),
        "prompts": args.prompts,
        "distinct_tokens": [len(tokens.unique()) for tokens in texts],
        "kld_mean": float(kld.mean()),
        "kld_mean_first_quarter": float(kld[: len(kld) // 4].mean()),
        "kld_mean_last_quarter": float(kld[-(len(kld) // 4) :].mean()),
        "top1_agreement_percent": 100 * float(torch.cat([found.same_top for found in runs]).double().mean()),
        "slopes_of_each_prompt": [slope(found.kld.cpu(), args.stretches)["per_1000_tokens"] for found in runs],
        **slope(kld, args.stretches),
    }
    print(
        f"mean KLD {result['kld_mean']:.2e}; first quarter {result['kld_mean_first_quarter']:.2e}, "
        f"last quarter {result['kld_mean_last_quarter']:.2e}\n"
        f"slope {result['per_1000_tokens']:+.1e} per 1,000 tokens, "
        f"95 % interval [{result['low']:+.1e}, {result['high']:+.1e}]\n"
        f"distinct tokens of {len(kld)}, for each prompt: {result['distinct_tokens']}"
    )
    if args.json is not None:
        decoded = [tokenizer.decode(tokens) for tokens in texts]
        write_json(args.json, {**provenance(device), "results": result, "texts": decoded})
    if args.picture is not None:
        draw(kld, result, args.picture)


if __name__ == "__main__":
    main()
