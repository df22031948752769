"""`hf-int8-paged plan`: the longest context that fits, as a table, as JSON and as a picture."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ..byte_sizes import bytes_as_text, parse_bytes
from ..planning import Plan, memory_and_weights, plan

#: What a name on the hub looks like; anything else is a path.
_NAME_ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def planned(model: str, memory: str, batch: int, weights: str | None) -> Plan:
    """The plan for a model's name, or for a folder or file with its config.

    Raises:
        OSError: there is no such config here or on the hub.
        ValueError: one of the others makes no sense, or the config does not.
    """
    memory_and_weights(memory, weights)  # before the hub is asked
    return plan(_config(model), memory, batch=batch, weights=weights)


def _config(model: str) -> Any:
    path = os.path.expanduser(model)
    if not os.path.exists(path) and not _NAME_ON_THE_HUB.fullmatch(model):
        raise FileNotFoundError(f"there is no file or folder {model!r}, and no model on the hub can have that name")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # of whatever kind transformers and the config's own checks raise
        message = " ".join(str(error).split())
        raise ValueError(f"the config of {model!r} cannot be read: {type(error).__name__}: {message}") from error


def as_dict(plan: Plan) -> dict[str, Any]:
    """As plain JSON types."""
    record = {name: value for name, value in plan._asdict().items() if not callable(value)}
    cross = plan.cross_attention
    return record | {
        "kinds": [kind._asdict() for kind in plan.kinds],
        "cross_attention": None if cross is None else cross._asdict(),
    }


def print_plan(plan: Plan, model: str) -> None:
    """Print the plan as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    fits = Table("", "16 bit", "int8", title=f"{model}: {_sequences(plan)} in {bytes_as_text(plan.memory)}")
    fits.add_row("longest context, tokens", _tokens(plan.dense_tokens), _tokens(plan.int8_tokens))
    for tokens in (4096, 32768, 131072):
        takes = plan.dense_bytes(tokens), plan.int8_bytes(tokens)
        fits.add_row(f"bytes of {tokens:,} tokens", *map(bytes_as_text, takes))
    layers = Table("layers with keys and values", "window", "16 bit, per token", "int8, per token")
    for kind in plan.kinds:
        window = "-" if kind.window is None else f"{kind.window:,}"
        held = map(bytes_as_text, (kind.dense_bytes_per_token, kind.int8_bytes_per_token))
        layers.add_row(f"{kind.layers} x {kind.kind}", window, *held)
    for table in (fits, layers):
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)
    limit = "" if plan.max_positions is None else f" The model was made for {plan.max_positions:,} positions."
    if plan.cross_attention is not None:
        console.print(_cross_attention(plan), soft_wrap=True)
    room = _limit(plan.memory - plan.weights)
    weights = f"Beside {bytes_as_text(plan.weights)} of weights" if plan.weights else "Without weights (--weights)"
    console.print(f"{weights}: PagedInt8Cache(config, max_bytes={room}).{limit}", soft_wrap=True)


def picture(plan: Plan, model: str, path: Path) -> None:
    """Draw the longest context over memory, for 16 bit and int8."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    longest = max(t for t in (plan.int8_tokens or 0, plan.dense_tokens or 0, 1024))
    tokens = [max(longest * step // 64, 1) for step in range(97)]
    for name, size, color, fits in (
        ("16 bit", plan.dense_bytes, "#9a9a9a", plan.dense_tokens),
        ("int8", plan.int8_bytes, "#1f6fb2", plan.int8_tokens),
    ):
        memory = [(plan.weights + size(count)) / 2**30 for count in tokens]
        axes.plot(memory, tokens, color=color, linewidth=2, label=name)
        if fits:
            axes.plot([plan.memory / 2**30], [fits], "o", color=color)
            beside: dict[str, Any] = (
                {"xytext": (-8, 6), "ha": "right"} if name == "int8" else {"xytext": (8, -14), "ha": "left"}
            )
            at = plan.memory / 2**30, fits
            axes.annotate(f"{fits:,}", at, textcoords="offset points", color=color, **beside)
    axes.axvline(plan.memory / 2**30, color="#444444", linewidth=1, linestyle="--")
    if plan.weights:
        axes.axvspan(0, plan.weights / 2**30, color="#eeeeee", label="weights")
    axes.set(xlabel="memory, GiB", ylabel="tokens in context", title=f"{model}, {_sequences(plan)}", xlim=(0, None))
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


def _limit(count: int) -> str:
    """As an argument that means exactly so many bytes: a text may be rounded up."""
    text = bytes_as_text(count)
    return f'"{text}"' if parse_bytes(text) == count else str(count)


def _cross_attention(plan: Plan) -> str:
    assert plan.cross_attention is not None
    each, most = plan.cross_attention
    size = f"{bytes_as_text(each)} for each token of the encoder or image"
    size += "" if most is None else f", {bytes_as_text(each * most)} for the {most:,} that it gives at most"
    return f"Keys and values of cross-attention come on top and count as weights: {size}."


def _sequences(plan: Plan) -> str:
    return "one sequence" if plan.batch == 1 else f"{plan.batch} sequences"


def _tokens(count: int | None) -> str:
    return "any" if count is None else f"{count:,}"
