"""What a growing cache knows of its sequences beside the blocks: one record, replaced as a whole."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..pool_centring import Centring
from .block_table import BlockTable
from .first_tokens import FirstTokenPlaces


class SequenceState(NamedTuple):
    """All that a cache knows of its sequences, beside the blocks. A change makes another record; only ``layer_lengths``
    and ``centrings`` are filled in while a step goes from layer to layer.

    Attributes:
        tables: block table of each group, never changed in place.
        layer_lengths: tokens that each layer holds: ``length``, or ``step_start`` for those that the current step has
            yet to reach.
        length: tokens per sequence.
        batch_size: sequences; None before the first token.
        step_start: where the newest tokens start.
        from_blocks: whether attention reads the newest tokens from the blocks.
        first_tokens: where the tokens in full precision are; None if there are none.
        prompt_tokens: in a padded first prompt's step: bool ``[batch, tokens]`` on the host, False for padding.
        same_as: in the first prompt's step: for each sequence, the first one with the same prompt; None if all differ.
        record_past: keep blocks that fall out of a window until the next `truncate`, so that it can bring them back.
        centrings: by layer, how the keys that the current step has centred were stored before.
        enough_for_center: tokens from which on the newest step may centre the keys; padding does not count.
        broken: name of an operation that was interrupted and could not be undone, or None.
    """

    tables: dict[str, BlockTable]
    layer_lengths: dict[int, int]
    length: int = 0
    batch_size: int | None = None
    step_start: int = 0
    from_blocks: bool = False
    first_tokens: FirstTokenPlaces | None = None
    prompt_tokens: torch.Tensor | None = None
    same_as: list[int] | None = None
    record_past: bool = False
    centrings: dict[int, Centring] = {}  # noqa: RUF012 (never filled in: a step brings its own)
    enough_for_center: int = 0
    broken: str | None = None

    def copied_tables(self) -> dict[str, BlockTable]:
        """Tables to be changed, for the next record."""
        return {name: table.copy() for name, table in self.tables.items()}

    def forked(self) -> SequenceState:
        """The same for another cache, whose tables hold the same blocks once more."""
        return self._replace(
            tables={name: table.fork() for name, table in self.tables.items()},
            layer_lengths=dict(self.layer_lengths),
            same_as=None,
            centrings={},
        )
