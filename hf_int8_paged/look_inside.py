"""What a cache says of itself: bytes, a description, a picture, one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .block_picture import picture_of
from .description import Description, description_of
from .layer import PagedInt8Layer
from .sequences.growing import GrowingSequences


class LookInside:
    """The half of a cache that only looks."""

    layers: list
    _sequences: Any

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """Keys, values and window of each layer, as `DynamicCache` gives and takes them."""
        for layer in self.layers:
            window = getattr(layer, "sliding_window", None)
            yield layer.keys, layer.values, None if window is None else torch.tensor(window)

    def describe(self) -> Description:
        """Sequences, blocks and bytes now, as a record; ``print`` and notebooks show it as a table."""
        return description_of(self)

    def plot(self, axes: Any = None) -> Any:
        """Draw the pool's blocks with matplotlib: whose each one is, and how many share it; see `picture_of`."""
        return picture_of(self, axes)

    def __repr__(self) -> str:
        length, batch = self._sequences.length, self._sequences.batch_size or 0
        kind = "" if isinstance(self._sequences, GrowingSequences) else ", preallocated"
        if isinstance(self._sequences, GrowingSequences) and self._sequences.pool.offloaded is not None:
            where = self._sequences.pool.offloaded.where()
            kind = f", {where.layers - where.near} of its pool's {where.layers} layers that leave are away"
        return f"PagedInt8Cache({len(self.layers)} layers, {batch} sequences of {length} tokens{kind})"

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of keys, values and scales allocated, all layers, and of first tokens in full precision."""
        return self._sequences.nbytes_allocated + self._first_tokens_nbytes

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks that hold tokens, all layers, and of first tokens in full precision; at most one block
        per sequence and layer more than the tokens themselves take."""
        return self._sequences.nbytes_used + (self._first_tokens_nbytes if self._sequences.length else 0)

    @property
    def _first_tokens_nbytes(self) -> int:
        return sum(layer.first_tokens_nbytes for layer in self.layers if isinstance(layer, PagedInt8Layer))
