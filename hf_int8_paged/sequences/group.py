"""The layers of one growing cache that share a block table, and what a step's kernels need to know of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..block_allocator import HOLE
from ..kernels import Tokens
from ..layer_checks import LayerShape
from ..pool_access import Books
from ..seam.views import PagedView
from .block_table import BlockTable


class ViewsOf(NamedTuple):
    """What views of a layer's keys and values are like."""

    batch: int | None
    tokens: int
    shape: LayerShape | None
    dtypes: tuple[torch.dtype, torch.dtype]


def group_name(window: int | None) -> str:
    """What pools and files call the layers with this window."""
    return "full_attention" if window is None else f"sliding_attention_{window}"


class Group:
    """The layers of one cache that share a block table: the same window, or none.

    Args:
        name: the pool's name for the group.
        books: of the cache; its state has the group's table under this name.
        window: sliding window in tokens (a query sees ``window`` positions, its own included), or ``None``.
    """

    def __init__(self, name: str, books: Books, window: int | None):
        self.name = name
        self.window = window
        #: Counts the times that tokens were dropped or moved; views made before are no longer valid.
        self.epoch = 0
        #: Layers that share the table.
        self.num_layers = 0
        self._books = books
        #: Views for the layers that the step has yet to reach, and what they are views of.
        self.blank: tuple[ViewsOf | None, list[tuple[PagedView, PagedView]]] = (None, [])

    @property
    def table(self) -> BlockTable:
        """Block table of the group's layers: another object after every change."""
        return self._books.state.tables[self.name]

    def first_visible(self, position: int) -> int:
        """First position that a query at ``position`` sees."""
        return 0 if self.window is None else max(position - self.window + 1, 0)

    @property
    def holds_the_pool(self) -> bool:
        """Whether all blocks in use are this table's."""
        held = np.unique(self.table.ids)
        return self.table.allocator.num_used == len(held) - (HOLE in held)

    def make_views(self, kind: ViewsOf) -> tuple[PagedView, PagedView]:
        """Views of keys and of values, each ``[batch, heads, tokens, dim]``, without content.

        The first layer makes those of all layers at once, and leaves the others' in ``blank``: between two layers, a
        model's weights push everything that making one needs out of the processor's caches.
        """
        batch, tokens, shape, dtypes = kind
        assert batch is not None
        assert shape is not None
        heads, *dims, device = shape
        of_keys, of_values = ((batch, heads, tokens, dim) for dim in dims)
        views = [
            (
                PagedView.blank(of_keys, dtypes[0], device, is_values=False),
                PagedView.blank(of_values, dtypes[1], device, is_values=True),
            )
            for _ in range(self.num_layers)
        ]
        self.blank = kind, views
        return views.pop()

    def tokens(self, device: torch.device) -> Tokens:
        """Where the sequences' tokens are, on ``device``: made once per step for all layers."""
        state = self._books.state
        table = state.tables[self.name]
        tokens = table.made.get(device)
        if tokens is None:
            batch = table.batch_size
            tokens = table.made[device] = Tokens(
                table.ids_on(device),
                torch.full((batch,), state.step_start, dtype=torch.int32, device=device),
                torch.full((batch,), table.length, dtype=torch.int32, device=device),
                self.window,
            )
        return tokens
