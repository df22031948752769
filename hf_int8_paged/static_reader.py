"""How views and the attention function read a preallocated layer, and what it tells of its memory."""

from __future__ import annotations

import torch

from .kernels import KvCacheQuant, Scoring
from .once import dense_read
from .static_memory import StaticMemory
from .static_sequences import StaticSequences
from .views import Content, PagedView

_NO_ASSIGNMENT = (
    "a preallocated layer does not take keys or values by assignment; a cache that grows does, without max_batch_size"
)


class StaticReader:
    """The reading half of `PagedInt8StaticLayer`, which sets these attributes."""

    sequences: StaticSequences
    max_cache_len: int
    window: int | None
    memory: StaticMemory | None
    dtypes: tuple[torch.dtype, torch.dtype]
    length: int
    epoch: int

    @property
    def keys(self) -> torch.Tensor | None:
        """A lazy view of the stored keys, ``[batch, num_kv_heads, max_cache_len, head_dim]``; ``None`` before the first
        token."""
        return self._stored(values=False)

    @keys.setter
    def keys(self, dense: torch.Tensor) -> None:
        raise NotImplementedError(_NO_ASSIGNMENT)

    @property
    def values(self) -> torch.Tensor | None:
        """A lazy view of the stored values, ``[batch, num_kv_heads, max_cache_len, v_head_dim]``; ``None`` before the
        first token."""
        return self._stored(values=True)

    @values.setter
    def values(self, dense: torch.Tensor) -> None:
        raise NotImplementedError(_NO_ASSIGNMENT)

    @property
    def storage(self) -> KvCacheQuant:
        return self._memory.storage

    @property
    def dtype(self) -> torch.dtype:
        """Of the newest keys; unknown before the first ones."""
        self._allocated("dtype")
        return self.dtypes[0]

    @property
    def device(self) -> torch.device:
        """Where the blocks are; unknown before the first keys."""
        return self._allocated("device").shape.device

    @property
    def sliding_window(self) -> int:
        """The window in tokens; layers without one have no such attribute."""
        if self.window is None:
            raise AttributeError("sliding_window")
        return self.window

    @property
    def max_batch_size(self) -> int:
        return self.sequences.max_batch_size

    @property
    def batch_size(self) -> int:
        """Sequences that hold tokens, -1 without any."""
        return self.sequences.batch_size or -1

    @property
    def cumulative_length(self) -> torch.Tensor:
        """Tokens per sequence, on the layer's device."""
        return self._allocated("cumulative_length").length

    @property
    def cumulative_length_int(self) -> int:
        """``cumulative_length`` on the host, which waits for the device; layers without a window do not have it."""
        if self.window is None:
            raise AttributeError("cumulative_length_int")
        return 0 if self.memory is None else int(self.memory.length)

    @property
    def num_heads(self) -> int:
        """KV heads; unknown before the first keys."""
        return self._allocated("num_heads").shape.num_kv_heads

    @property
    def k_head_dim(self) -> int:
        """Width of a key; unknown before the first ones."""
        return self._allocated("k_head_dim").shape.head_dim

    @property
    def v_head_dim(self) -> int:
        """Width of a value; unknown before the first ones."""
        return self._allocated("v_head_dim").shape.v_head_dim

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks that hold tokens."""
        self.sequences.count_again()
        memory = self._memory
        tokens = min(-(-self.length // memory.storage.block_size) * memory.storage.block_size, memory.capacity)
        return (self.sequences.batch_size or 0) * tokens * memory.storage.bytes_per_token

    @property
    def sink_nbytes(self) -> int:
        """Bytes of the tokens in full precision."""
        return 0 if self.memory is None else self.memory.sink_nbytes

    def gather(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys and values of positions ``start`` to ``stop``, ``[batch, num_kv_heads, stop - start, dim]``."""
        assert self.sequences.batch_size is not None
        keys, values = self._memory.gather(self.sequences.batch_size, start, stop, dtype)
        return keys, values if self.sequences.known else torch.where(self._memory.fits, values, torch.nan)

    #: Long chunks read a dense copy of the past.
    long_chunks = False

    def attend(
        self,
        query: torch.Tensor,
        scoring: Scoring,
        stop: int,
        fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of the newest rows straight from the blocks; see `PagedInt8Layer.attend`. NaN after a step that
        only the device counted and that did not fit."""
        assert scoring.key_mask_start == 0
        assert fresh is None
        out = self._memory.attend(query, scoring)
        if torch.compiler.is_compiling() or not self.sequences.known:
            return torch.where(self._memory.fits, out, torch.nan)
        return out

    def rows_that_see(self, tokens: int) -> torch.Tensor:
        """The causal mask of the newest tokens over all positions, with the layer's window, made of the length on the
        device: bool ``[1, 1, tokens, max_cache_len]``."""
        length = self._memory.length
        row = (length - tokens + torch.arange(tokens, device=length.device))[:, None]
        column = torch.arange(self.max_cache_len, device=length.device)
        mask = column <= row
        if self.window is not None:
            mask &= column > row - self.window
        return mask[None, None]

    def note_dense_read(self) -> None:
        """Say once that another attention implementation reads a dequantized copy."""
        dense_read()

    @property
    def _memory(self) -> StaticMemory:
        assert self.memory is not None
        return self.memory

    def _allocated(self, name: str) -> StaticMemory:
        """The memory, which the attribute ``name`` is a fact of: without it there is no such attribute yet."""
        if self.memory is None:
            raise AttributeError(f"{name} is unknown before the first keys")
        return self.memory

    def _views(self, stop: int, fresh: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of all positions, those from ``stop`` on without a token."""
        return self._view(stop, fresh, values=False), self._view(stop, fresh, values=True)

    def _view(self, stop: int, fresh: tuple[torch.Tensor, torch.Tensor] | None, *, values: bool) -> PagedView:
        heads, head_dim, v_head_dim, device = self._memory.shape
        batch = self.sequences.batch_size
        assert batch is not None
        shape = (batch, heads, self.max_cache_len, v_head_dim if values else head_dim)
        view = PagedView.blank(shape, self.dtypes[values], device, is_values=values)
        view.content = Content(self, 0, stop, self.epoch, fresh)
        return view

    def _stored(self, *, values: bool) -> torch.Tensor | None:
        self.sequences.count_again()
        if not self.length or self.sequences.batch_size is None:
            return None
        return self._view(self.max_cache_len, None, values=values)
