"""A picture of a pool's blocks: whose they are, and how many share them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .block_allocator import HOLE
from .sequences.growing import GrowingSequences

#: Blocks in a row of the picture, at least and at most.
_WIDTHS = 16, 96
#: Colours of the sequences, one after the other; a block that several hold has the first one's.
_COLORS = ("#1f6fb2", "#d9822b", "#3a9a5b", "#b04a8b", "#7a6a2c", "#5a5fb0", "#c0504d", "#2f9aa0")
_OTHERS, _EDGE = "#bbbbbb", "#e4e4e4"


def picture_of(cache: Any, axes: Any = None) -> Any:
    """Draw the blocks of a growing cache's pool, one square each, one panel for each group of layers.

    The colour says whose a block is: of which sequence of this cache, of another cache (grey), or nobody's (white). The
    more sequences hold it, the darker it is.

    Args:
        cache: the `PagedInt8Cache`.
        axes: matplotlib's, as many as the cache has groups; ``None`` makes a figure.

    Returns:
        The figure.

    Raises:
        ValueError: the cache is preallocated, where sequence i has the i-th part of the blocks, or has no layers with
            blocks; or too few axes.
    """
    from matplotlib.figure import Figure

    sequences = cache._sequences
    if not isinstance(sequences, GrowingSequences):
        raise ValueError("a preallocated cache shares no blocks: sequence i has the i-th part; describe() counts them")
    groups = list(sequences.groups.values())
    if not groups:
        raise ValueError("no layer of this cache holds keys and values in blocks: there are none to draw")
    if axes is None:
        sizes = [8 / width * rows for width, rows in map(_grid, groups)]
        figure = Figure(figsize=(8.4, sum(sizes) + 0.45 * len(sizes) + 0.5), layout="constrained")
        axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[size + 0.3 for size in sizes])
    panels = np.ravel(np.asarray(axes, dtype=object))
    if len(panels) < len(groups):
        raise ValueError(f"the cache has {len(groups)} groups of layers, but {len(panels)} axes were given")
    for group, panel in zip(groups, panels):
        _draw(group, panel)
    _explain(panels[len(groups) - 1], sequences.batch_size or 0)
    return panels[0].figure


def _grid(group: Any) -> tuple[int, int]:
    """Columns and rows for the blocks of a group."""
    count = group.table.allocator.num_blocks
    width = min(max(math.isqrt(4 * count), _WIDTHS[0]), _WIDTHS[1])
    return width, max(-(-count // width), 1)


def _explain(axes: Any, batch: int) -> None:
    from matplotlib.patches import Patch

    several: Any = _shade(_COLORS[0], 5)
    shown = [Patch(color=color, label=f"sequence {row}") for row, color in enumerate(_COLORS[:batch])]
    if batch > len(_COLORS):
        shown.append(Patch(alpha=0, label=f"{batch - len(_COLORS)} more, colours again"))
    shown += [
        Patch(color=several, label="held by several"),
        Patch(color=_OTHERS, label="another cache's"),
    ]
    shown.append(Patch(facecolor="white", edgecolor="#bbbbbb", label="free"))
    axes.legend(
        handles=shown, loc="upper left", bbox_to_anchor=(0, -0.02), ncols=8, frameon=False, fontsize=8, borderaxespad=0
    )


def _shade(color: str, holders: Any) -> np.ndarray:
    """The colour of blocks that so many hold: the more, the darker."""
    from matplotlib.colors import to_rgb

    depth = np.minimum(np.asarray(holders) - 1, 4)[..., None] / 4
    return np.array(to_rgb(color)) * (1 - 0.65 * depth)


def _draw(group: Any, axes: Any) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    table, allocator = group.table, group.table.allocator
    count, (width, rows) = allocator.num_blocks, _grid(group)
    holders = np.array([allocator.ref_count(block) for block in range(count)])
    shown = np.zeros((rows * width, 4))  # nothing at all behind the last block
    shown[:count] = 1
    shown[:count, :3][holders > 0] = to_rgb(_OTHERS)
    for row in range(table.batch_size - 1, -1, -1):
        blocks = table.ids[row][table.ids[row] != HOLE]
        shown[blocks, :3] = _shade(_COLORS[row % len(_COLORS)], holders[blocks])
    axes.imshow(shown.reshape(rows, width, 4), interpolation="nearest", aspect="equal")
    for block in range(count):
        axes.add_patch(Rectangle((block % width - 0.5, block // width - 0.5), 1, 1, fill=False, edgecolor=_EDGE))
    own = len(np.unique(table.held()))
    axes.set_title(
        f"{group.name}: {own} blocks of {table.batch_size} sequences, {int((holders > 1).sum())} shared, "
        f"{int((holders == 0).sum())} free",
        fontsize=9,
        loc="left",
    )
    axes.set_axis_off()
