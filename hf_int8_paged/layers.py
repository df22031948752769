"""The cache layers: transformers' ``CacheLayerMixin`` face over a pool, a block table and the kernels."""

from __future__ import annotations

import copy
import logging

import torch
from transformers.cache_utils import CacheLayerMixin

from .kernels import FLOAT_DTYPES, load_backend
from .layer_reader import LayerReader
from .once import say_once
from .pool import MIN_CENTER_TOKENS
from .prompts import is_same, same_prompts
from .sequences import Sequences, StepTensors
from .sink_places import first_rows
from .views import Content, PagedView


class PagedInt8Layer(LayerReader, CacheLayerMixin):
    """Keys and values of one attention layer, as paged int8.

    ``update`` quantizes and appends; it returns lazy views (`views.PagedView`) of the whole context. Where the
    tokens lie is the business of the cache's `Sequences`, shared by its layers.

    Args:
        index: the layer's index in the model.
        sequences: lengths and block tables of the cache.
        window: sliding window in tokens, or ``None`` for full attention.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, index: int, sequences: Sequences, window: int | None = None):
        LayerReader.__init__(self, index, sequences, sequences.add_group(window))
        sequences.layer_lengths[index] = 0
        self.is_initialized = False
        #: Whether the keys' centre is the mean of the current step's.
        self._centered_now = False

    # -- what transformers calls -----------------------------------------------------------------------------------

    @property
    def is_sliding(self) -> bool:
        return self.group.window is not None

    @property
    def length(self) -> int:
        """Tokens per sequence that this layer holds."""
        return self.sequences.layer_lengths[self.index]

    @property
    def batch_size(self) -> int:
        return self.sequences.batch_size or -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the layer's blocks for the heads, widths, dtype and device of its first keys and values."""
        if key_states.dtype not in FLOAT_DTYPES or value_states.dtype != key_states.dtype:
            raise ValueError(
                f"layer {self.index}: keys and values must both be float32, float16 or bfloat16, "
                f"got {key_states.dtype} and {value_states.dtype}"
            )
        self.sequences.pool.add_layer(self.index, self.group.name, key_states, value_states)
        self._dtype, self._device = key_states.dtype, key_states.device
        self._key_shape = (key_states.shape[1], key_states.shape[3])
        self._value_shape = (value_states.shape[1], value_states.shape[3])
        self._backend = load_backend(self.storage.backend)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return lazy views of all keys and values that attention may see.

        Stored keys and values carry no gradient; those that attention sees in full precision keep theirs.

        Args:
            key_states: ``[batch, num_kv_heads, new_tokens, head_dim]``, float32, float16 or bfloat16.
            value_states: ``[batch, num_kv_heads, new_tokens, v_head_dim]``.

        Returns:
            Views of keys and values, ``[batch, num_kv_heads, tokens, head_dim]``.

        Raises:
            ValueError: shape, dtype or device are not those of the layer's first keys and values.
            CacheFullError: a limit is reached. The cache is unchanged.
        """
        sequences, group = self.sequences, self.group
        batch, _, new_tokens, _ = key_states.shape
        if self.is_initialized:
            self._check(key_states, value_states)
        start = sequences.layer_lengths[self.index]
        stop = start + new_tokens
        if start == sequences.length:
            sequences.advance(batch, new_tokens, same_prompts(key_states) if start == 0 else None)
        elif start != sequences.step_start or stop != sequences.length or batch != sequences.batch_size:
            raise ValueError(
                f"layer {self.index} holds {start} tokens and got {new_tokens} more for {batch} sequences, while the "
                f"layers before it hold {sequences.length} for {sequences.batch_size}; was a forward pass interrupted? "
                "reset() the cache"
            )
        elif sequences.same_as is not None and not all(
            is_same(states, sequences.same_as) for states in (key_states, value_states)
        ):
            sequences.unshare()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._centered_now = False
        if start == 0 and group.holds_the_pool:
            self._centered_now = sequences.pool.center(self.index, key_states, sequences.prompt_tokens)
        if start == 0:
            self._keep_sink_tokens(key_states, value_states)
        elif start < sequences.padding + MIN_CENTER_TOKENS <= stop:
            self._center_late(key_states, start)
        learning = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if learning:
            say_once(
                logging.WARNING,
                "PagedInt8Cache stores keys and values without gradient, so nothing is learned through the cache; "
                "run generation under torch.no_grad().",
            )
        self._append(key_states, value_states, group.step_tensors(self._device, start))
        sequences.layer_lengths[self.index] = stop
        first = group.first_visible(start)
        keys, values = group.blank_views(batch, stop - first, self._key_shape, self._value_shape, key_states)
        fresh = None if sequences.from_blocks else (key_states, value_states)
        keys.content = values.content = Content(self, first, stop, group.epoch, fresh)
        if learning and fresh is not None:
            return keys.dense(), values.dense()  # autograd does not look into views
        return keys, values

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        if self.group.window is not None:
            return self.group.window
        return -1 if self.sequences.max_cache_len is None else self.sequences.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the mask covers, and the position of the first."""
        first = self.group.first_visible(self.length)
        return self.length + query_length - first, first

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """A lazy view of the stored keys, or ``None`` before the first token."""
        return self._stored(values=False)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """A lazy view of the stored values, or ``None`` before the first token."""
        return self._stored(values=True)

    @property
    def record_past(self) -> bool:
        return self.sequences.record_past

    def reset(self) -> None:
        raise NotImplementedError("layers share their block table; call reset() of the cache")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise NotImplementedError("layers share their block table; call reorder_cache() of the cache")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("layers share their block table; call crop() of the cache")

    def prefetch(self) -> None:
        raise NotImplementedError("prefetch is not supported by PagedInt8Cache: the blocks stay on their device")

    def offload(self) -> None:
        raise NotImplementedError("offload is not supported by PagedInt8Cache: the blocks stay on their device")

    def fork(self, sequences: Sequences) -> PagedInt8Layer:
        """This layer for another cache over the same pool, whose `sequences` were forked from this cache's."""
        twin = copy.copy(self)
        twin.sequences = sequences
        twin.group = sequences.groups[self.group.name]
        return twin

    def note_padding(self, tokens: torch.Tensor, fresh: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Make nothing of padding: give back blocks of all layers that hold nothing else; of a first prompt, keep first
        tokens that are tokens, and centre the keys on the mean of tokens.

        Args:
            tokens: bool ``[batch, tokens]``, False for padding.
            fresh: keys and values of the newest tokens, if they are at hand.
        """
        if not self.sequences.drop_padding(tokens) or fresh is None:
            return
        self._keep_sink_tokens(*fresh)
        if self._centered_now and self.sequences.pool.center(
            self.index, fresh[0], self.sequences.prompt_tokens, again=True
        ):
            self._append(*fresh, self.group.step_tensors(self._device, 0))

    # -- internals -------------------------------------------------------------------------------------------------

    def _center_late(self, key_states: torch.Tensor, start: int) -> None:
        """Centre the keys on the mean of the tokens so far, which were too few until now, and store those once more."""
        pool, window, sinks = self.sequences.pool, self.group.window, self.sequences.sinks
        all_held = self.group.holds_the_pool and (window is None or window >= MIN_CENTER_TOKENS)
        if not all_held or not pool.lacks_center(self.index):
            return
        keys, values = self.gather(0, start, torch.float32)
        together = torch.cat([keys, key_states.detach().float()], dim=2)
        first = torch.zeros(len(together), 1) if sinks is None else torch.from_numpy(sinks.first)[:, None]
        if pool.center(self.index, together, torch.arange(together.shape[2]) >= first):
            step = self.group.step_tensors(self._device, start)
            self._append(keys, values, step._replace(lens_before=torch.zeros_like(step.lens_before)))

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor, step: StepTensors) -> None:
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        block_table, lens = step.block_table, step.lens_before
        if self.sequences.same_as is not None:
            first = sorted(set(self.sequences.same_as))
            key_states, value_states, block_table, lens = (
                x[first] for x in (key_states, value_states, block_table, lens)
            )
        self._backend.append(key_states, value_states, self.storage, block_table, lens)

    def _keep_sink_tokens(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        places = self.sequences.sinks
        if places is None:
            return
        first = places.on(key_states.device)[1] if places.first.any() else None
        count = min(self.sequences.sink_tokens, key_states.shape[2])
        self._sink_rows = first_rows(key_states, first, count), first_rows(value_states, first, count)
        self._sink_tokens = None

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        heads, head_dim = self._key_shape
        v_heads, v_head_dim = self._value_shape
        batch, new_tokens = key_states.shape[0], key_states.shape[2]
        if key_states.shape != (batch, heads, new_tokens, head_dim) or value_states.shape != (
            batch,
            v_heads,
            new_tokens,
            v_head_dim,
        ):
            raise ValueError(
                f"layer {self.index} holds {heads} KV heads of width {head_dim} (values {v_head_dim}), but keys "
                f"{list(key_states.shape)} and values {list(value_states.shape)} came; is this another model's cache?"
            )
        if key_states.dtype != self._dtype or value_states.dtype != self._dtype or key_states.device != self._device:
            raise ValueError(
                f"layer {self.index} holds {self._dtype} on {self._device}, but keys came as {key_states.dtype} on "
                f"{key_states.device} and values as {value_states.dtype}; use one cache per dtype and device"
            )

    def _stored(self, *, values: bool) -> torch.Tensor | None:
        if not self.length or self.sequences.batch_size is None:
            return None
        heads, dim = self._value_shape if values else self._key_shape
        first = self.group.first_visible(self.length)
        shape = (self.sequences.batch_size, heads, self.length - first, dim)
        view = PagedView.blank(shape, self._dtype, self._device, is_values=values)
        view.content = Content(self, first, self.length, self.epoch, None)
        return view
