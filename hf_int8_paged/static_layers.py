"""Cache layers with everything preallocated, so that decoding compiles: no host bookkeeping per step.

Lengths live in device tensors. The block table never changes: sequence b owns blocks ``b * columns`` and following. A
sliding window is a ring: its table repeats the same few blocks, so new tokens overwrite those that fell out.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import CacheLayerMixin

from . import compiled_ops
from .kernels import FLOAT_DTYPES, MAX_DECODE_ROWS, KvCacheQuant, alloc_paged_int8_layer, load_backend, mean_key
from .once import dense_read
from .pool import MIN_CENTER_TOKENS, CacheFullError
from .static_sinks import StaticSinks
from .views import Content, PagedView, hand_over


class PagedInt8StaticLayer(CacheLayerMixin):
    """Paged int8 keys and values of one attention layer, preallocated.

    Args:
        index: the layer's index in the model.
        max_batch_size: most sequences.
        max_cache_len: most tokens per sequence.
        window: sliding window in tokens, or ``None`` for full attention.
        block_size: tokens per block.
        backend: name of the kernel backend, or ``None`` for the best one of the keys' device.
        rotation: ``"hadamard"`` or ``None``.
        center_keys: whether the mean of the first prompt is subtracted from the keys.
        sink_tokens: first tokens of a sequence that are kept in full precision.
    """

    is_compileable = True
    is_croppable = True

    # Set by lazy_initialization.
    storage: KvCacheQuant
    cumulative_length: torch.Tensor  # type: ignore[assignment]
    _dtype: torch.dtype
    _lens: torch.Tensor
    _table: torch.Tensor
    _sinks: StaticSinks | None = None

    def __init__(
        self,
        index: int,
        max_batch_size: int,
        max_cache_len: int,
        window: int | None = None,
        block_size: int = 16,
        backend: str | None = None,
        rotation: str | None = "hadamard",
        center_keys: bool = True,
        sink_tokens: int = 1,
    ):
        self.index = index
        self.max_batch_size = max_batch_size
        self.max_cache_len = max_cache_len
        self.window = window
        self.block_size = block_size
        self.backend = backend
        self.rotation = rotation
        self.center_keys = center_keys
        self.sink_tokens = sink_tokens
        self.is_sliding = window is not None
        self.is_initialized = False
        self.batch_size = -1
        #: Views made before tokens were moved are no longer valid.
        self.epoch = 0
        #: Whether nothing was stored since the last reset, as far as the host knows; whether the last step was first.
        self._may_be_empty, self._in_first_step = True, False
        #: Whether the keys' centre is the mean of the last step's.
        self._centered_now = False

    # -- what transformers calls -----------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the layer for the heads, widths, dtype and device of its first keys and values."""
        if key_states.dtype not in FLOAT_DTYPES or value_states.dtype != key_states.dtype:
            raise ValueError(
                f"layer {self.index}: keys and values must both be float32, float16 or bfloat16, "
                f"got {key_states.dtype} and {value_states.dtype}"
            )
        device, batch = key_states.device, key_states.shape[0]
        columns = -(-self.max_cache_len // self.block_size)
        # A window of W tokens and the token being written touch at most W / block_size + 2 blocks.
        blocks = columns if self.window is None else min(columns, -(-self.window // self.block_size) + 2)
        self.storage = alloc_paged_int8_layer(
            self.max_batch_size * blocks,
            self.block_size,
            key_states.shape[1],
            key_states.shape[3],
            v_head_dim=value_states.shape[3],
            device=device,
            backend=self.backend,
            rotation=self.rotation,
            center_keys=self.center_keys,
        )
        # Positions of a window that were never written are masked, not skipped, by other attention implementations.
        self.storage.k_scales.zero_()
        self.storage.v_scales.zero_()
        ring = torch.arange(columns, dtype=torch.int32) % blocks
        first = torch.arange(batch, dtype=torch.int32)[:, None] * blocks
        self._table = (first + ring).to(device)
        self._lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.cumulative_length = torch.zeros((), dtype=torch.long, device=device)
        self._dtype, self.batch_size, self._blocks = key_states.dtype, batch, blocks
        tensors = [*self._tensors[:4], self._table, self._lens, self.cumulative_length]
        if self.sink_tokens:
            self._sinks = StaticSinks(key_states, value_states, self.sink_tokens, self.max_cache_len)
            tensors += self._sinks.tensors
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return all keys and values that attention may see, lazily.

        Args:
            key_states: ``[batch, num_kv_heads, new_tokens, head_dim]``.
            value_states: ``[batch, num_kv_heads, new_tokens, v_head_dim]``.

        Returns:
            For a single token keys and values of ``max_cache_len`` positions, the unused ones 0; for several tokens
            those of the context.

        Raises:
            ValueError: another batch size than that of the first keys.
            CacheFullError: a prompt longer than what is left of ``max_cache_len``.
        """
        if torch.compiler.is_compiling():
            return self._update_compiled(key_states, value_states)
        if not self.is_initialized:
            if key_states.shape[0] > self.max_batch_size:
                raise ValueError(
                    f"keys of {key_states.shape[0]} sequences came, but max_batch_size is {self.max_batch_size}"
                )
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"the cache holds {self.batch_size} sequences, but keys of {key_states.shape[0]} came; "
                "use one cache per batch size"
            )
        new_tokens = key_states.shape[2]
        if new_tokens == 1:
            self._begin_step(key_states, value_states)
            self._append(key_states, value_states, self._lens)
            self._advance(1)
            return self._views(key_states, value_states, self.max_cache_len, fresh=False)
        start = int(self.cumulative_length)
        stop = start + new_tokens
        if stop > self.max_cache_len:
            raise CacheFullError(
                f"{stop} tokens per sequence asked for, but max_cache_len is {self.max_cache_len}; the cache still "
                f"holds {start}; shorten the prompt or make a longer cache"
            )
        self._begin_step(key_states, value_states)
        fresh = start == 0 or new_tokens > MAX_DECODE_ROWS
        if start == 0 and self.storage.key_center is not None and new_tokens >= MIN_CENTER_TOKENS:
            self.storage.key_center.copy_(mean_key(key_states))
            self._centered_now = True
        past = self._past(start) if fresh and start else None
        self._append_what_is_kept(key_states, value_states, self._lens)
        self._advance(new_tokens)
        if past is not None:
            # In a ring the chunk has overwritten what its first rows still see.
            return torch.cat([past[0], key_states], dim=2), torch.cat([past[1], value_states], dim=2)
        return self._views(key_states, value_states, stop, fresh)

    def get_seq_length(self) -> torch.Tensor | int:  # type: ignore[override]
        """Tokens per sequence, as a tensor on the layer's device: reading it on the host would wait for the device."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the mask covers, and the position of the first."""
        if query_length == 1:
            return self.max_cache_len, 0
        return (int(self.cumulative_length) if self.is_initialized else 0) + query_length, 0

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """A lazy view of the stored keys, or ``None`` before the first token."""
        return self._views(*self._empty(), self.max_cache_len, fresh=False)[0] if self.is_initialized else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """A lazy view of the stored values, or ``None`` before the first token."""
        return self._views(*self._empty(), self.max_cache_len, fresh=False)[1] if self.is_initialized else None

    def reset(self) -> None:
        if self.is_initialized:
            self._set_length(0)

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what `crop` would raise. The cache asks all layers before it crops the first."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if not self.is_initialized or not tokens_to_remove:
            return
        if self.window is not None and int(self.cumulative_length) > self._blocks * self.block_size:
            raise RuntimeError("a preallocated sliding window cannot go back: what fell out is overwritten")

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        if self.is_initialized and tokens_to_remove:
            self._set_length(max(int(self.cumulative_length) + tokens_to_remove, 0))

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys; unknown before the first ones."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where the blocks are; unknown before the first keys."""
        return self.storage.device

    @property
    def sliding_window(self) -> int:
        """The window in tokens; layers without one have no such attribute."""
        if self.window is None:
            raise AttributeError("sliding_window")
        return self.window

    @property
    def cumulative_length_int(self) -> int:
        """``cumulative_length`` on the host, which waits for the device; layers without a window do not have it."""
        if self.window is None:
            raise AttributeError("cumulative_length_int")
        return int(self.cumulative_length) if self.is_initialized else 0

    @property
    def num_heads(self) -> int:
        """KV heads; unknown before the first keys."""
        return self.storage.num_kv_heads

    @property
    def k_head_dim(self) -> int:
        """Width of a key; unknown before the first ones."""
        return self.storage.head_dim

    @property
    def v_head_dim(self) -> int:
        """Width of a value; unknown before the first ones."""
        return self.storage.v_head_dim

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Copy blocks so that sequence i is what sequence ``beam_idx[i]`` was."""
        if self.is_initialized:
            for tensor in self._tensors[:4]:
                rows = tensor.unflatten(1, (self.max_batch_size, self._blocks))
                rows[:, : self.batch_size] = rows[:, beam_idx.to(tensor.device)]
            if self._sinks is not None:
                self._sinks.select(beam_idx)
            self.epoch += 1

    def offload(self) -> None:
        raise NotImplementedError("offload is not supported by PagedInt8Cache: the blocks stay on their device")

    def prefetch(self) -> None:
        raise NotImplementedError("prefetch is not supported by PagedInt8Cache: the blocks stay on their device")

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks that hold tokens."""
        blocks = min(-(-int(self.cumulative_length) // self.block_size), self._blocks)
        return self.batch_size * blocks * self.block_size * self.storage.bytes_per_token

    # -- what views and the attention function call ----------------------------------------------------------------

    def gather(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys and values of positions ``start`` to ``stop``, ``[batch, num_kv_heads, stop - start, dim]``."""
        keys, values = load_backend(self.storage.backend).gather(
            self.storage, self._table, self._lens, start, stop, dtype
        )
        return (keys, values) if self._sinks is None else self._sinks.tokens().put_both(keys, values, start)

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
        """Attention of the newest rows straight from the blocks; see `PagedInt8Layer.decode`."""
        assert key_mask_start == 0
        return compiled_ops.decode(
            query, *self._tensors, self._table, self._lens, key_mask, sinks, *self._sink_tensors, scale, self.window,
            softcap, *self._names,
        )  # fmt: skip

    def note_padding(self, tokens: torch.Tensor, fresh: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Make nothing of padding in the first prompt; see `PagedInt8Layer.note_padding`. Preallocated blocks stay."""
        if not self._in_first_step or fresh is None:
            return
        keys, values = fresh
        tokens = tokens[:, : keys.shape[2]]
        if self._sinks is not None:
            first = tokens.int().argmax(dim=1).to(torch.int32)
            self._sinks.keep(keys, values, first, self.cumulative_length == keys.shape[2])
        if self._centered_now and self.storage.key_center is not None:
            enough = tokens.sum(dim=1).max() >= MIN_CENTER_TOKENS
            self.storage.key_center.copy_(torch.where(enough, mean_key(keys, tokens), 0.0))
            self._append_what_is_kept(keys, values, torch.zeros_like(self._lens))

    def note_dense_read(self) -> None:
        """Say once that another attention implementation reads a dequantized copy."""
        dense_read()

    # -- internals -------------------------------------------------------------------------------------------------

    @property
    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        s = self.storage
        return s.k, s.v, s.k_scales, s.v_scales, s.key_center

    @property
    def _names(self) -> tuple[str, str, str | None]:
        return self.storage.backend, self.storage.tile_order, self.storage.rotation

    @property
    def _sink_tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, int]:
        keys, values, places = (None, None, None) if self._sinks is None else self._sinks.tensors
        return keys, values, places, self.max_cache_len

    @property
    def sink_nbytes(self) -> int:
        """Bytes of the tokens in full precision."""
        return 0 if self._sinks is None else self._sinks.nbytes

    def _begin_step(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep first tokens, if this is the first step. Call it once nothing can be refused any more."""
        self._in_first_step, self._may_be_empty, self._centered_now = self._may_be_empty, False, False
        if self._in_first_step and self._sinks is not None:
            self._sinks.keep(keys, values, None, self.cumulative_length == 0)

    def _append_what_is_kept(self, keys: torch.Tensor, values: torch.Tensor, lens_before: torch.Tensor) -> None:
        """Append a prompt or a chunk, but for what has left the window at its end."""
        skipped = 0 if self.window is None else max(keys.shape[2] - self.window, 0)
        self._append(keys[:, :, skipped:], values[:, :, skipped:], lens_before + skipped)

    def _append(self, keys: torch.Tensor, values: torch.Tensor, lens_before: torch.Tensor) -> None:
        compiled_ops.append(keys.detach(), values.detach(), *self._tensors, self._table, lens_before, *self._names)

    def _advance(self, new_tokens: int) -> None:
        self._lens.add_(new_tokens)
        self.cumulative_length.add_(new_tokens)

    def _set_length(self, length: int) -> None:
        self._lens.fill_(length)
        self.cumulative_length.fill_(length)
        if self._sinks is not None:
            self._sinks.truncate(length)
        self._may_be_empty = not length
        self.epoch += 1

    def _update_compiled(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._append(key_states, value_states, self._lens)
        self._advance(key_states.shape[2])
        keys, values = compiled_ops.gather_dense(
            *self._tensors,
            self._table,
            self._lens,
            *self._sink_tensors,
            self.max_cache_len,
            key_states.dtype,
            *self._names,
        )
        hand_over(self, keys, values)
        return keys, values

    def _past(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gather(0, length, self._dtype)

    def _empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.storage
        like = {"dtype": self._dtype, "device": s.device}
        shape = (self.batch_size, s.num_kv_heads, 0)
        return torch.empty(*shape, s.head_dim, **like), torch.empty(*shape, s.v_head_dim, **like)

    def _views(
        self, key_states: torch.Tensor, value_states: torch.Tensor, stop: int, fresh: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, _, head_dim = key_states.shape
        like = (key_states.dtype, key_states.device)
        keys = PagedView.blank((batch, heads, stop, head_dim), *like, is_values=False)
        values = PagedView.blank((batch, heads, stop, value_states.shape[3]), *like, is_values=True)
        recent = (key_states, value_states) if fresh else None
        keys.content = values.content = Content(self, 0, stop, self.epoch, recent)
        return keys, values
