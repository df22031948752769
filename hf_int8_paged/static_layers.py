"""Cache layers with everything preallocated, so that decoding compiles: a compiled step changes nothing on the host.

Eager steps are here, compiled ones in `static_step`, the memory in `static_memory`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .kernels import MAX_DECODE_ROWS, mean_key
from .layer_checks import check_first_states, check_states
from .pool import MIN_CENTER_TOKENS
from .static_memory import LayerShape, StaticMemory
from .static_reader import StaticReader
from .static_sequences import StaticSequences
from .static_step import append_on_device, dense_on_device


class PagedInt8StaticLayer(StaticReader, CacheLayerMixin):  # type: ignore[misc]
    """Paged int8 keys and values of one attention layer, preallocated.

    Args:
        index: the layer's index in the model.
        sequences: limits and lengths, which all layers of a cache share.
        window: sliding window in tokens, or ``None`` for full attention.
        block_size: tokens per block.
        backend: name of the kernel backend, or ``None`` for the best one of the keys' device.
        rotation: ``"hadamard"`` or ``None``.
        center_keys: whether the mean of the first prompt is subtracted from the keys.
        sink_tokens: first tokens of a sequence that are kept in full precision.
    """

    is_compileable = True
    is_croppable = True

    def __init__(
        self,
        index: int,
        sequences: StaticSequences,
        window: int | None = None,
        block_size: int = 16,
        backend: str | None = None,
        rotation: str | None = "hadamard",
        center_keys: bool = True,
        sink_tokens: int = 1,
    ):
        self.index = index
        self.sequences = sequences
        self.max_cache_len = sequences.max_cache_len
        self.window = window
        self.is_sliding = window is not None
        self.is_initialized = False
        self.memory: StaticMemory | None = None
        #: dtypes of the newest keys and values.
        self.dtypes = (torch.float32, torch.float32)
        #: Views made before tokens were moved are no longer valid.
        self.epoch = 0
        #: Tokens per sequence, and position of the first that is not overwritten, where `sequences` knows them.
        self.length = self.first_held = 0
        #: Whether the next step may be the first: all that a compiled step of one token knows of the length.
        self.may_be_empty = True
        #: Whether the last step was the first, and whether the keys' centre is the mean of its keys.
        self._in_first_step = self._centered_now = False
        self._options: dict[str, Any] = {
            "window": window,
            "block_size": block_size,
            "backend": backend,
            "rotation": rotation,
            "center_keys": center_keys,
            "sink_tokens": sink_tokens,
        }
        sequences.layers.append(self)

    # -- what transformers calls -----------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the layer for the heads, widths and device of its first keys and values, of any batch size."""
        check_first_states(self.index, key_states, value_states)
        shape, sequences = _shape_of(key_states, value_states), self.sequences
        sequences.check_batch(key_states.shape[0])
        dtypes = (key_states.dtype, value_states.dtype)
        sizes = (sequences.max_batch_size, sequences.max_cache_len)
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside it
            memory = StaticMemory(shape, dtypes, *sizes, **self._options)
        self.dtypes, self.is_initialized, self.may_be_empty = dtypes, True, True
        self.length = self.first_held = 0
        self.epoch += 1
        self.memory = memory

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return all keys and values that attention may see, lazily.

        A compiled step cannot raise for what only the device knows. One that does not fit into ``max_cache_len``
        writes nothing, leaves the length as it is, and its values are NaN, so that what comes of them is NaN too.

        Args:
            key_states: ``[batch, num_kv_heads, new_tokens, head_dim]``, float32, float16 or bfloat16.
            value_states: ``[batch, num_kv_heads, new_tokens, v_head_dim]``, any of these dtypes too.

        Returns:
            Keys and values of ``max_cache_len`` positions, those after the newest token 0.

        Raises:
            ValueError: shapes, device or batch size are not those of the layer, or the last step was interrupted.
            TypeError: another dtype.
            CacheFullError: more tokens than what is left of ``max_cache_len``. The cache is unchanged.
        """
        if torch.compiler.is_compiling():
            if not self.matches(key_states, value_states):
                _prepare_all(self.sequences.layers, self, key_states, value_states)
            past = append_on_device(self, key_states, value_states)
            return dense_on_device(self, key_states, value_states, past)
        if getattr(key_states, "is_cuda", False) and torch.cuda.is_current_stream_capturing():
            self.sequences.captured = True
            past = append_on_device(self, key_states, value_states)
            if key_states.shape[2] > 1:
                return dense_on_device(self, key_states, value_states, past)
            return self._views(self.max_cache_len, None)
        self.prepare(key_states, value_states)
        memory = self._memory
        batch, new_tokens = key_states.shape[0], key_states.shape[2]
        start = self.sequences.begin(self, batch, new_tokens)
        stop = start + new_tokens
        self._in_first_step, self._centered_now = start == 0, False
        if start == 0 and memory.sinks is not None:
            memory.sinks.keep(key_states, value_states)
        if start == 0 and memory.storage.key_center is not None and new_tokens >= MIN_CENTER_TOKENS:
            memory.storage.key_center.copy_(mean_key(key_states))
            self._centered_now = True
        self.dtypes = (key_states.dtype, value_states.dtype)
        fresh = None
        if new_tokens > 1 and (start == 0 or new_tokens > MAX_DECODE_ROWS):
            fresh = (key_states, value_states)
            if start:
                # In a ring the chunk will have overwritten what its first rows still see.
                past = self.gather(0, start, torch.promote_types(*self.dtypes))
                fresh = (
                    torch.cat([past[0].to(key_states.dtype), key_states], dim=2),
                    torch.cat([past[1].to(value_states.dtype), value_states], dim=2),
                )
        self._note_overwritten(stop)
        self._append(key_states, value_states, memory.lens[:batch])
        memory.lens.add_(new_tokens)
        memory.length.add_(new_tokens)
        self.length, self.may_be_empty = stop, False
        return self._views(stop, fresh)

    def get_seq_length(self) -> torch.Tensor | int:  # type: ignore[override]
        """Tokens per sequence, as a tensor on the layer's device: reading it on the host would wait for the device."""
        return 0 if self.memory is None else self.memory.length

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the mask covers, and the position of the first: the same at every step, so that what was
        compiled for one serves all."""
        return self.max_cache_len, 0

    def reset(self) -> None:
        raise NotImplementedError("layers share their lengths; call reset() of the cache")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("layers share their lengths; call crop() of the cache")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise NotImplementedError("layers share their lengths; call reorder_cache() of the cache")

    def offload(self) -> None:
        raise NotImplementedError("offload is not supported by PagedInt8Cache: the blocks stay on their device")

    def prefetch(self) -> None:
        raise NotImplementedError("prefetch is not supported by PagedInt8Cache: the blocks stay on their device")

    # -- what the cache and `StaticSequences` call -------------------------------------------------------------------

    def matches(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        """Whether there is memory for such keys and values."""
        fits = key_states.shape[:3] == value_states.shape[:3]
        return self.memory is not None and fits and _shape_of(key_states, value_states) == self.memory.shape

    def prepare(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the layer, or check that keys and values are such as it was allocated for. An empty one is allocated
        again for others.

        Raises:
            ValueError: it holds tokens and these are of another kind, or no layer can hold them.
        """
        self.sequences.count_again()
        if self.memory is not None and self.length:
            heads, head_dim, v_head_dim, device = self.memory.shape
            check_states(self.index, key_states, value_states, (heads, head_dim), (heads, v_head_dim), device)
            return
        check_first_states(self.index, key_states, value_states)
        if not self.matches(key_states, value_states):
            self.lazy_initialization(key_states, value_states)

    def count_again(self) -> None:
        """Read the length from the device."""
        if self.memory is not None:
            self.length = int(self.memory.length)
            self._note_overwritten(self.length)

    def holds_window_of(self, length: int) -> bool:
        """Whether all that a token at position ``length`` sees is still there."""
        return self.window is None or length == 0 or max(length - self.window + 1, 0) >= self.first_held

    @property
    def most_to_crop(self) -> int:
        """Tokens that a window which is full can always give back."""
        return self._memory.capacity - (self.window or 0) + 1

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on, also those of an interrupted step that nobody counted yet."""
        if self.memory is None:
            return
        length = min(length, self.length)
        self.memory.truncate(length)
        self.length = length
        if not length:
            self.first_held, self.may_be_empty = 0, True
        self.epoch += 1

    def select(self, rows: list[int]) -> None:
        """Make sequence i what sequence ``rows[i]`` is."""
        if self.memory is not None:
            self.memory.select(rows)
            self.epoch += 1

    # -- internals -------------------------------------------------------------------------------------------------

    def note_padding(self, tokens: torch.Tensor, fresh: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Make nothing of padding in the first prompt; see `PagedInt8Layer.note_padding`. Preallocated blocks stay."""
        if not self._in_first_step or fresh is None:
            return
        try:
            self._leave_out_padding(tokens, *fresh)
        except BaseException:
            # It ends the forward pass.
            self.sequences.take_back()
            raise

    def _leave_out_padding(self, tokens: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        tokens = tokens[:, : keys.shape[2]]
        if self._memory.sinks is not None:
            self._memory.sinks.keep(keys, values, tokens.int().argmax(dim=1).to(torch.int32))
        center = self._memory.storage.key_center
        if self._centered_now and center is not None:
            enough = tokens.sum(dim=1).max() >= MIN_CENTER_TOKENS
            center.copy_(torch.where(enough, mean_key(keys, tokens), 0.0))
            self._append(keys, values, torch.zeros_like(self._memory.lens[: len(keys)]))

    def _append(self, keys: torch.Tensor, values: torch.Tensor, lens_before: torch.Tensor) -> None:
        """Append new rows, but for those at the beginning of a long prompt that its end would overwrite."""
        skipped = max(keys.shape[2] - self._memory.capacity, 0)
        table = self._memory.table[: len(keys)]
        self._memory.append(keys[:, :, skipped:], values[:, :, skipped:], table, lens_before + skipped)

    def _note_overwritten(self, length: int) -> None:
        """Note what is no longer held with so many tokens."""
        if self.window is not None:
            self.first_held = max(self.first_held, length - self._memory.capacity)


def _shape_of(keys: torch.Tensor, values: torch.Tensor) -> LayerShape:
    return LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.device)


@torch.compiler.disable
def _prepare_all(
    layers: list[PagedInt8StaticLayer],
    first: PagedInt8StaticLayer,
    key_states: torch.Tensor,
    value_states: torch.Tensor,
) -> None:
    """Allocate within a compiled forward pass, which breaks its graph. One break serves all layers: the others are
    allocated too, as if their keys and values were like those of the first."""
    first.prepare(key_states, value_states)
    for layer in layers:
        if layer.memory is None:
            layer.prepare(key_states, value_states)
