"""Room that a layer finds step by step in the blocks of a pool."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..block_allocator import HOLE
from ..kernels import Backend, FirstTokens, KvCacheQuant, Scoring, Tokens, load_backend
from ..layer_checks import LayerShape, dense_dtypes, interrupted, shape_of
from ..offloading.storages import Appending, Blocks, Reading
from ..pool_access import Books
from ..pool_centring import MIN_CENTER_TOKENS
from ..seam.views import PagedView
from .first_tokens import LayerFirstTokens
from .group import Group, ViewsOf
from .prompts import is_same, same_prompts
from .state import SequenceState

if TYPE_CHECKING:
    from .growing import GrowingSequences


class GrowingRoom:
    """See `Room`.

    Args:
        index: the layer's index in the model.
        sequences: lengths and block tables of the cache.
        group: the layers with this one's window.
    """

    preallocated = False
    backend: Backend
    _backend_name: str
    dtypes: tuple[torch.dtype, torch.dtype]

    def __init__(self, index: int, sequences: GrowingSequences, group: Group):
        self.index = index
        self.window = group.window
        self._belong_to(sequences, group)
        self.shape: LayerShape | None = None
        self._first_tokens: LayerFirstTokens | None = None
        sequences.books.state.layer_lengths[index] = 0

    def _belong_to(self, sequences: GrowingSequences, group: Group) -> None:
        self.sequences, self.group, self.writer = sequences, group, sequences.writer
        # Asked in every layer and step, so without a Python function between.
        self.storages = sequences.pool.storages
        self.for_reading: Blocks = self.storages
        self.for_appending: Blocks = self.storages
        if sequences.offloaded is not None:
            newest = partial(_newest_blocks, sequences.books, group.name, sequences.pool.block_size)
            self.for_reading = Reading(sequences.offloaded)
            self.for_appending = Appending(sequences.offloaded, newest)
        self.first_shown = group.first_visible

    @property
    def epoch(self) -> int:
        return self.group.epoch

    @property
    def length(self) -> int:
        return self.sequences.books.state.layer_lengths[self.index]

    @property
    def batch_size(self) -> int | None:
        return self.sequences.books.state.batch_size

    @property
    def storage(self) -> KvCacheQuant:
        return self.storages[self.index]

    def begin(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> SequenceState:
        sequences, state = self.sequences, self.sequences.books.state
        batch, new_tokens = keys.shape[0], keys.shape[2]
        if start == state.length:
            if start:
                return sequences.advance(batch, new_tokens)
            count, dtype = min(sequences.sink_tokens, new_tokens), torch.promote_types(keys.dtype, values.dtype)
            first_bytes = sequences.pool.first_tokens_bytes(batch * count, dtype)
            return sequences.advance(batch, new_tokens, same_prompts(keys), first_bytes)
        if start != state.step_start or start + new_tokens != state.length or batch != state.batch_size:
            raise interrupted(self.index, start, keys, state)
        if state.same_as is not None and not all(is_same(states, state.same_as) for states in (keys, values)):
            return sequences.unshare()
        return state

    def allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        shape = shape_of(keys, values)
        pool, group = self.sequences.pool, self.group
        name = pool.add_layer(self.index, group.name, shape, lambda: group.holds_the_pool)
        if self.shape is None or self._backend_name != name:
            self._backend_name, self.backend = name, load_backend(name)
        self.dtypes, self.shape = dense_dtypes(keys.dtype, values.dtype), shape

    def center(self, keys: torch.Tensor, tokens: torch.Tensor | None) -> None:
        pool, group = self.sequences.pool, self.group
        self.sequences.books.state.centrings[self.index] = pool.before_centring(self.index, group.name)
        pool.center(self.index, keys, lambda: group.holds_the_pool, tokens)

    @property
    def lacks_center(self) -> bool:
        all_held = self.window is None or self.window >= MIN_CENTER_TOKENS
        return all_held and self.group.holds_the_pool and self.sequences.pool.lacks_center(self.index)

    def center_late(self, keys: torch.Tensor) -> bool:
        pool, group, state = self.sequences.pool, self.group, self.sequences.books.state
        places = state.first_tokens
        first = torch.zeros(len(keys), 1) if places is None else torch.from_numpy(places.first)[:, None]
        blocks = torch.from_numpy(np.unique(group.table.held())).long().to(keys.device)
        state.centrings[self.index] = pool.before_centring(self.index, group.name, blocks)
        tokens = torch.arange(keys.shape[2]) >= first
        return pool.center(self.index, keys, lambda: group.holds_the_pool, tokens)

    def keep_first_tokens(self, keys: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor | None) -> None:
        places = self.sequences.books.state.first_tokens
        if places is not None:
            self._keep(LayerFirstTokens(places, keys, values, self.sequences.sink_tokens))

    def _keep(self, first_tokens: LayerFirstTokens | None) -> None:
        self._first_tokens = None  # those of earlier sequences do not count any more
        if first_tokens is not None:
            self.sequences.pool.hold(first_tokens)
        self._first_tokens = first_tokens

    def first_tokens(self, first_visible: int) -> FirstTokens | None:
        places = self.sequences.books.state.first_tokens
        if places is None or first_visible >= places.limit or self._first_tokens is None:
            return None
        made_for, first_tokens = self._first_tokens.made
        return first_tokens if made_for is places else self._first_tokens.at(places)

    @property
    def kept_rows(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of the tokens in full precision, ``[rows, num_kv_heads, count, dim]``. With None those are
        read from the blocks, as all others."""
        return None if self._first_tokens is None else self._first_tokens.rows

    @kept_rows.setter
    def kept_rows(self, rows: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self._keep(None if rows is None else LayerFirstTokens.of_rows(*rows))

    def overwrites(self, stop: int) -> bool:
        return False

    def to_write(
        self, keys: torch.Tensor, values: torch.Tensor, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
        tokens, same_as = self.group.tokens(keys.device), self.sequences.books.state.same_as
        if same_as is None:
            return keys, values, tokens
        distinct = sorted(set(same_as))
        tokens = Tokens.at(tokens.block_table[distinct], tokens.context_lens_before[distinct], tokens.window)
        return keys[distinct], values[distinct], tokens

    def wrote(self, stop: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        if dtypes != self.dtypes:
            of_keys, of_values = map(torch.promote_types, self.dtypes, dtypes)
            self.dtypes = of_keys, of_values
        self.sequences.books.state.layer_lengths[self.index] = stop

    def tokens(self) -> Tokens:
        assert self.shape is not None
        return self.group.tokens(self.shape.device)

    def tokens_for(self, stop: int, rows: int, fresh: bool) -> Tokens:
        assert self.shape is not None
        tokens, state = self.group.tokens(self.shape[3]), self.sequences.books.state
        if stop == state.length and not (fresh and stop - rows != state.step_start):
            return tokens
        lens = torch.full_like(tokens.context_lens, stop)
        return replace(tokens, context_lens=lens, context_lens_before=lens - rows)

    def blank_views(self, tokens: int) -> tuple[PagedView, PagedView]:
        group = self.group
        kind = ViewsOf(self.sequences.books.state.batch_size, tokens, self.shape, self.dtypes)
        made_for, views = group.blank
        return views.pop() if views and kind == made_for else group.make_views(kind)

    @property
    def newest_from_blocks(self) -> bool:
        return self.sequences.books.state.from_blocks

    def checked(self, result: torch.Tensor) -> torch.Tensor:
        return result

    def attend_on_device(self, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        raise AssertionError("block tables are the host's: no graph can hold attention to them")

    @property
    def first_tokens_nbytes(self) -> int:
        return 0 if self._first_tokens is None else self._first_tokens.nbytes

    @property
    def long_chunks(self) -> bool:
        return self.backend.LONG_CHUNKS

    def fork(self, sequences: GrowingSequences) -> GrowingRoom:
        """The same for another cache over the same pool, whose sequences were forked from this one's."""
        twin = copy.copy(self)
        twin._belong_to(sequences, sequences.groups[self.group.name])
        return twin


def _newest_blocks(books: Books, group: str, block_size: int) -> np.ndarray:
    """Blocks of the newest step's tokens."""
    state = books.state
    ids = state.tables[group].ids[:, state.step_start // block_size : -(-state.length // block_size)]
    return np.unique(ids[ids != HOLE])
