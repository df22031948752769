"""The sequences of one cache: a block table per layer group, all advanced together, before any layer writes."""

from __future__ import annotations

from operator import attrgetter

import numpy as np
import torch

from .block_allocator import HOLE
from .block_table import BlockTable
from .kernels import MAX_DECODE_ROWS
from .layer_checks import check_none_left_out
from .layer_group import Group
from .one_thread import OneThread
from .pool import MIN_CENTER_TOKENS, CacheFullError, PagedInt8Pool
from .pool_access import Books
from .sequence_recovery import SequenceRecovery
from .sequence_state import SequenceState
from .sink_places import SinkPlaces


class Sequences(SequenceRecovery):
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
        self.groups: dict[str, Group] = {}
        self.books = Books(SequenceState({}, {}))
        pool.access.register(self, self.books)
        self.writer = pool.access.join()
        self._turn = 0

    def add_group(self, window: int | None) -> Group:
        """The group of layers with this window, made if need be."""
        name = "full_attention" if window is None else f"sliding_attention_{window}"
        if name not in self.groups:
            self.books.state.tables[name] = BlockTable(self.pool.add_group(name), self.pool.block_size)
            self.groups[name] = Group(name, self.books, window)
        self.groups[name].num_layers += 1
        return self.groups[name]

    # Read in every layer and step, so without a Python function. `SequenceState` says what they are.
    length = property(attrgetter("books.state.length"))
    batch_size = property(attrgetter("books.state.batch_size"))
    step_start = property(attrgetter("books.state.step_start"))
    from_blocks = property(attrgetter("books.state.from_blocks"))
    sinks = property(attrgetter("books.state.sinks"))
    same_as = property(attrgetter("books.state.same_as"))

    @property
    def record_past(self) -> bool:
        """Whether what falls out of a window is kept until the next `truncate`."""
        return self.books.state.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.books.state = self.books.state._replace(record_past=value)

    def advance(self, batch: int, new_tokens: int, same_as: list[int] | None = None) -> SequenceState:
        """Find blocks for ``new_tokens`` more tokens per sequence, in every group. Returns the state then.

        Args:
            batch: sequences.
            new_tokens: tokens per sequence.
            same_as: for each sequence the first one with the same first prompt, which share its blocks.

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
        sinks = state.sinks
        if not start and self.sink_tokens:
            sinks = SinkPlaces.of_prompt(np.ones((batch, new_tokens), bool), self.sink_tokens)
        keep_from, needed = {}, {}
        with self.pool.access.exclusive():
            if not state.record_past:
                state = self._drop_unseen(start)
            tables = state.copied_tables()
            for name, group in self.groups.items():
                keep_from[name] = 0 if from_blocks or state.record_past else group.first_visible(stop)
                needed[name] = tables[name].blocks_needed(distinct, new_tokens, keep_from[name])
            self.pool.ensure_free(needed)
            for name, table in tables.items():
                self.pool.copy(name, table.extend(batch, new_tokens, keep_from[name], same_as))
            self.books.state = state._replace(
                tables=tables,
                layer_lengths=dict(state.layer_lengths),
                length=stop,
                batch_size=batch,
                step_start=start,
                from_blocks=from_blocks,
                sinks=sinks,
                prompt_tokens=None,
                same_as=same_as,
                centrings={},
                enough_for_center=MIN_CENTER_TOKENS + (0 if sinks is None else sinks.earliest),
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

    def drop_padding(self, used: torch.Tensor) -> bool:
        """Give back the blocks that hold nothing but padding. What follows left padding is a sequence's first token,
        and in the first prompt the keys of padding do not count for their mean.

        Args:
            used: bool ``[batch, tokens]``, False for padding. Read on the host: one wait per padded
                prompt, in its first layer.

        Returns:
            Whether the first prompt turned out to be padded, after the current layer and no other has stored it.
        """
        state = self.books.state
        if state.padding_known_to == state.length:
            return False
        tokens = used.cpu().numpy()
        needed = tokens.copy()
        for row, first in enumerate(state.same_as or ()):
            # The first of equal prompts writes for all: its padding may be tokens of another.
            needed[first] |= tokens[row]
        # Layers that have stored theirs already would not follow.
        only_layer = sum(held == state.length for held in state.layer_lengths.values()) == 1
        prompt = tokens[:, : state.length]
        padded = not state.step_start and only_layer and prompt.shape[1] == state.length and not prompt.all()
        prompt_tokens, sinks = state.prompt_tokens, state.sinks
        if padded:
            prompt_tokens = torch.from_numpy(prompt)
            if sinks is not None:
                sinks = SinkPlaces.of_prompt(prompt, self.sink_tokens)
        with self.pool.access.exclusive():
            tables = state.copied_tables()
            for name, group in self.groups.items():
                group.epoch += tables[name].drop_unused(needed)
            self.books.state = state._replace(
                tables=tables, padding_known_to=state.length, prompt_tokens=prompt_tokens, sinks=sinks
            )
        return padded

    def select(self, rows: list[int]) -> None:
        """Make sequence i what sequence ``rows[i]`` is, sharing its blocks."""
        state = self.books.state
        sinks = None if state.sinks is None else state.sinks.select(rows)
        with self.pool.access.exclusive():
            self._turn = self.pool.access.turn
            tables = state.copied_tables()
            for name, group in self.groups.items():
                tables[name].select(rows)
                group.epoch += 1
            self.books.state = state._replace(tables=tables, batch_size=len(rows), sinks=sinks)

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
        sinks = state.sinks
        if sinks is not None and length < sinks.limit:
            sinks = sinks.truncate(length)
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
                sinks=sinks,
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
                table.allocator.release(table.held().tolist())

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

    def fork(self) -> Sequences:
        """Sequences of their own over the same blocks."""
        twin = Sequences(self.pool, self.max_cache_len, self.sink_tokens)
        for name, group in self.groups.items():
            twin.groups[name] = Group(name, twin.books, group.window)
            twin.groups[name].num_layers = group.num_layers
        with self.pool.access.exclusive():
            twin.books.state = self.books.state.forked()
        return twin
