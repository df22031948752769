"""The sequences of one cache: a block table per layer group, all advanced together, before any layer writes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from operator import attrgetter

import numpy as np
import torch

from ..block_allocator import HOLE
from ..full import CacheFullError
from ..kernels import MAX_DECODE_ROWS
from ..layer_checks import check_none_left_out
from ..one_thread import OneThread
from ..pool import PagedInt8Pool
from ..pool_access import Books
from ..pool_centring import MIN_CENTER_TOKENS
from ..seam.padding import Padding
from .block_table import BlockTable
from .first_tokens import FirstTokenPlaces
from .group import Group, group_name
from .growing_room import GrowingRoom
from .recovery import SequenceRecovery
from .state import SequenceState


class GrowingSequences(SequenceRecovery):
    """Lengths and block tables of one cache's sequences.

    The first layer that a forward pass updates calls `advance`, which finds blocks for the new tokens in
    every group. If that fails, nothing has changed; after it, no layer can run out of blocks.

    Every change is made on copies of the tables, and takes effect with one assignment to ``books.state``.

    Args:
        pool: where the blocks come from.
        max_cache_len: most tokens per sequence, or ``None`` for no limit.
        sink_tokens: tokens of each first prompt that the layers keep in full precision.
    """

    def __init__(self, pool: PagedInt8Pool, max_cache_len: int | None = None, sink_tokens: int = 0):
        self.pool = pool
        self.max_cache_len = max_cache_len
        self.guard = OneThread()
        self.sink_tokens = sink_tokens
        self.padding = Padding()
        #: Whether the cache has layers whose state cannot go back.
        self.beside_recurrent_states = False
        self.groups: dict[str, Group] = {}
        self.books = Books(SequenceState({}, {}))
        pool.access.register(self, self.books)
        self.writer = pool.access.join()
        self.offloaded = pool.offloaded
        self._turn = 0

    def add_room(self, index: int, window: int | None) -> GrowingRoom:
        """Room for one more layer, whose window this is."""
        name = group_name(window)
        if name not in self.groups:
            self.books.state.tables[name] = BlockTable(self.pool.add_group(name, window), self.pool.block_size)
            self.groups[name] = Group(name, self.books, window)
        self.groups[name].num_layers += 1
        if self.offloaded is not None:
            self.offloaded.expect(index, window)
        return GrowingRoom(index, self, self.groups[name])

    def expect(self, layers: Iterable[tuple[int, str, int | None, int, int, int]]) -> None:
        """Know heads and widths of layers before their first keys come, to say what fits into the pool's limit.

        Args:
            layers: index, kind, window, heads, and widths of keys and values of each.
        """
        for index, _, window, heads, dim, v_dim in layers:
            self.pool.forecast.setdefault(group_name(window), {})[index] = heads, dim, v_dim

    # Read in every layer and step, so without a Python function. `SequenceState` says what they are.
    length = property(attrgetter("books.state.length"))
    batch_size = property(attrgetter("books.state.batch_size"))
    first_tokens = property(attrgetter("books.state.first_tokens"))

    @property
    def record_past(self) -> bool:
        """Whether what falls out of a window is kept until the next `truncate`."""
        return self.books.state.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.books.state = self.books.state._replace(record_past=value)

    def advance(
        self, batch: int, new_tokens: int, same_as: list[int] | None = None, first_bytes: int = 0
    ) -> SequenceState:
        """Find blocks for ``new_tokens`` more tokens per sequence, in every group. Returns the state then.

        Args:
            batch: sequences.
            new_tokens: tokens per sequence.
            same_as: for each sequence the first one with the same first prompt, which share its blocks.
            first_bytes: of a first prompt, bytes of the tokens that all layers will keep in full precision.

        Raises:
            ValueError: the batch size changed, or the last forward pass left layers out.
            CacheFullError: ``max_cache_len`` or the pool's budget would be exceeded.
            RuntimeError: an operation was interrupted and could not be undone.
        """
        state = self.books.state
        self.refuse_if_broken()
        if state.batch_size not in (None, batch):
            raise ValueError(
                f"the cache holds {state.batch_size} sequences, but keys of {batch} came; "
                "use one cache per batch, or reset() it first"
            )
        left_out = [index for index, length in state.layer_lengths.items() if length != state.length]
        check_none_left_out(len(state.layer_lengths), left_out, state.step_start, state.length)
        start, stop = state.length, state.length + new_tokens
        if self.max_cache_len is not None and stop > self.max_cache_len:
            raise CacheFullError(
                f"{stop} tokens per sequence asked for, but max_cache_len is {self.max_cache_len}; the cache still "
                f"holds {start}; shorten the prompt, lower max_new_tokens or raise max_cache_len"
            )
        # Short steps read their own tokens from the blocks, like every later token does. Long chunks and first
        # prompts have them at hand in full precision.
        from_blocks = new_tokens == 1 or (start > 0 and new_tokens <= MAX_DECODE_ROWS)
        distinct = batch if same_as is None else len(set(same_as))
        tokens = self.padding.take(batch, stop)
        padding_in_prompt = tokens is not None and not start and not tokens.all()
        first_tokens = state.first_tokens
        if not start and self.sink_tokens:
            prompt = np.ones((batch, new_tokens), bool) if tokens is None else tokens
            first_tokens = FirstTokenPlaces.of_prompt(prompt, self.sink_tokens)
        keep_from, needed = {}, {}
        with self.pool.access.exclusive():
            if not state.record_past:
                state = self._drop_unseen(start)
            tables = state.copied_tables()
            for name, group in self.groups.items():
                keep_from[name] = 0 if from_blocks or state.record_past else group.first_visible(stop)
                needed[name] = tables[name].blocks_needed(distinct, new_tokens, keep_from[name])
            self.pool.ensure_free(needed, first_bytes)
            for name, table in tables.items():
                self.pool.copy(name, table.extend(batch, new_tokens, keep_from[name], same_as))
                if tokens is not None:
                    self.groups[name].epoch += table.drop_unused(_needed(tokens, same_as))
            self.books.state = state._replace(
                tables=tables,
                layer_lengths=dict(state.layer_lengths),
                length=stop,
                batch_size=batch,
                step_start=start,
                from_blocks=from_blocks,
                first_tokens=first_tokens,
                prompt_tokens=torch.from_numpy(tokens) if padding_in_prompt else None,
                same_as=same_as,
                centrings={},
                enough_for_center=MIN_CENTER_TOKENS + (0 if first_tokens is None else first_tokens.earliest),
            )
        return self.books.state

    def unshare(self) -> SequenceState:
        """Give every sequence blocks of its own, which no other sequence and no other cache holds. Returns the state
        then.

        Raises:
            CacheFullError: the pool's budget would be exceeded. Nothing has changed then.
        """
        with self.pool.access.exclusive():
            tables = self.books.state.copied_tables()
            self.pool.ensure_free({name: table.blocks_to_unshare() for name, table in tables.items()})
            for name, table in tables.items():
                self.pool.copy(name, table.unshare())
            self.books.state = self.books.state._replace(tables=tables, same_as=None)
        return self.books.state

    def select(self, rows: list[int]) -> None:
        """Make sequence i what sequence ``rows[i]`` is, sharing its blocks."""
        state, rows_of = self.books.state, np.array(rows, dtype=np.intp)
        first_tokens = None if state.first_tokens is None else state.first_tokens.select(rows_of)
        with self.pool.access.exclusive():
            self._turn = self.pool.access.turn
            tables = state.copied_tables()
            for name, group in self.groups.items():
                tables[name].select(rows_of)
                group.epoch += 1
            self.books.state = state._replace(tables=tables, batch_size=len(rows), first_tokens=first_tokens)

    def truncate(self, length: int, *, keep_recorded: bool = False) -> None:
        """Forget all tokens from position ``length`` on.

        Args:
            length: tokens per sequence to keep.
            keep_recorded: keep what `record_past` has kept until now.

        Raises:
            RuntimeError: tokens that would be visible again have fallen out of a window. Nothing has changed then.
        """
        state = self.books.state
        for group in self.groups.values():
            table = state.tables[group.name]
            if length > 0 and group.first_visible(length) < table.first_held(length):
                raise RuntimeError(
                    f"cannot go back to {length} tokens: of a window of {group.window}, tokens before position "
                    f"{table.first_held(length)} are no longer held; call activate_past_recording() before "
                    "generating"
                )
            if 0 < length < state.length and length % self.pool.block_size:
                lost = np.flatnonzero(table.ids[:, length // self.pool.block_size] == HOLE)
                if len(lost):
                    raise RuntimeError(
                        f"cannot go back to {length} tokens: of sequence {lost[0]} only padding would be left, in a "
                        "block that was given back; take fewer tokens back, or all of them"
                    )
        if length == 0:
            return self.clear()
        if any(held != state.length for held in state.layer_lengths.values()):
            self._undo_centrings()
            state = self.books.state
        first_tokens = state.first_tokens
        if first_tokens is not None and length < first_tokens.limit:
            first_tokens = first_tokens.truncate(length)
        with self.pool.access.exclusive():
            self._turn = self.pool.access.turn
            tables = state.copied_tables()
            for name, group in self.groups.items():
                tables[name].truncate(length)
                group.epoch += 1
                if state.record_past and not keep_recorded:
                    tables[name].drop_before(group.first_visible(length))
            self.books.state = state._replace(
                tables=tables,
                layer_lengths={index: min(held, length) for index, held in state.layer_lengths.items()},
                length=length,
                step_start=min(state.step_start, length),
                first_tokens=first_tokens,
                same_as=None,
                centrings={},
            )

    def clear(self) -> None:
        """Forget all sequences and give their blocks back to the pool, whatever state they are in."""
        state = self.books.state
        if any(held != state.length for held in state.layer_lengths.values()):
            self._undo_centrings()
        tables = {name: BlockTable(table.allocator, table.block_size) for name, table in state.tables.items()}
        with self.pool.access.exclusive():
            self._turn = self.pool.access.turn
            for group in self.groups.values():
                group.epoch += 1
            self.books.state = SequenceState(
                tables, dict.fromkeys(state.layer_lengths, 0), record_past=state.record_past
            )
            for table in state.tables.values():
                table.allocator.release(table.held())

    def _drop_unseen(self, start: int) -> SequenceState:
        """Give back what no query from position ``start`` on sees. This stays true if the step fails. Call it inside
        ``access.exclusive()``."""
        tables = self.books.state.copied_tables()
        dropped = [group for name, group in self.groups.items() if tables[name].drop_before(group.first_visible(start))]
        if dropped:
            for group in dropped:
                group.epoch += 1
            self.books.state = self.books.state._replace(tables=tables)
        return self.books.state

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of keys, values and scales allocated in the pool, all layers, and of slots for offloaded ones."""
        return self.pool.nbytes_allocated

    @property
    def nbytes_used(self) -> int:
        """Bytes of the pool's blocks that hold tokens, all layers."""
        return self.pool.nbytes_used

    def fork(self, layers: list) -> tuple[GrowingSequences, list]:
        """Sequences of their own over the same blocks, and the cache's layers for them."""
        twin = GrowingSequences(self.pool, self.max_cache_len, self.sink_tokens)
        twin.beside_recurrent_states = self.beside_recurrent_states
        for name, group in self.groups.items():
            twin.groups[name] = Group(name, twin.books, group.window)
            twin.groups[name].num_layers = group.num_layers
        with self.pool.access.exclusive():
            twin.books.state = self.books.state.forked()
        return twin, [layer.fork(twin) if hasattr(layer, "room") else copy.deepcopy(layer) for layer in layers]


def _needed(tokens: np.ndarray, same_as: list[int] | None) -> np.ndarray:
    """Where blocks are needed, bool ``[batch, length]``, given where tokens are."""
    if same_as is None:
        return tokens
    needed = tokens.copy()
    for row, first in enumerate(same_as):
        # The first of equal prompts writes for all: its padding may be tokens of another.
        needed[first] |= tokens[row]
    return needed
