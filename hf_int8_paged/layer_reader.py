"""The reading side of a cache layer: what views and the attention function ask of its blocks."""

from __future__ import annotations

import torch

from .kernels import KvCacheQuant, Scoring
from .seam.once import dense_read
from .seam.views import Content, PagedView
from .sequences.room import Room


class LayerReader:
    """Attention over a layer's stored tokens, and their dense copies.

    Args:
        index: the layer's index in the model.
        room: where its tokens lie.
    """

    def __init__(self, index: int, room: Room):
        self.index = index
        self.room = room
        #: Sliding window in tokens, or ``None`` for full attention.
        self.window = room.window

    @property
    def storage(self) -> KvCacheQuant:
        """The layer's blocks."""
        return self.room.storage

    @property
    def epoch(self) -> int:
        return self.room.epoch

    def gather(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys and values of positions ``start`` to ``stop``, ``[batch, num_kv_heads, stop - start, dim]``."""
        room = self.room
        keys, values = room.backend.gather(room.for_reading[self.index], room.tokens(), start, stop, dtype)
        first_tokens = room.first_tokens(start)
        if first_tokens is not None:
            first_tokens.put_both(keys, values, start)
        return keys, room.checked(values)

    def attend(
        self,
        query: torch.Tensor,
        scoring: Scoring,
        stop: int,
        fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of the newest rows: over the blocks, which hold their own tokens too, or over the past in the
        blocks and, causally, over ``fresh`` keys and values of their own.

        Args:
            query: ``[batch, num_q_heads, q_len, head_dim]``, at positions ``stop - q_len`` to ``stop``.
            scoring: factor, softcap, sink logits and key mask.
            stop: tokens in the context, the query's own included.
            fresh: keys ``[batch, num_kv_heads, q_len, head_dim]`` and values ``[batch, num_kv_heads, q_len,
                v_head_dim]`` of the rows, of the query's dtype; only where `long_chunks` says so.

        Returns:
            ``[batch, q_len, num_q_heads, v_head_dim]``, contiguous; NaN after a step that only the device counted and
            that did not fit.
        """
        room = self.room
        shape = room.shape
        assert shape is not None, "no tokens yet"
        batch, num_q_heads, q_len, _ = query.shape
        out = query.new_empty(batch, q_len, num_q_heads, shape[2])
        room.backend.attend(
            out.transpose(1, 2),
            query,
            room.for_reading[self.index],
            room.tokens_for(stop, q_len, fresh is not None),
            scoring,
            fresh,
            room.first_tokens(room.first_shown(stop - q_len)),
        )
        return room.checked(out) if room.preallocated else out

    def attend_on_device(self, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """The same over the blocks within a compiled graph."""
        return self.room.attend_on_device(query, scoring)

    @property
    def long_chunks(self) -> bool:
        """Whether a kernel serves long chunks over a past in blocks."""
        return self.room.long_chunks

    def note_dense_read(self) -> None:
        """Say once that another attention implementation reads a dequantized copy."""
        if self.room.newest_from_blocks:
            dense_read()

    def stored(self, *, values: bool) -> PagedView | None:
        """A lazy view of the stored keys or values, or ``None`` before the first token."""
        length, room = self.room.length, self.room
        if not length or room.batch_size is None:
            return None
        first = room.first_shown(length)
        views = room.blank_views(length - first)
        views[values].content = Content(self, first, length, self.epoch, None)
        return views[values]

    def take_back_step(self, content: Content) -> None:
        """Take back the step whose views have this content, if it is the newest: an exception has ended it."""
        sequences = self.room.sequences
        if content.epoch == self.epoch and content.stop == self.room.length:
            sequences.take_back()
            if sequences.beside_recurrent_states:
                sequences.broken = "a step"

    @property
    def first_tokens_nbytes(self) -> int:
        """Bytes of the tokens in full precision."""
        return self.room.first_tokens_nbytes
