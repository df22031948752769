"""What `generate` and users do to a cache besides appending: rollback, beams, batches, forks."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from .batch_rows import reordered_rows, selected_rows
from .hybrid import PagedInt8HybridLayer
from .layer import PagedInt8Layer
from .offloading.storages import made_for_offloading
from .one_thread import whole
from .options import checked_integer

if TYPE_CHECKING:
    from typing_extensions import Self


class CacheOperations(DynamicCache):
    """Operations on all layers of a cache at once.

    Whatever can be refused is refused before the first layer changes. A cache without tokens takes any of them.
    """

    #: `PagedInt8Layer` where keys and values are held, transformers' own classes elsewhere.
    layers: list
    _sequences: Any  # `GrowingSequences` or `PreallocatedSequences`; tests look into either
    #: For encoder-decoder models: index of the layer updated last, and with how many tokens.
    _newest: tuple[int, int] | None = None
    #: What a prompt store has handed the cache out for, until it is emptied: who fills it then is not known.
    _prompt_key: Any = None

    @whole
    def reset(self) -> None:
        """Forget all tokens. The memory stays allocated, and so does the mean key that ``center_keys`` subtracts: what
        comes next is rounded as beside the old tokens, where a new cache would take its own mean."""
        self._newest = self._prompt_key = None
        self._sequences.clear()
        for layer in self._own_layers():
            layer.reset()

    @whole
    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back.

        Args:
            tokens_to_remove: minus the number of tokens; 0 only lets windows shrink to what they need.

        Raises:
            TypeError, ValueError: no integer, or a positive one.
            RuntimeError: tokens have fallen out of a sliding window that would be visible again, or a layer has not
                recorded its past; see `activate_past_recording`. Nothing has changed then.
        """
        tokens_to_remove = checked_integer("tokens_to_remove", tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        others = self._require("crop")
        for layer in others:
            if isinstance(layer, LinearAttentionCacheLayerMixin) and not layer.record_past:
                raise RuntimeError(
                    "a layer has not recorded its past; call activate_past_recording() before generating"
                )
        self._newest = None
        self._sequences.truncate(max(self._sequences.length + tokens_to_remove, 0))
        if not self._sequences.length:
            self._prompt_key = None
        for layer in others:
            layer.crop(tokens_to_remove)

    @whole
    def activate_past_recording(self) -> None:
        """Keep what falls out of sliding windows until the next `crop`, so that it can be taken back."""
        self._sequences.record_past = True
        for layer in self._own_layers():
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    @whole
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make sequence i what sequence ``beam_idx[i]`` is. Only block tables change; blocks are shared.

        Args:
            beam_idx: integers from 0 to the batch size, in a tensor, a list or a tuple.

        Raises:
            IndexError: there is no such sequence. Nothing has changed then.
        """
        others = self._require("reorder_cache")
        if self._batch is not None:
            rows = reordered_rows(beam_idx, self._batch)
            if others:
                beam_idx = torch.tensor(rows, dtype=torch.long)
            self._select(rows)
        for layer in others:
            layer.reorder_cache(beam_idx)

    @whole
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times in place. The copies share all blocks.

        Raises:
            TypeError, RuntimeError: no integer, or a negative one. Nothing has changed then.
        """
        repeats = checked_integer("repeats", repeats)
        if repeats < 0:
            raise RuntimeError(f"batch_repeat_interleave takes a number of copies, at least 0, got {repeats}")
        rows = torch.arange(self._batch or 0).repeat_interleave(repeats).tolist()
        others = self._require("batch_repeat_interleave")
        self._select(rows)
        for layer in others:
            layer.batch_repeat_interleave(repeats)

    @whole
    def batch_select_indices(self, indices: Any) -> None:
        """Keep the sequences at ``indices``, or those where a boolean ``indices`` is True, in this order.

        Args:
            indices: what a tensor's first axis can be indexed with: a tensor, array, list or tuple of integers or
                booleans, or a slice.

        Raises:
            IndexError: there is no such sequence. Nothing has changed then.
        """
        rows = [] if self._batch is None else selected_rows(indices, self._batch)
        others = self._require("batch_select_indices")
        self._select(rows)
        for layer in others:
            layer.batch_select_indices(indices)

    @whole
    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Begin to bring a layer near, without waiting: ``layer_idx``, or the next one after it that is offloaded,
        after the last one the first. A step does so itself, one layer ahead.

        Args:
            layer_idx: index of the layer; their number is allowed, for the first.
            only_non_sliding: pass over layers with a window.

        Raises:
            NotImplementedError: the cache was made without ``offloading=True``.
        """
        offloaded = made_for_offloading(self._sequences.offloaded, "prefetch")
        layers = [
            index
            for index, layer in enumerate(self.layers)
            if offloaded.leaves(index) and not (only_non_sliding and _slides(layer))
        ]
        offloaded.prefetch(next((index for index in layers if index >= layer_idx), layers[0] if layers else None))

    @whole
    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Send a layer away now. A step does so itself, when it has reached the next layer.

        Layers that stay, by ``resident_layers`` or as they are transformers' own, do.

        Args:
            layer_idx: index of the layer.
            only_non_sliding: leave a layer with a window where it is.

        Raises:
            NotImplementedError: the cache was made without ``offloading=True``.
            ValueError: the layer has a window, and those stay by ``offload_only_non_sliding=True``.
        """
        offloaded, layer = made_for_offloading(self._sequences.offloaded, "offload"), self.layers[layer_idx]
        if not (only_non_sliding and _slides(layer)):
            if _slides(layer) and offloaded.only_non_sliding:
                raise ValueError(
                    f"layer {layer_idx} has a window and stays: the cache was made with offload_only_non_sliding=True"
                )
            offloaded.send_away(range(len(self.layers))[layer_idx])

    @whole
    def fork(self) -> Self:
        """A cache with the same tokens that goes on independently. All blocks are shared until one of them
        writes to a partly filled last block. ``copy.deepcopy`` does the same."""
        twin = copy.copy(self)
        twin._sequences, twin.layers = self._sequences.fork(self.layers)
        return twin

    def __deepcopy__(self, memo: dict) -> Self:
        return self.fork()

    @property
    def _batch(self) -> int | None:
        """Sequences that hold tokens, or ``None`` while there are none."""
        return self._sequences.batch_size

    def _select(self, rows: list[int]) -> None:
        if self._batch is not None:
            if rows:
                self._sequences.select(rows)
            else:
                self._prompt_key = None
                self._sequences.clear()  # no sequences, no tokens

    def _own_layers(self) -> list:
        """Layers with state outside the pool: transformers' own, and the linear part of hybrid ones."""
        return [
            layer.linear_part if isinstance(layer, PagedInt8HybridLayer) else layer
            for layer in self.layers
            if not isinstance(layer, PagedInt8Layer) or isinstance(layer, PagedInt8HybridLayer)
        ]

    def _take_back_others(self, layer_idx: int | None = None) -> None:
        """Of a step that was taken back, take back what layers with a state of their own have made of it, which only
        their beginning allows.

        Args:
            layer_idx: of the layer in which it ended, if that is known.
        """
        if any(
            isinstance(layer, LinearAttentionCacheLayerMixin) and (layer_idx is None or index <= layer_idx)
            for index, layer in enumerate(self.layers)
        ):
            if self._sequences.length:
                self._sequences.broken = "a step"
            else:
                for layer in self._own_layers():
                    layer.reset()

    def _require(self, operation: str) -> list:
        """The layers with state of their own, all of which can do ``operation``."""
        layers = self._own_layers()
        for layer in layers:
            if not hasattr(layer, operation):
                raise NotImplementedError(f"a {type(layer).__name__} of this cache has no {operation}")
        return layers


def _slides(layer: Any) -> bool:
    """Whether a layer has a window; transformers' own without keys do not say."""
    return bool(getattr(layer, "is_sliding", False))
