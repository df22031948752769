"""The sequences of one cache: a block table per layer group, all advanced together, before any layer writes."""

from __future__ import annotations

import numpy as np
import torch

from .block_allocator import HOLE
from .block_table import BlockTable
from .kernels import MAX_DECODE_ROWS
from .layer_checks import check_none_left_out
from .layer_group import Group
from .one_thread import OneThread
from .pool import CacheFullError, PagedInt8Pool
from .sink_places import SinkPlaces


class Sequences:
    """Lengths and block tables of one cache's sequences.

    The first layer that a forward pass updates calls `advance`, which finds blocks for the new tokens in
    every group. If that fails, nothing has changed; after it, no layer can run out of blocks.

    Args:
        pool: where the blocks come from.
        max_cache_len: most tokens per sequence, or ``None`` for no limit.
        sink_tokens: tokens of each first prompt that the layers keep in full precision.
    """

    def __init__(self, pool: PagedInt8Pool, max_cache_len: int | None = None, sink_tokens: int = 0):
        self.pool = pool
        self.writer = pool.access.join()
        self.max_cache_len = max_cache_len
        self.guard = OneThread()
        self.sink_tokens = sink_tokens
        #: Where those are; None if there are none.
        self.sinks: SinkPlaces | None = None
        self.groups: dict[str, Group] = {}
        #: Tokens that each layer holds: ``length``, or ``step_start`` for those that the current step has yet to reach.
        self.layer_lengths: dict[int, int] = {}
        self.length = 0
        self.batch_size: int | None = None
        #: Where the newest tokens start, and whether attention reads them from the blocks.
        self.step_start = 0
        self.from_blocks = False
        #: In the first prompt's step, once it is known: bool ``[batch, tokens]`` on the host, False for padding.
        self.prompt_tokens: torch.Tensor | None = None
        #: In the first prompt's step: for each sequence, the first one with the same prompt; None if all differ.
        self.same_as: list[int] | None = None
        self._padding_known_to = 0
        #: Keep blocks that fall out of a window until the next `truncate`, so that it can bring them back.
        self.record_past = False

    def __del__(self) -> None:
        # A pool may outlive this cache.
        if hasattr(self, "groups"):
            self.pool.access.clear_later([group.table for group in self.groups.values()])

    def add_group(self, window: int | None) -> Group:
        """The group of layers with this window, made if need be."""
        name = "full_attention" if window is None else f"sliding_attention_{window}"
        if name not in self.groups:
            table = BlockTable(self.pool.add_group(name), self.pool.block_size)
            self.groups[name] = Group(name, table, window)
        self.groups[name].num_layers += 1
        return self.groups[name]

    @property
    def padding(self) -> int:
        """Tokens of padding that stand in front of every sequence, as far as it is known."""
        return 0 if self.sinks is None else self.sinks.earliest

    def advance(self, batch: int, new_tokens: int, same_as: list[int] | None = None) -> None:
        """Find blocks for ``new_tokens`` more tokens per sequence, in every group.

        Args:
            batch: sequences.
            new_tokens: tokens per sequence.
            same_as: for each sequence the first one with the same first prompt, which share its blocks.

        Raises:
            ValueError: the batch size changed, or the last forward pass left layers out.
            CacheFullError: ``max_cache_len`` or the pool's budget would be exceeded.
        """
        if self.batch_size not in (None, batch):
            raise ValueError(
                f"the cache holds {self.batch_size} sequences, but keys of {batch} came; "
                "use one cache per batch, or reset() it first"
            )
        left_out = [index for index, length in self.layer_lengths.items() if length != self.length]
        check_none_left_out(len(self.layer_lengths), left_out, self.step_start, self.length)
        start, stop = self.length, self.length + new_tokens
        if self.max_cache_len is not None and stop > self.max_cache_len:
            raise CacheFullError(
                f"{stop} tokens per sequence asked for, but max_cache_len is {self.max_cache_len}; the cache still "
                f"holds {start}; shorten the prompt, lower max_new_tokens or raise max_cache_len"
            )
        # Short steps read their own tokens from the blocks, like every later token does. Long chunks and first
        # prompts have them at hand in full precision.
        from_blocks = new_tokens == 1 or (start > 0 and new_tokens <= MAX_DECODE_ROWS)
        distinct = batch if same_as is None else len(set(same_as))
        keep_from, needed = {}, {}
        with self.pool.access.exclusive():
            for name, group in self.groups.items():
                if not self.record_past:
                    group.epoch += group.table.drop_before(group.first_visible(start))
                keep_from[name] = 0 if from_blocks or self.record_past else group.first_visible(stop)
                needed[name] = group.table.blocks_needed(distinct, new_tokens, keep_from[name])
            self.pool.ensure_free(needed)
            for name, group in self.groups.items():
                self.pool.copy(name, group.table.extend(batch, new_tokens, keep_from[name], same_as))
                group.changed()
        self.step_start, self.length, self.batch_size, self.from_blocks = start, stop, batch, from_blocks
        self.same_as, self.prompt_tokens = same_as, None
        if not start and self.sink_tokens:
            self.sinks = SinkPlaces.of_prompt(np.ones((batch, new_tokens), bool), self.sink_tokens)

    def unshare(self) -> None:
        """Give every sequence blocks of its own, which no other sequence and no other cache holds.

        Raises:
            CacheFullError: the pool's budget would be exceeded. Nothing has changed then.
        """
        with self.pool.access.exclusive():
            self.pool.ensure_free({name: group.table.blocks_to_unshare() for name, group in self.groups.items()})
            for name, group in self.groups.items():
                self.pool.copy(name, group.table.unshare())
                group.changed()
        self.same_as = None

    def drop_padding(self, used: torch.Tensor) -> bool:
        """Give back the blocks that hold nothing but padding. What follows left padding is a sequence's first token,
        and in the first prompt the keys of padding do not count for their mean.

        Args:
            used: bool ``[batch, tokens]``, False for padding. Read on the host: one wait per padded
                prompt, in its first layer.

        Returns:
            Whether the first prompt turned out to be padded, after the current layer and no other has stored it.
        """
        if self._padding_known_to == self.length:
            return False
        self._padding_known_to = self.length
        tokens = used.cpu().numpy()
        needed = tokens.copy()
        for row, first in enumerate(self.same_as or ()):
            # The first of equal prompts writes for all: its padding may be tokens of another.
            needed[first] |= tokens[row]
        with self.pool.access.exclusive():
            for group in self.groups.values():
                if group.table.drop_unused(needed):
                    group.epoch += 1
                    group.changed()
        # Layers that have stored theirs already would not follow.
        only_layer = sum(held == self.length for held in self.layer_lengths.values()) == 1
        tokens = tokens[:, : self.length]
        if self.step_start or not only_layer or tokens.shape[1] < self.length or tokens.all():
            return False
        self.prompt_tokens = torch.from_numpy(tokens)
        if self.sinks is not None:
            self.sinks = SinkPlaces.of_prompt(tokens, self.sink_tokens)
        return True

    def select(self, rows: list[int]) -> None:
        """Make sequence i what sequence ``rows[i]`` is, sharing its blocks."""
        with self.pool.access.exclusive():
            for group in self.groups.values():
                group.table.select(rows)
                group.epoch += 1
                group.changed()
        self.batch_size = len(rows)
        if self.sinks is not None:
            self.sinks = self.sinks.select(rows)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on.

        Raises:
            RuntimeError: tokens that would be visible again have fallen out of a window. Nothing has changed then.
        """
        for group in self.groups.values():
            if length > 0 and group.first_visible(length) < group.table.first_held(length):
                raise RuntimeError(
                    f"cannot go back to {length} tokens: of a window of {group.window}, tokens before position "
                    f"{group.table.first_held(length)} are no longer held; call activate_past_recording() before "
                    "generating"
                )
            if 0 < length < self.length and length % self.pool.block_size:
                lost = np.flatnonzero(group.table.ids[:, length // self.pool.block_size] == HOLE)
                if len(lost):
                    raise RuntimeError(
                        f"cannot go back to {length} tokens: of sequence {lost[0]} only padding would be left, in a "
                        "block that was given back; take fewer tokens back, or all of them"
                    )
        with self.pool.access.exclusive():
            for group in self.groups.values():
                group.table.truncate(length)
                group.epoch += 1
                if self.record_past:
                    group.table.drop_before(group.first_visible(length))
                group.changed()
        self.length = length
        self.layer_lengths = {index: min(held, length) for index, held in self.layer_lengths.items()}
        if self.sinks is not None and length < self.sinks.limit:
            self.sinks = self.sinks.truncate(length)
        if length == 0:
            self.clear()

    def take_back(self) -> None:
        """Take back what some layers have stored of a step that the others refused."""
        self.truncate(self.step_start)

    def clear(self) -> None:
        """Forget all sequences and give their blocks back to the pool."""
        with self.pool.access.exclusive():
            for group in self.groups.values():
                group.table.clear()
                group.epoch += 1
                group.changed()
        self.layer_lengths = dict.fromkeys(self.layer_lengths, 0)
        self.length = self.step_start = self._padding_known_to = 0
        self.batch_size = self.sinks = None

    def fork(self) -> Sequences:
        """Sequences of their own over the same blocks."""
        twin = Sequences(self.pool, self.max_cache_len, self.sink_tokens)
        with self.pool.access.exclusive():
            for name, group in self.groups.items():
                twin.groups[name] = Group(name, group.table.fork(), group.window)
                twin.groups[name].num_layers = group.num_layers
        twin.layer_lengths = dict(self.layer_lengths)
        twin.length, twin.batch_size, twin.step_start = self.length, self.batch_size, self.step_start
        twin.from_blocks, twin.record_past = self.from_blocks, self.record_past
        twin.sinks = self.sinks
        return twin
