"""The layers of one cache that share a block table, and what a step's kernels need to know of it."""

from __future__ import annotations

import numpy as np
import torch

from .block_allocator import HOLE
from .block_table import BlockTable
from .kernels import Tokens
from .views import PagedView


class Group:
    """The layers of one cache that share a block table: the same window, or none.

    Args:
        name: the pool's name for the group.
        table: block table of the group's layers.
        window: sliding window in tokens (a query sees ``window`` positions, its own included), or ``None``.
    """

    def __init__(self, name: str, table: BlockTable, window: int | None):
        self.name = name
        self.table = table
        self.window = window
        #: Counts the times that tokens were dropped or moved; views made before are no longer valid.
        self.epoch = 0
        #: Layers that share the table.
        self.num_layers = 0
        self._tokens: dict[torch.device, Tokens] = {}
        self._blank_views: list[tuple[PagedView, PagedView]] = []
        self._blank_kind: tuple = ()

    def first_visible(self, position: int) -> int:
        """First position that a query at ``position`` sees."""
        return 0 if self.window is None else max(position - self.window + 1, 0)

    @property
    def holds_the_pool(self) -> bool:
        """Whether all blocks in use are this table's."""
        held = np.unique(self.table.ids)
        return self.table.allocator.num_used == len(held) - (HOLE in held)

    def changed(self) -> None:
        """Note that lengths or blocks are no longer what they were at the last step."""
        self._tokens.clear()
        self._blank_views.clear()

    def blank_views(
        self,
        batch: int,
        tokens: int,
        key_shape: tuple[int, int],
        value_shape: tuple[int, int],
        dtypes: tuple[torch.dtype, ...],
        device: torch.device,
    ) -> tuple[PagedView, PagedView]:
        """Views of keys and of values, each ``[batch, heads, tokens, dim]``; ``dtypes`` are theirs.

        The first layer makes those of all layers at once: between two layers, a model's weights push everything that
        making one needs out of the processor's caches.
        """
        kind = (batch, tokens, key_shape, value_shape, dtypes, device)
        if not self._blank_views or kind != self._blank_kind:
            of_keys, of_values = ((batch, heads, tokens, dim) for heads, dim in (key_shape, value_shape))
            self._blank_kind = kind
            self._blank_views = [
                (
                    PagedView.blank(of_keys, dtypes[0], device, is_values=False),
                    PagedView.blank(of_values, dtypes[1], device, is_values=True),
                )
                for _ in range(self.num_layers)
            ]
        return self._blank_views.pop()

    def tokens(self, device: torch.device, start: int) -> Tokens:
        """Where the sequences' tokens are, on ``device``: made once per step for all layers.

        Args:
            device: where the layer's blocks are.
            start: position of the step's first token.
        """
        tokens = self._tokens.get(device)
        if tokens is None:
            batch = self.table.batch_size
            tokens = self._tokens[device] = Tokens(
                self.table.ids_on(device),
                torch.full((batch,), start, dtype=torch.int32, device=device),
                torch.full((batch,), self.table.length, dtype=torch.int32, device=device),
                self.window,
            )
        return tokens
