"""A picture of a pool's blocks: whose they are, and how many share them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .block_allocator import HOLE
from .sequences.growing import GrowingSequences

#: Blocks in a row of the picture.
_WIDTH = 64
#: Colours of the sequences, one after the other; a block that several hold has the first one's.
_COLORS = ("#1f6fb2", "#d9822b", "#3a9a5b", "#b04a8b", "#7a6a2c", "#5a5fb0", "#c0504d", "#2f9aa0")


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
        ValueError: the cache is preallocated, where sequence i has the i-th part of the blocks; or too few axes.
    """
    from matplotlib.figure import Figure

    sequences = cache._sequences
    if not isinstance(sequences, GrowingSequences):
        raise ValueError("a preallocated cache shares no blocks: sequence i has the i-th part; describe() counts them")
    groups = list(sequences.groups.values())
    if axes is None:
        rows = [max(-(-group.table.allocator.num_blocks // _WIDTH), 1) for group in groups]
        figure = Figure(figsize=(8, sum(0.6 + 0.115 * count for count in rows) + 0.3), layout="constrained")
        axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[count + 3 for count in rows])
    panels = np.ravel(np.asarray(axes, dtype=object))
    if len(panels) < len(groups):
        raise ValueError(f"the cache has {len(groups)} groups of layers, but {len(panels)} axes were given")
    for group, panel in zip(groups, panels):
        _draw(group, panel)
    return panels[0].figure


def _draw(group: Any, axes: Any) -> None:
    from matplotlib.colors import to_rgb

    table, allocator = group.table, group.table.allocator
    count = allocator.num_blocks
    holders = np.array([allocator.ref_count(block) for block in range(count)])
    shown = np.ones((max(-(-count // _WIDTH), 1) * _WIDTH, 3))
    shown[:count][holders > 0] = to_rgb("#bbbbbb")
    for row in range(table.batch_size - 1, -1, -1):
        blocks = table.ids[row][table.ids[row] != HOLE]
        depth = np.minimum(holders[blocks] - 1, 4)[:, None] / 4
        shown[blocks] = np.array(to_rgb(_COLORS[row % len(_COLORS)])) * (1 - 0.65 * depth)
    axes.imshow(shown.reshape(-1, _WIDTH, 3), interpolation="nearest", aspect="equal")
    for edge in range(_WIDTH + 1):
        axes.axvline(edge - 0.5, color="white", linewidth=0.6)
    for edge in range(len(shown) // _WIDTH + 1):
        axes.axhline(edge - 0.5, color="white", linewidth=0.6)
    own = len(np.unique(table.held()))
    axes.set_title(
        f"{group.name}: {own} blocks of {table.batch_size} sequences, {int((holders > 1).sum())} shared, "
        f"{int((holders == 0).sum())} free",
        fontsize=9,
        loc="left",
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")
