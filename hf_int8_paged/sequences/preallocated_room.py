"""Room that a layer has from the start, at addresses that never change, so that decoding compiles.

Eager steps count tokens on the host too. Compiled ones, and those in a CUDA graph, are in `device_step`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..kernels import Backend, FirstTokens, KvCacheQuant, Scoring, Tokens, load_backend, mean_key
from ..layer_checks import LayerShape, check_first_states, shape_of
from ..pool_centring import enough_for_mean
from ..seam.views import PagedView
from .memory import PreallocatedMemory
from .preallocated_budget import check_layer_fits

if TYPE_CHECKING:
    from .preallocated import PreallocatedSequences, PreallocatedStep


class PreallocatedRoom:
    """See `Room`.

    Args:
        index: the layer's index in the model.
        sequences: limits and lengths, which all layers of a cache share.
        window: sliding window in tokens, or ``None`` for full attention.
    """

    preallocated = True
    writer = nullcontext()

    def __init__(self, index: int, sequences: PreallocatedSequences, window: int | None):
        self.index = index
        self.sequences = sequences
        self.window = window
        #: None before the first keys.
        self.memory: PreallocatedMemory | None = None
        #: dtypes of the newest keys and values.
        self.dtypes = (torch.float32, torch.float32)
        #: Views made before tokens were moved are no longer valid.
        self.epoch = 0
        #: Tokens per sequence, and position of the first that is not overwritten, where `sequences` knows them.
        self.counted = self.first_held = 0
        #: Whether the next step may be the first: all that a compiled step of one token knows of the length.
        self.may_be_empty = True

    @property
    def shape(self) -> LayerShape | None:
        return None if self.memory is None else self.memory.shape

    @property
    def length(self) -> int:
        self.sequences.count_again()
        return self.counted

    @property
    def batch_size(self) -> int | None:
        return self.sequences.batch_size

    @property
    def storages(self) -> dict[int, KvCacheQuant]:
        return {} if self.memory is None else {self.index: self.memory.storage}

    for_reading = for_appending = storages

    @property
    def storage(self) -> KvCacheQuant:
        return self.allocated.storage

    @property
    def backend(self) -> Backend:
        return load_backend(self.storage.backend)

    @property
    def allocated(self) -> PreallocatedMemory:
        """The memory, which is there."""
        assert self.memory is not None
        return self.memory

    def begin(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> PreallocatedStep:
        return self.sequences.begin(self, start, keys)

    def matches(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether there is memory for such keys and values."""
        return keys.shape[:3] == values.shape[:3] and shape_of(keys, values) == self.shape

    def allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.matches(keys, values):
            return
        check_first_states(self.index, keys, values)
        sequences, dtypes = self.sequences, (keys.dtype, values.dtype)
        sequences.check_batch(len(keys))
        limits = sequences.max_batch_size, sequences.max_cache_len
        check_layer_fits(sequences, self.index, shape_of(keys, values), torch.promote_types(*dtypes))
        with torch.inference_mode(False):  # tensors made in inference mode could not be written to outside it
            memory = PreallocatedMemory(
                shape_of(keys, values), dtypes, *limits, self.window, sequences.options, sequences.sink_tokens
            )
        self.dtypes, self.may_be_empty, self.counted, self.first_held = dtypes, True, 0, 0
        self.epoch += 1
        self.memory = memory

    def center(self, keys: torch.Tensor, tokens: torch.Tensor | None) -> None:
        center = self.storage.key_center
        if center is not None and enough_for_mean(keys, tokens):
            center.copy_(mean_key(keys, None if tokens is None else tokens.to(keys.device)))

    lacks_center = False  # later on: compiled steps know no lengths

    def center_late(self, keys: torch.Tensor) -> bool:
        return False

    def keep_first_tokens(self, keys: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor | None) -> None:
        kept = self.allocated.first_tokens
        if kept is not None:
            kept.keep(keys, values, tokens)

    def first_tokens(self, first_visible: int) -> FirstTokens | None:
        return self._of_sequences[1]

    def overwrites(self, stop: int) -> bool:
        return self.window is not None and stop > self.allocated.capacity

    def to_write(
        self, keys: torch.Tensor, values: torch.Tensor, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
        memory, tokens = self.allocated, self._of_sequences[0]
        if self.window is not None:
            self.first_held = max(self.first_held, stop - memory.capacity)
        # Those at the beginning of a long prompt would be overwritten by its end.
        skipped = max(keys.shape[2] - memory.capacity, 0)
        if not skipped:
            return keys, values, tokens
        after = Tokens.at(tokens.block_table, tokens.context_lens + skipped)
        return keys[:, :, skipped:], values[:, :, skipped:], after

    def wrote(self, stop: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        memory, self.dtypes = self.allocated, dtypes
        memory.lens.add_(stop - self.counted)
        self.counted, self.may_be_empty = stop, False

    def tokens(self) -> Tokens:
        return self._of_sequences[0]

    def tokens_for(self, stop: int, rows: int, fresh: bool) -> Tokens:
        tokens = self._of_sequences[0]
        if not self.sequences.known or (stop == self.counted and not fresh):
            return tokens
        lens, table = torch.full_like(tokens.context_lens, stop), tokens.block_table
        if fresh:  # a long chunk, whose kernels are told how much past there is by the table's width
            table = table[:, : -(-stop // self.storage.block_size)]
        return replace(tokens, block_table=table, context_lens=lens, context_lens_before=lens - rows)

    newest_from_blocks = True  # and so is, in later steps, all that is seen of a chunk

    def first_shown(self, position: int) -> int:
        return 0

    def blank_views(self, tokens: int) -> tuple[PagedView, PagedView]:
        """Views of all positions, those from ``tokens`` on without a token."""
        heads, *dims, device = self.allocated.shape
        batch = self.sequences.batch_size
        assert batch is not None
        keys, values = (
            PagedView.blank(
                (batch, heads, self.sequences.max_cache_len, dims[i]), self.dtypes[i], device, is_values=bool(i)
            )
            for i in range(2)
        )
        return keys, values

    def checked(self, result: torch.Tensor) -> torch.Tensor:
        return result if self.sequences.known else torch.where(self.allocated.fits, result, torch.nan)

    def attend_on_device(self, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        return torch.where(self.allocated.fits, self.allocated.attend(query, scoring), torch.nan)

    def rows_that_see(self, tokens: int) -> torch.Tensor:
        """The causal mask of the newest tokens over all positions, with the layer's window, made of the length on the
        device: bool ``[1, 1, tokens, max_cache_len]``."""
        length = self.allocated.length
        row = (length - tokens + torch.arange(tokens, device=length.device))[:, None]
        column = torch.arange(self.sequences.max_cache_len, device=length.device)
        mask = column <= row
        if self.window is not None:
            mask &= column > row - self.window
        return mask[None, None]

    @property
    def first_tokens_nbytes(self) -> int:
        first_tokens = None if self.memory is None else self.memory.first_tokens
        return 0 if first_tokens is None else first_tokens.nbytes

    @property
    def long_chunks(self) -> bool:
        return self.window is None and self.backend.LONG_CHUNKS

    # -- what `PreallocatedSequences` calls -------------------------------------------------------------------------

    def count_again(self) -> None:
        """Read the length from the device."""
        if self.memory is not None:
            self.counted = int(self.memory.length)
            if self.window is not None:
                self.first_held = max(self.first_held, self.counted - self.memory.capacity)

    def holds_window_of(self, length: int) -> bool:
        """Whether all that a token at position ``length`` sees is still there."""
        return self.window is None or length == 0 or max(length - self.window + 1, 0) >= self.first_held

    @property
    def most_to_crop(self) -> int:
        """Tokens that a window which is full can always give back."""
        return self.allocated.capacity - (self.window or 0) + 1

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on, also those of an interrupted step that nobody counted yet."""
        if self.memory is None:
            return
        length = min(length, self.counted)
        self.memory.truncate(length)
        self.counted = length
        if not length:
            self.first_held, self.may_be_empty = 0, True
        self.epoch += 1

    def select(self, rows: list[int]) -> None:
        """Make sequence i what sequence ``rows[i]`` is."""
        if self.memory is not None:
            self.memory.select(rows)
            self.epoch += 1

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks that hold tokens."""
        if self.memory is None:
            return 0
        storage, capacity = self.memory.storage, self.memory.capacity
        tokens = min(-(-self.length // storage.block_size) * storage.block_size, capacity)
        return (self.batch_size or 0) * tokens * storage.bytes_per_token

    @property
    def _of_sequences(self) -> tuple[Tokens, FirstTokens | None]:
        batch = self.sequences.batch_size
        assert batch is not None
        return self.allocated.of(batch)
