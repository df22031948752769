"""The reading side of a cache layer: what views and the attention function ask of its blocks."""

from __future__ import annotations

from types import ModuleType

import torch

from .kernels import FirstTokens, KvCacheQuant
from .layer_group import Group
from .once import dense_read
from .sequences import Sequences
from .sink_places import SinkPlaces


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
    _backend: ModuleType
    _backend_name: str
    _key_shape: tuple[int, int]
    _value_shape: tuple[int, int]

    def __init__(self, index: int, sequences: Sequences, group: Group):
        self.index = index
        self.sequences = sequences
        self.group = group
        #: Keys and values of the sequences' first tokens, never written to: forks share them.
        self._sink_rows: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sink_tokens: tuple[SinkPlaces, FirstTokens] | None = None

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
        step = self.group.step_tensors(self._device, self.sequences.step_start)
        keys, values = self._backend.gather(self.storage, step.block_table, step.lens, start, stop, dtype)
        sink_tokens = self.sink_tokens(start)
        return (keys, values) if sink_tokens is None else sink_tokens.put_both(keys, values, start)

    def sink_tokens(self, first_visible: int) -> FirstTokens | None:
        """The first tokens in full precision, or ``None`` if all stand before position ``first_visible``."""
        places = self.sequences.sinks
        if places is None or first_visible >= places.limit or self._sink_rows is None:
            return None
        if self._sink_tokens is None or self._sink_tokens[0] is not places:
            self._sink_tokens = places, FirstTokens(*self._sink_rows, *places.on(self._device), places.limit)
        return self._sink_tokens[1]

    @property
    def sink_nbytes(self) -> int:
        """Bytes of the tokens in full precision."""
        return sum(x.nbytes for x in self._sink_rows or ())

    def decode(
        self,
        query: torch.Tensor,
        scale: float,
        stop: int,
        key_mask: torch.Tensor | None,
        key_mask_start: int,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the newest rows straight from the blocks.

        Args:
            query: ``[batch, num_q_heads, q_len, head_dim]``, at positions ``stop - q_len`` to ``stop``.
            scale: factor on q.k.
            stop: tokens in the context, the query's own included.
            key_mask: bool ``[batch, columns]`` or ``None``, as in ``int8_paged_decode_attention``.
            key_mask_start: position of the mask's first column.
            softcap: bound on the scores, or ``None``.
            sinks: ``[num_q_heads]`` or ``None``.

        Returns:
            ``[batch, q_len, num_q_heads, v_head_dim]``, contiguous.
        """
        batch, num_q_heads, q_len, _ = query.shape
        step = self.group.step_tensors(self._device, self.sequences.step_start)
        lens = step.lens if stop == self.sequences.length else torch.full_like(step.lens, stop)
        out = query.new_empty(batch, q_len, num_q_heads, self._value_shape[1])
        self._backend.decode(
            out.transpose(1, 2),
            query,
            self.storage,
            step.block_table,
            lens,
            scale,
            None,
            key_mask,
            key_mask_start,
            self.group.window,
            softcap,
            sinks,
            self.sink_tokens(self.group.first_visible(stop - q_len)),
        )
        return out

    @property
    def extends(self) -> bool:
        """Whether the backend has a kernel for long chunks over a past in blocks."""
        return hasattr(self._backend, "extend")

    def extend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        stop: int,
        key_mask: torch.Tensor | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of a chunk over the past in the blocks, and causally over itself in full precision.

        Args:
            query: ``[batch, num_q_heads, chunk, head_dim]``, at positions ``stop - chunk`` to ``stop``.
            keys: the chunk's own, ``[batch, num_kv_heads, chunk, head_dim]``.
            values: ``[batch, num_kv_heads, chunk, v_head_dim]``.

        The others are those of `decode`; the key mask starts at position 0. Returns
        ``[batch, chunk, num_q_heads, v_head_dim]``, contiguous.
        """
        batch, num_q_heads, chunk, _ = query.shape
        step = self.group.step_tensors(self._device, self.sequences.step_start)
        past = stop - chunk
        lens = step.lens_before if past == self.sequences.step_start else torch.full_like(step.lens_before, past)
        out = query.new_empty(batch, chunk, num_q_heads, self._value_shape[1])
        self._backend.extend(
            out.transpose(1, 2), query, keys, values, self.storage, step.block_table, lens, scale,
            None, key_mask, self.group.window, softcap, sinks, self.sink_tokens(self.group.first_visible(past)),
        )  # fmt: skip
        return out

    def note_dense_read(self) -> None:
        """Say once that another attention implementation reads a dequantized copy."""
        if self.sequences.from_blocks:
            dense_read()
