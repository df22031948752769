"""What a cache says of itself: bytes."""

from __future__ import annotations

from typing import Any

from .layer import PagedInt8Layer


class LookInside:
    """The half of a cache that only looks."""

    layers: list
    _sequences: Any

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
