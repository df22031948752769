"""The reading side of a cache layer: what views and the attention function ask of its blocks."""

from __future__ import annotations

from dataclasses import replace

import torch

from .kernels import Backend, FirstTokens, KvCacheQuant, Scoring
from .layer_checks import of_one_dtype
from .layer_group import Group
from .once import dense_read
from .sequences import Sequences
from .sink_places import SinkPlaces, first_rows


class LayerReader:
    """Attention over a layer's stored tokens, and their dense copies.

    Args:
        index: the layer's index in the model.
        sequences: lengths and block tables of the cache.
        group: the layer's own block table and window.
    """

    # Set when the layer's blocks are allocated; shapes are heads and width.
    #: What concatenated keys, and values, would have.
    _dtypes: tuple[torch.dtype, ...]
    _device: torch.device
    _backend: Backend
    _backend_name: str
    _key_shape: tuple[int, int]
    _value_shape: tuple[int, int]

    def __init__(self, index: int, sequences: Sequences, group: Group):
        self.index = index
        self.sequences = sequences
        self.group = group
        #: Keys and values of the sequences' first tokens, never written to: forks share them.
        self._first_rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self._first_tokens: tuple[SinkPlaces, FirstTokens] | None = None

    @property
    def storage(self) -> KvCacheQuant:
        """The layer's blocks."""
        storage = self.sequences.pool.storage(self.index)
        assert storage is not None, "no tokens yet"
        return storage

    @property
    def epoch(self) -> int:
        return self.group.epoch

    @property
    def window(self) -> int | None:
        """Sliding window in tokens, or ``None`` for full attention."""
        return self.group.window

    def gather(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys and values of positions ``start`` to ``stop``, ``[batch, num_kv_heads, stop - start, dim]``."""
        tokens = self.group.tokens(self._device, self.sequences.step_start)
        keys, values = self._backend.gather(self.storage, tokens, start, stop, dtype)
        first_tokens = self.first_tokens(start)
        return (keys, values) if first_tokens is None else first_tokens.put_both(keys, values, start)

    def first_tokens(self, first_visible: int) -> FirstTokens | None:
        """The first tokens in full precision, or ``None`` if all stand before position ``first_visible``."""
        places = self.sequences.sinks
        if places is None or first_visible >= places.limit or self._first_rows is None:
            return None
        if self._first_tokens is None or self._first_tokens[0] is not places:
            self._first_tokens = places, FirstTokens(*self._first_rows, *places.on(self._device), places.limit)
        return self._first_tokens[1]

    def _keep_first_tokens(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Keep the first of a prompt's tokens in full precision, as many as the cache was asked for."""
        places = self.sequences.sinks
        if places is None:
            return
        first = places.on(key_states.device)[1] if places.first.any() else None
        count = min(self.sequences.sink_tokens, key_states.shape[2])
        rows = of_one_dtype(key_states, value_states)
        self._first_rows = first_rows(rows[0], first, count), first_rows(rows[1], first, count)
        self._first_tokens = None

    @property
    def sink_nbytes(self) -> int:
        """Bytes of the tokens in full precision."""
        return sum(x.nbytes for x in self._first_rows or ())

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
            ``[batch, q_len, num_q_heads, v_head_dim]``, contiguous.
        """
        batch, num_q_heads, q_len, _ = query.shape
        sequences, group = self.sequences, self.group
        start, tokens = stop - q_len, group.tokens(self._device, sequences.step_start)
        if stop != sequences.length or (fresh is not None and start != sequences.step_start):
            lens = torch.full_like(tokens.context_lens, stop)
            tokens = replace(tokens, context_lens=lens, context_lens_before=lens - q_len)
        out = query.new_empty(batch, q_len, num_q_heads, self._value_shape[1])
        self._backend.attend(
            out.transpose(1, 2),
            query,
            self.storage,
            tokens,
            scoring,
            fresh,
            self.first_tokens(group.first_visible(start)),
        )
        return out

    @property
    def long_chunks(self) -> bool:
        """Whether the backend has a kernel for long chunks over a past in blocks."""
        return self._backend.LONG_CHUNKS

    def note_dense_read(self) -> None:
        """Say once that another attention implementation reads a dequantized copy."""
        if self.sequences.from_blocks:
            dense_read()
