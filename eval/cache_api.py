"""Which public names of transformers' caches mean the same in `PagedInt8Cache`, which differ, and which are refused.

The tests fail where the installed transformers has a name that `_cache_api_rows` does not decide about, and where a
decision is not true.

    python -m eval.cache_api --markdown docs/cache_api.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, EncoderDecoderCache, Qwen2Config, StaticCache

from eval import _cache_api_rows as rows
from eval._cache_api_rows import DIFFERS, REFUSED, SAME, Row, states
from hf_int8_paged import PagedInt8Cache

#: One layer with full attention and one with a window.
CONFIG = Qwen2Config(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=rows.HEADS,
    num_key_value_heads=rows.HEADS, use_sliding_window=True, sliding_window=rows.WINDOW, max_window_layers=1,
    layer_types=["full_attention", "sliding_attention"],
)  # fmt: skip
#: Rows stored as they come, so that what is read can be compared with what transformers' own caches hold.
PLAIN: dict[str, Any] = {"rotation": None, "center_keys": False}


class Surface(NamedTuple):
    """One of our classes beside one of transformers'.

    Attributes:
        title: heading of its table.
        decisions: name -> row.
        ours, theirs: make a new one; for layers, the cache that they belong to.
        layer: index of the layer, or ``None`` for the cache itself.
    """

    title: str
    decisions: dict[str, Row]
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    layer: int | None = None


def growing() -> PagedInt8Cache:
    return PagedInt8Cache(CONFIG, **PLAIN)


def preallocated() -> PagedInt8Cache:
    return PagedInt8Cache(CONFIG, max_batch_size=rows.BATCH, max_cache_len=rows.MAX_CACHE_LEN, **PLAIN)


def dynamic() -> DynamicCache:
    return DynamicCache(config=CONFIG)


def static() -> StaticCache:
    return StaticCache(CONFIG, rows.MAX_CACHE_LEN)


SURFACES = (
    Surface("`DynamicCache` and a cache that grows", rows.GROWING_CACHE, growing, dynamic),
    Surface("`StaticCache` and a preallocated cache", rows.PREALLOCATED_CACHE, preallocated, static),
    Surface("`DynamicLayer` and a layer of a cache that grows", rows.GROWING_LAYER, growing, dynamic, 0),
    Surface("`DynamicSlidingWindowLayer` and such a layer with a window", rows.GROWING_LAYER, growing, dynamic, 1),
    Surface("`StaticLayer` and a preallocated layer", rows.PREALLOCATED_LAYER, preallocated, static, 0),
    Surface(
        "`StaticSlidingWindowLayer` and such a layer with a window", rows.PREALLOCATED_LAYER, preallocated, static, 1
    ),
    Surface(
        "`EncoderDecoderCache` of two `DynamicCache` and of two caches that grow",
        rows.ENCODER_DECODER,
        lambda: EncoderDecoderCache(growing(), growing()),
        lambda: EncoderDecoderCache(dynamic(), dynamic()),
    ),
)


def made(surface: Surface, ours: bool, fresh: bool = False) -> Any:
    """The cache or layer, filled with ``TOKENS`` tokens per sequence unless it shall be fresh."""
    cache = surface.ours() if ours else surface.theirs()
    if not fresh:
        parts = [cache.self_attention_cache, cache.cross_attention_cache] if hasattr(cache, "is_updated") else [cache]
        for part in parts:
            for layer in range(CONFIG.num_hidden_layers):
                part.update(states(rows.TOKENS), -states(rows.TOKENS), layer)
    return cache if surface.layer is None else cache.layers[surface.layer]


def public_names(surface: Surface) -> set[str]:
    """Public names of transformers' own, and the special methods that its classes define."""
    theirs = made(surface, ours=False)
    special = {
        name
        for base in type(theirs).__mro__
        if base.__module__.startswith("transformers")
        for name, value in vars(base).items()
        if name.startswith("__") and callable(value)
    }
    plain = {name for name in [*dir(type(theirs)), *vars(theirs)] if not name.startswith("_")}
    return plain | special - {"__init__", "__init_subclass__", "__class_getitem__"}


def outcome(row: Row, x: Any) -> Any:
    """What the row's call returns, or the error that it raises."""
    try:
        return row.call(x)
    except Exception as error:  # whatever it is: it is compared
        return error


def is_true(surface: Surface, name: str) -> bool:
    """Whether the decision about a name, which the installed transformers has, is true."""
    row = surface.decisions[name]
    ours = outcome(row, made(surface, True, row.fresh))
    if row.verdict == REFUSED:
        return isinstance(ours, NotImplementedError) and row.note in str(ours)
    theirs = outcome(row, made(surface, False, row.fresh))
    if row.verdict == DIFFERS:
        assert row.holds is not None
        return row.holds(ours, theirs)
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        return row.raises and type(ours) is type(theirs)
    return alike(ours, theirs)


def alike(ours: Any, theirs: Any) -> bool:
    """Equal, floats up to the rounding of a scale to float16."""
    if isinstance(theirs, torch.Tensor):
        same_kind = ours.shape == theirs.shape and ours.dtype == theirs.dtype
        return same_kind and torch.allclose(ours, theirs, rtol=2**-11, atol=0)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(alike(x, y) for x, y in zip(ours, theirs))
    return bool(ours == theirs)


def markdown() -> str:
    """The committed document; it says the same whatever release is installed."""
    count = {verdict: 0 for verdict in (SAME, DIFFERS, REFUSED)}
    tables = []
    for surface in SURFACES:
        tables += ["", f"## {surface.title}", "", "| name | | |", "|---|---|---|"]
        for name, row in sorted(surface.decisions.items()):
            count[row.verdict] += 1
            note = f"`NotImplementedError`: {row.note}" if row.verdict == REFUSED else row.note
            tables.append(f"| `{name}` | {row.verdict} | {note} |")
    head = [
        "# `PagedInt8Cache` and the interface of transformers' caches",
        "",
        "Made by `make cache-api`; not edited by hand. The tests run every row with the installed transformers, and "
        "fail where it has a public name that stands in no row.",
        "",
        f"{sum(count.values())} rows: {count[SAME]} mean the same, {count[DIFFERS]} differ as the row says, "
        f"{count[REFUSED]} are refused with a sentence.",
        "",
        "*same*: returns what transformers' own returns, keys and values up to quantization, or raises an error of the "
        "same kind. A name that the installed release does not have is not looked at.",
    ]
    return "\n".join(head + tables) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    args = parser.parse_args()
    problems = []
    for surface in SURFACES:
        names = public_names(surface)
        problems += [f"{surface.title}: nothing is decided about {x}" for x in sorted(names - set(surface.decisions))]
        problems += [
            f"{surface.title}: {x} is not {surface.decisions[x].verdict}"
            for x in sorted(names & set(surface.decisions))
            if not is_true(surface, x)
        ]
    print("\n".join(problems) or "every public name is decided about, and every decision is true")
    if args.markdown:
        args.markdown.write_text(markdown(), encoding="utf-8")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
