"""The cache layer: transformers' ``CacheLayerMixin`` face over blocks and kernels, whichever way room is found."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .assignment import assign
from .kernels import Tokens
from .layer_checks import check_first_states, check_states, of_one_dtype
from .layer_reader import LayerReader
from .offloading.storages import Blocks, made_for_offloading
from .seam.once import say_once
from .seam.views import Content
from .sequences.growing import GrowingSequences
from .sequences.preallocated import PreallocatedSequences
from .whole_cache import OfTheWholeCache


class PagedInt8Layer(OfTheWholeCache, LayerReader, CacheLayerMixin):
    """Keys and values of one attention layer, as paged int8.

    ``update`` quantizes and appends; it returns lazy views (`views.PagedView`) of the whole context. Where the
    tokens lie is the business of the layer's `Room`, which the cache's sequences make.

    Args:
        index: the layer's index in the model.
        sequences: lengths and block tables of the cache.
        window: sliding window in tokens, or ``None`` for full attention.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, index: int, sequences: GrowingSequences | PreallocatedSequences, window: int | None = None):
        LayerReader.__init__(self, index, sequences.add_room(index, window))
        self.sequences = sequences

    # -- what transformers calls -----------------------------------------------------------------------------------

    @property
    def is_initialized(self) -> bool:
        """Whether there are blocks for the layer."""
        return self.room.shape is not None

    @property
    def is_sliding(self) -> bool:
        return self.window is not None

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys; unknown before the first ones."""
        self._known("dtype")
        return self.room.dtypes[0]

    @property
    def device(self) -> torch.device:
        """Where the blocks are; unknown before the first keys."""
        return self._known("device")[3]

    @property
    def sliding_window(self) -> int:
        """The window in tokens; layers without one have no such attribute, as in transformers."""
        if self.window is None:
            raise AttributeError("sliding_window")
        return self.window

    @property
    def cumulative_length(self) -> Any:  # type: ignore[override]
        """Tokens per sequence that a layer with a window has seen; others have no such attribute."""
        if self.window is None:
            raise AttributeError("cumulative_length")
        return self.length

    @property
    def length(self) -> int:
        """Tokens per sequence that this layer holds. Of a preallocated one it waits for the device after compiled
        steps."""
        return self.room.length

    @property
    def batch_size(self) -> int:
        """Sequences that hold tokens, -1 without any."""
        return self.room.batch_size or -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the layer's blocks for the heads, widths and device of its first keys and values."""
        self.room.allocate(key_states, value_states)

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
            concatenation would have; of a preallocated layer in that of the newest.

        Raises:
            ValueError: shape or device are not those of the layer's first keys and values, or a forward pass was
                interrupted.
            CacheFullError: a limit is reached. The cache is unchanged.
        """
        room = self.room
        # What goes before this line changes nothing, and what goes after it is undone if an exception ends it.
        start = self.sequences.guard.inside["start"] = room.length
        if start == 0:
            check_first_states(self.index, key_states, value_states)
        else:
            assert room.shape is not None
            check_states(self.index, key_states, value_states, room.shape)
        stop = start + key_states.shape[2]
        step = room.begin(start, key_states, value_states)
        if start == 0:
            room.allocate(key_states, value_states)
            room.center(key_states, step.prompt_tokens)
            room.keep_first_tokens(key_states, value_states, step.prompt_tokens)
        elif start < step.enough_for_center <= stop:
            self._center_late(key_states, start)
        learning = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if learning:
            say_once(
                logging.WARNING,
                "PagedInt8Cache stores keys and values without gradient, so nothing is learned through the cache; "
                "run generation under torch.no_grad().",
            )
        fresh = None if step.from_blocks else (key_states, value_states)
        if start and fresh is not None and room.overwrites(stop):
            past = self.gather(0, start, torch.float32)
            fresh = _joined(past[0], key_states), _joined(past[1], value_states)
        self._append(*room.to_write(key_states, value_states, stop), room.for_appending)
        room.wrote(stop, (key_states.dtype, value_states.dtype))
        first = room.first_shown(start)
        keys, values = room.blank_views(stop - first)
        keys.content = values.content = Content(self, first, stop, room.epoch, fresh)
        if learning and fresh is not None:
            return keys.dense(), values.dense()  # autograd does not look into views
        return keys, values

    def prefetch(self) -> None:
        """Begin to bring the layer near, if it is offloaded."""
        made_for_offloading(self.sequences.offloaded, "prefetch").prefetch(self.index)

    def offload(self) -> None:
        """Send the layer away now, if it is one that leaves."""
        made_for_offloading(self.sequences.offloaded, "offload").send_away(self.index)

    def get_seq_length(self) -> Any:
        """Tokens per sequence; of a preallocated layer as a tensor on its device."""
        return self.length

    def get_max_length(self) -> int:
        if self.window is not None:
            return self.window
        return -1 if self.sequences.max_cache_len is None else self.sequences.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the mask covers, and the position of the first."""
        first = self.room.first_shown(self.length)
        return self.sequences.padding.asked((self.length + query_length - first, first))

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

    def fork(self, sequences: GrowingSequences) -> PagedInt8Layer:
        """This layer for another cache over the same pool, whose `sequences` were forked from this cache's."""
        twin = copy.copy(self)
        twin.sequences, twin.room = sequences, self.room.fork(sequences)  # type: ignore[attr-defined]
        return twin

    # -- internals -------------------------------------------------------------------------------------------------

    def _center_late(self, key_states: torch.Tensor, start: int) -> None:
        """Centre the keys on the mean of the tokens so far, which were too few until now, and store those once more."""
        if not self.room.lacks_center:
            return
        keys, values = self.gather(0, start, torch.float32)
        if self.room.center_late(torch.cat([keys, key_states.detach().float()], dim=2)):
            self.store_anew(keys, values, 0)

    def store_anew(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        """Quantize tokens that the layer holds already and store them once more, from position ``start`` on."""
        keys, values, tokens = self.room.to_write(keys, values, start)
        lens = torch.full_like(tokens.context_lens_before, start)
        self._append(keys, values, replace(tokens, context_lens_before=lens), self.room.storages)

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor, tokens: Tokens, blocks: Blocks) -> None:
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        with self.room.writer:
            self.room.backend.append(*of_one_dtype(key_states, value_states), blocks[self.index], tokens)

    def _known(self, name: str) -> tuple[int, int, int, torch.device]:
        """The layer's shape, which the attribute ``name`` is a fact of: without it there is no such attribute yet."""
        if self.room.shape is None:
            raise AttributeError(f"{name} is unknown before the first keys")
        return self.room.shape


def _joined(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.cat([past.to(new.dtype), new], dim=2)
