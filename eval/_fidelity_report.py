"""Sums, table and picture of `fidelity.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from _variants import EXCEPTIONS, VARIANTS


def summarize(records: list[dict[str, Any]], name: str, head_dim: int) -> dict[str, Any]:
    """Figures of one variant from its records, in an order that does not depend on who made them when."""
    unique = sorted({str(r["begin"]): r for r in records}.values(), key=lambda r: str(r["begin"]))
    windows, greedy = [r for r in unique if "kld" in r], [r["greedy"] for r in unique if "greedy" in r]
    variant = (VARIANTS | EXCEPTIONS).get(name, VARIANTS["int8"])
    kld = np.concatenate([r["kld"] for r in windows])
    means = np.array([np.mean(r["kld"]) for r in windows])
    nll, nll_dense = (math.fsum(r[key] for r in windows) / len(kld) for key in ("nll", "nll_dense"))
    result = {
        "title": variant.title if name in VARIANTS | EXCEPTIONS else "PagedInt8Cache, as it is by default",
        "bytes_of_16_bit_percent": 100 * variant.row_bytes(head_dim) / (2 * head_dim),
        "windows": len(windows),
        "positions": len(kld),
        "kld_mean": float(kld.mean()),
        "kld_standard_error": float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None,
        "kld_p99": float(np.quantile(kld, 0.99)),
        "kld_max": float(kld.max()),
        "top1_agreement_percent": 100 * sum(r["same_top"] for r in windows) / len(kld),
        "perplexity": math.exp(nll),
        "perplexity_dense": math.exp(nll_dense),
        "perplexity_change_percent": 100 * math.expm1(nll - nll_dense),
    }
    if greedy:
        result |= {"greedy_agreement_median": float(np.median(greedy)), "greedy_prompts": len(greedy)}
    return result


def markdown(results: dict[str, dict[str, Any]]) -> str:
    greedy = any("greedy_prompts" in r for r in results.values())
    heads = ["cache", "bytes of 16 bit", "windows", "mean KLD", "p99", "max", "top-1", "perplexity"]
    rows = [heads + ["greedy tokens alike (median)"] * greedy]
    rows.append(["---"] * len(rows[0]))
    for r in results.values():
        row = [
            r["title"],
            f"{r['bytes_of_16_bit_percent']:.1f} %",
            f"{r['windows']}",
            f"{r['kld_mean']:.2e}",
            f"{r['kld_p99']:.2e}",
            f"{r['kld_max']:.2e}",
            f"{r['top1_agreement_percent']:.2f} %",
            f"{r['perplexity_change_percent']:+.3f} %",
        ]
        rows.append(row + [f"{r.get('greedy_agreement_median', math.nan):.0f}"] * greedy)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(results: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Mean and 99th percentile of the divergence against the bytes of a token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    ranked = sorted(results.values(), key=lambda r: r["kld_mean"])
    places = range(len(ranked))
    axes.barh(places, [r["kld_mean"] for r in ranked], color="#4477aa", label="mean")
    axes.plot([r["kld_p99"] for r in ranked], places, "o", color="#ee6677", label="99th percentile")
    labels = [f"{r['title']}\n{r['bytes_of_16_bit_percent']:.1f} % of 16-bit bytes" for r in ranked]
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("KL divergence, nats per token (smaller is better)")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
