"""The coverage table, as Markdown."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers

_KINDS = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "indexed_attention": "indexed (sparse)",
    "linear_attention": "linear",
    "conv": "convolution",
    "hybrid": "full + linear",
    "hybrid_sliding": "sliding + linear",
    "dummy": "none of its own",
}


def summary(results: list[dict[str, Any]]) -> str:
    """One line of counts."""
    count = {status: sum(r["status"] == status for r in results) for status in ("ok", "refused", "failed", "apart")}
    usable = len(results) - count["apart"]
    share = 100 * count["ok"] / max(usable, 1)
    return (
        f"{count['ok']} of {usable} architectures that generate with DynamicCache are right with PagedInt8Cache "
        f"({share:.1f} %), {count['refused']} refused, {count['failed']} failed; {count['apart']} do not generate with "
        "DynamicCache here"
    )


def markdown(results: list[dict[str, Any]]) -> str:
    """The committed document."""
    compared = [r for r in results if r["status"] != "apart"]
    apart = [r for r in results if r["status"] == "apart"]
    lines = [
        "# Coverage",
        "",
        "Made by `make coverage`; not edited by hand.",
        "",
        summary(results) + ".",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}, CPU, "
        "float32. Every architecture of transformers' causal-LM and seq2seq-LM mappings, as a tiny random model: "
        "2 prompts of 37 tokens (seq2seq: 21 tokens of the decoder's over 37 of the encoder's), then 24 tokens, once "
        "without padding and once, where `DynamicCache` and the model allow it, with the second prompt padded to 21 "
        "tokens on the left. All caches are fed `DynamicCache`'s tokens and compared logit by logit at every step with "
        "a dense cache whose rows went through the same int8 (the oracle).",
        "",
        "* *layers*: kinds as transformers' config lists them; for encoder-decoder models of the decoder.",
        "* *route*: `kernel`: decode attention straight from the int8 blocks; `dense view`: attention of the model's "
        "own, or a mask that kernels cannot express, over a dequantized copy; `transformers' layer`: state that is not "
        "held per token, or sparse-attention layers, in transformers' own cache layers.",
        "* *eager*: largest difference from the oracle under eager attention, relative to the largest logit "
        "(at most 1e-5: float32 rounding).",
        '* *int8_paged*: largest difference from the oracle under `attn_implementation="int8_paged"`, as a part of '
        "what quantization itself changes (at most 0.5).",
        "  (\\*): with the native kernels' rounding a router chose other experts, and everything after differs by the "
        "part in brackets; the figure before is that of the reference kernels, which round as the oracle does.",
        "* *padded*: the same two comparisons with left padding.",
        "",
        "| architecture | mapping | layers | K, V width | route | result | eager | int8_paged | padded |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(r) for r in compared]
    lines += [
        "",
        "## `DynamicCache` does not generate here",
        "",
        "| architecture | mapping | reason |",
        "|---|---|---|",
    ]
    lines += [f"| {r['architecture']} | {r['mapping']} | {_cell(r['reason'])} |" for r in apart]
    return "\n".join(lines) + "\n"


def _row(r: dict[str, Any]) -> str:
    kinds = ", ".join(
        f"{count} {_KINDS.get(kind, kind.replace('_', ' '))}" for kind, count in r.get("layers", {}).items()
    )
    widths = "; ".join(f"{k}" if k == v else f"{k}, {v}" for k, v in r.get("widths", []))
    result = r["status"] if r["status"] == "ok" else f"{r['status']}: {_cell(r['reason'])}"
    padded = r.get("padded", {})
    cells = [
        r["architecture"],
        r["mapping"],
        kinds,
        widths,
        ", ".join(r.get("routes", [])),
        result,
        f"{r['eager']:.0e}" if "eager" in r else "",
        _part(r) if "int8_paged" in r else "",
        f"{padded['eager']:.0e}, {_part(padded)}" if "eager" in padded else padded.get("reason", ""),
    ]
    return "| " + " | ".join(cells) + " |"


def _part(figures: dict[str, Any]) -> str:
    return f"{figures['int8_paged']:.3f}" + (f" (\\*{figures['tipped']:.1f})" if "tipped" in figures else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
