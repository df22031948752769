"""The sequences of a preallocated cache: what the host knows of lengths that live on the device.

Eager steps count tokens on the host as well, so that a step that does not fit is refused without waiting for the
device. Compiled steps count on the device only; the host reads the lengths again when it next needs them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from ..full import CacheFullError
from ..kernels import MAX_DECODE_ROWS
from ..layer_checks import check_none_left_out, interrupted, refuse_broken
from ..one_thread import OneThread
from ..options import PoolOptions
from ..seam.padding import Padding
from .preallocated_room import PreallocatedRoom


class PreallocatedStep(NamedTuple):
    """The newest eager step; see `Step`.

    Attributes:
        span: tokens before it and after it.
    """

    from_blocks: bool = False
    prompt_tokens: torch.Tensor | None = None
    enough_for_center: int = 0
    span: tuple[int, int] = (0, 0)


class PreallocatedSequences:
    """Lengths of one preallocated cache's sequences, which all have the same.

    Args:
        max_batch_size: most sequences.
        max_cache_len: most tokens per sequence.
        options: what blocks are like.
        sink_tokens: first tokens of a sequence that are kept in full precision.
    """

    def __init__(self, max_batch_size: int, max_cache_len: int, options: PoolOptions, sink_tokens: int):
        self.max_batch_size = max_batch_size
        self.max_cache_len = max_cache_len
        self.options = options
        self.sink_tokens = sink_tokens
        self.guard = OneThread()
        self.padding = Padding()
        #: Whether the cache has layers whose state cannot go back.
        self.beside_recurrent_states = False
        #: No layer leaves its device.
        self.offloaded = None
        self.rooms: list[PreallocatedRoom] = []
        #: By layer, heads and widths as the config has them, for layers whose first keys have yet to come.
        self.forecast: dict[int, tuple[int, int, int]] = {}
        self.step = PreallocatedStep()
        #: Number of sequences; None before the first token.
        self.batch_size: int | None = None
        #: Where the newest step starts, for layers that it has yet to reach.
        self.step_start = 0
        #: Whether the host's counts are right. A compiled step makes this False, which no compiled step reads.
        self.known = True
        #: Whether a CUDA graph was captured by hand around a step: it may be replayed at any time, which the host
        #: does not see, so its counts are not trusted any more.
        self.captured = False
        #: What ``generate`` asks for before it drafts tokens. Rings always keep the tokens that they have room for.
        self.record_past = False
        #: Name of an operation that was interrupted and could not be undone, or None.
        self.broken: str | None = None
        #: Counts the operations that have begun to change the layers.
        self._changes = 0
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens per sequence. Waits for the device after compiled steps."""
        self.count_again()
        return self._length

    def count_again(self) -> None:
        """Read from the device what compiled steps have made of the lengths."""
        if self.known and not self.captured:
            return
        for room in self.rooms:
            room.count_again()
        lengths = [room.counted for room in self.rooms]
        self._length = max(lengths, default=0)
        # Where some layers were compiled and others not, the step is still under way.
        self.step_start = min(lengths, default=0)
        self.known = True

    def add_room(self, index: int, window: int | None) -> PreallocatedRoom:
        """Room for one more layer, whose window this is."""
        self.rooms.append(PreallocatedRoom(index, self, window))
        return self.rooms[-1]

    def expect(self, layers: Iterable[tuple[int, str, int | None, int, int, int]]) -> None:
        """Know heads and widths of layers before their first keys come; see `GrowingSequences.expect`."""
        for index, _, _, heads, dim, v_dim in layers:
            self.forecast[index] = heads, dim, v_dim

    def begin(self, room: PreallocatedRoom, start: int, keys: torch.Tensor) -> PreallocatedStep:
        """Begin a step of a layer that holds ``start`` tokens; the first layer does it for all. See `Room.begin`."""
        batch, new_tokens = keys.shape[0], keys.shape[2]
        stop = start + new_tokens
        if start != self._length:
            if start != self.step_start or stop != self._length or batch != self.batch_size:
                raise interrupted(room.index, start, keys, self)
            if self.step.span != (start, stop):  # a compiled layer has begun it
                self.step = self._step(start, stop, batch)
            return self.step
        self.refuse_if_broken()
        self.check_batch(batch)
        behind = [other for other in self.rooms if other.counted != start]
        kept = min((other.counted for other in behind), default=start)
        check_none_left_out(len(self.rooms), [other.index for other in behind], kept, start)
        if stop > self.max_cache_len:
            raise CacheFullError(
                f"{stop} tokens per sequence asked for, but max_cache_len is {self.max_cache_len}; the cache still "
                f"holds {start}; shorten the prompt, lower max_new_tokens or make a longer cache"
            )
        self.step = self._step(start, stop, batch)
        self.step_start, self._length, self.batch_size = start, stop, batch
        return self.step

    def _step(self, start: int, stop: int, batch: int) -> PreallocatedStep:
        tokens = self.padding.take(batch, stop)
        padded = tokens is not None and not start and not tokens.all()
        return PreallocatedStep(
            from_blocks=stop == start + 1 or (start > 0 and stop - start <= MAX_DECODE_ROWS),
            prompt_tokens=torch.from_numpy(tokens) if padded else None,
            span=(start, stop),
        )

    def check_batch(self, batch: int) -> None:
        """Raise ``ValueError`` unless a step may come for so many sequences."""
        if batch > self.max_batch_size:
            raise ValueError(f"keys of {batch} sequences came, but max_batch_size is {self.max_batch_size}")
        if self.batch_size is not None and batch != self.batch_size:
            raise ValueError(
                f"the cache holds {self.batch_size} sequences, but keys of {batch} came; "
                "use one cache per batch, or reset() it first"
            )

    def refuse_if_broken(self) -> None:
        """Raise ``RuntimeError`` if an operation was interrupted and could not be undone."""
        refuse_broken(self.broken)

    def checkpoint(self) -> int:
        """What `restore` needs to know that an operation has begun to change something."""
        return self._changes

    def restore(self, before: int, operation: str, *, can_undo: bool = False) -> None:
        """Note that an exception ended an operation which had begun to change the layers: tokens that were moved in
        place cannot be moved back.

        Args:
            before: what `checkpoint` returned before the operation.
            operation: its name, for messages.
            can_undo: of no use here; see `GrowingSequences`.
        """
        if self._changes != before:
            self.broken = operation

    def take_back(self, length: int | None = None) -> None:
        """Take back what some layers have stored of a step that an exception ended, where that can be done.

        Args:
            length: tokens to go back to, those before the step; ``None`` for where the newest step starts.
        """
        length = self.step_start if length is None else length
        if length >= self._length:
            return
        if all(room.holds_window_of(length) for room in self.rooms):
            self._set_length(length)
        else:
            self.broken = "a step"

    def clear(self) -> None:
        """Forget all tokens, whatever state they are in."""
        self._changes += 1
        self._set_length(0)
        self.broken = None

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on, also those of an interrupted step.

        Raises:
            RuntimeError: tokens that would be visible again are overwritten in a window. Nothing has changed then.
        """
        if length == self.length:
            return
        if length < self._length:
            for room in self.rooms:
                if room.counted > length and not room.holds_window_of(length):
                    raise RuntimeError(
                        f"cannot go back to {length} tokens: of the window of {room.window} of layer {room.index}, "
                        f"tokens before position {room.first_held} are overwritten; a preallocated window can give "
                        f"back {room.most_to_crop} tokens: let fewer candidates be drafted, use a cache that grows, "
                        "or reset()"
                    )
        self._changes += 1
        self._set_length(length)

    def select(self, rows: Sequence[int]) -> None:
        """Make sequence i what sequence ``rows[i]`` is, by copying blocks. Nothing happens to a cache without tokens.

        Raises:
            ValueError: more sequences than ``max_batch_size``. Nothing has changed then.
            IndexError: a sequence that is not there. Nothing has changed then.
        """
        if self.batch_size is None:
            return
        if not 1 <= len(rows) <= self.max_batch_size:
            raise ValueError(f"{len(rows)} sequences asked for, but max_batch_size is {self.max_batch_size}")
        wrong = [row for row in rows if not -self.batch_size <= row < self.batch_size]
        if wrong:
            raise IndexError(f"sequence {wrong[0]} asked for, but the cache holds {self.batch_size}")
        kept = [row % self.batch_size for row in rows]
        self._changes += 1
        for room in self.rooms:
            room.select(kept)
        self.batch_size = len(kept)

    def take_over(self, length: int, batch_size: int | None) -> None:
        """Be what other sequences were, whose tokens all layers hold already."""
        self._length = self.step_start = length
        self.batch_size = batch_size

    def _set_length(self, length: int) -> None:
        for room in self.rooms:
            room.truncate(length)
        self._length = self.step_start = length
        self.step = PreallocatedStep()
        if not length:
            self.batch_size, self.known = None, True

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of keys, values and scales allocated, all layers."""
        return sum(room.storage.nbytes for room in self.rooms if room.memory is not None)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks that hold tokens, all layers."""
        return sum(room.nbytes_used for room in self.rooms)

    def fork(self, layers: list) -> tuple[PreallocatedSequences, list]:
        """Copies of everything, and the cache's layers for them."""
        return copy.deepcopy((self, layers))
