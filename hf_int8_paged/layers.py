"""The cache layers: transformers' ``CacheLayerMixin`` face over a pool, a block table and the kernels."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from .assignment import assign
from .kernels import Tokens, load_backend
from .layer_checks import check_first_states, check_states, dense_dtypes, of_one_dtype, way_back
from .layer_reader import LayerReader
from .once import say_once
from .pool import MIN_CENTER_TOKENS
from .prompts import is_same, same_prompts
from .sequences import Sequences
from .views import Content, PagedView
from .whole_cache import OfTheWholeCache


class PagedInt8Layer(OfTheWholeCache, LayerReader, CacheLayerMixin):
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
        sequences.books.state.layer_lengths[index] = 0
        self.is_initialized = False
        #: Whether the keys' centre is the mean of the first prompt's, as long as its step lasts.
        self._centered_now = False

    # -- what transformers calls -----------------------------------------------------------------------------------

    @property
    def is_sliding(self) -> bool:
        return self.group.window is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys; unknown before the first ones."""
        return self._dtypes[0]

    @property
    def device(self) -> torch.device:
        """Where the blocks are; unknown before the first keys."""
        return self._device

    @property
    def sliding_window(self) -> int:
        """The window in tokens; layers without one have no such attribute, as in transformers."""
        if self.group.window is None:
            raise AttributeError("sliding_window")
        return self.group.window

    @property
    def cumulative_length(self) -> int:  # type: ignore[override]
        """Tokens per sequence that a layer with a window has seen; others have no such attribute."""
        if self.group.window is None:
            raise AttributeError("cumulative_length")
        return self.length

    @property
    def length(self) -> int:
        """Tokens per sequence that this layer holds."""
        return self.sequences.books.state.layer_lengths[self.index]

    @property
    def batch_size(self) -> int:
        return self.sequences.batch_size or -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the layer's blocks for the heads, widths and device of its first keys and values."""
        self.sequences.pool.add_layer(
            self.index, self.group.name, key_states, value_states, lambda: self.group.holds_the_pool
        )
        self._dtypes, self._device = dense_dtypes(key_states.dtype, value_states.dtype), key_states.device
        self._key_shape = (key_states.shape[1], key_states.shape[3])
        self._value_shape = (value_states.shape[1], value_states.shape[3])
        if not self.is_initialized or self._backend_name != self.storage.backend:
            name = self.storage.backend
            self._backend, self._backend_name = load_backend(name), name
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return lazy views of all keys and values that attention may see.

        Stored keys and values carry no gradient; those that attention sees in full precision keep theirs.

        Args:
            key_states: ``[batch, num_kv_heads, new_tokens, head_dim]``, float32, float16 or bfloat16.
            value_states: ``[batch, num_kv_heads, new_tokens, v_head_dim]``, of any of these dtypes. Under autocast they
                may differ from the keys', and from step to step.

        Returns:
            Views of keys and values, ``[batch, num_kv_heads, tokens, head_dim]``, in the dtype that their
            concatenation would have.

        Raises:
            ValueError: shape or device are not those of the layer's first keys and values.
            CacheFullError: a limit is reached. The cache is unchanged.
        """
        sequences, group = self.sequences, self.group
        state = sequences.books.state
        # What goes before this line changes nothing, and what goes after it is undone if an exception ends it.
        start = sequences.guard.inside["start"] = state.layer_lengths[self.index]
        if start == 0:
            check_first_states(self.index, key_states, value_states)
        else:
            check_states(self.index, key_states, value_states, self._key_shape, self._value_shape, self._device)
        batch, _, new_tokens, _ = key_states.shape
        stop = start + new_tokens
        if start == state.length:
            state = sequences.advance(batch, new_tokens, same_prompts(key_states) if start == 0 else None)
        elif start != state.step_start or stop != state.length or batch != state.batch_size:
            raise ValueError(
                f"layer {self.index} holds {start} tokens and got {new_tokens} more for {batch} sequences, while the "
                f"layers before it hold {state.length} for {state.batch_size}; if a forward pass was "
                f"interrupted, {way_back(state.step_start, state.length)}"
            )
        elif state.same_as is not None and not all(
            is_same(states, state.same_as) for states in (key_states, value_states)
        ):
            state = sequences.unshare()
        if start == 0:
            self.lazy_initialization(key_states, value_states)
            state.centrings[self.index] = sequences.pool.before_centring(self.index, group.name)
            self._centered_now = self._center(key_states, state.prompt_tokens)
            self._keep_first_tokens(key_states, value_states)
        elif start < state.enough_for_center <= stop:
            self._center_late(key_states, start)
        learning = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if learning:
            say_once(
                logging.WARNING,
                "PagedInt8Cache stores keys and values without gradient, so nothing is learned through the cache; "
                "run generation under torch.no_grad().",
            )
        self._append(key_states, value_states, group.tokens(self._device, start))
        if (key_states.dtype, value_states.dtype) != self._dtypes:
            held = zip(self._dtypes, (key_states.dtype, value_states.dtype))
            self._dtypes = tuple(torch.promote_types(*pair) for pair in held)
        state.layer_lengths[self.index] = stop
        first = group.first_visible(start)
        keys, values = group.blank_views(
            batch, stop - first, self._key_shape, self._value_shape, self._dtypes, self._device
        )
        fresh = None if state.from_blocks else (key_states, value_states)
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
    def keys(self) -> torch.Tensor | None:
        """A lazy view of the stored keys, or ``None`` before the first token. Assign a dense tensor of the same shape
        to store other ones."""
        return self.stored(values=False)

    @keys.setter  # type: ignore[override]
    def keys(self, dense: torch.Tensor) -> None:
        assign(self, dense, values=False)

    @property
    def values(self) -> torch.Tensor | None:
        """A lazy view of the stored values, or ``None`` before the first token. Assign a dense tensor of the same shape
        to store other ones."""
        return self.stored(values=True)

    @values.setter  # type: ignore[override]
    def values(self, dense: torch.Tensor) -> None:
        assign(self, dense, values=True)

    @property
    def record_past(self) -> bool:
        return self.sequences.record_past

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
        try:
            if not self.sequences.drop_padding(tokens) or fresh is None:
                return
            self._keep_first_tokens(*fresh)
            if self._centered_now and self._center(fresh[0], self.sequences.books.state.prompt_tokens, again=True):
                self._append(*fresh, self.group.tokens(self._device, 0))
        except BaseException:
            # It ends the forward pass.
            self.sequences.take_back()
            raise

    # -- internals -------------------------------------------------------------------------------------------------

    def _center(self, key_states: torch.Tensor, tokens: torch.Tensor | None, *, again: bool = False) -> bool:
        pool, group = self.sequences.pool, self.group
        return pool.center(self.index, key_states, lambda: group.holds_the_pool, tokens, again=again)

    def _center_late(self, key_states: torch.Tensor, start: int) -> None:
        """Centre the keys on the mean of the tokens so far, which were too few until now, and store those once more."""
        pool, window, sinks = self.sequences.pool, self.group.window, self.sequences.sinks
        all_held = self.group.holds_the_pool and (window is None or window >= MIN_CENTER_TOKENS)
        if not all_held or not pool.lacks_center(self.index):
            return
        keys, values = self.gather(0, start, torch.float32)
        together = torch.cat([keys, key_states.detach().float()], dim=2)
        first = torch.zeros(len(together), 1) if sinks is None else torch.from_numpy(sinks.first)[:, None]
        blocks = torch.from_numpy(np.unique(self.group.table.held())).long().to(self._device)
        self.sequences.books.state.centrings[self.index] = pool.before_centring(self.index, self.group.name, blocks)
        if self._center(together, torch.arange(together.shape[2]) >= first):
            self.store_anew(keys, values, 0)

    def store_anew(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        """Quantize tokens that the layer holds already and store them once more, from position ``start`` on."""
        tokens = self.group.tokens(self._device, self.sequences.step_start)
        lens = torch.full_like(tokens.context_lens_before, start)
        self._append(keys, values, replace(tokens, context_lens_before=lens))

    def forget_first_tokens(self) -> None:
        """Read the first tokens from the blocks from now on, as all others."""
        self._first_rows = self._first_tokens = None

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor, tokens: Tokens) -> None:
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        if self.sequences.same_as is not None:
            first = sorted(set(self.sequences.same_as))
            key_states, value_states = key_states[first], value_states[first]
            tokens = Tokens.at(tokens.block_table[first], tokens.context_lens_before[first], tokens.window)
        with self.sequences.writer:
            self._backend.append(*of_one_dtype(key_states, value_states), self.storage, tokens)

    def stored(self, *, values: bool) -> PagedView | None:
        """A lazy view of the stored keys or values, or ``None`` before the first token."""
        if not self.length or self.sequences.batch_size is None:
            return None
        heads, dim = self._value_shape if values else self._key_shape
        first = self.group.first_visible(self.length)
        shape = (self.sequences.batch_size, heads, self.length - first, dim)
        view = PagedView.blank(shape, self._dtypes[values], self._device, is_values=values)
        view.content = Content(self, first, self.length, self.epoch, None)
        return view
