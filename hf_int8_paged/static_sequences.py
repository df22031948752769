"""The sequences of a preallocated cache: what the host knows of lengths that live on the device.

Eager steps count tokens on the host as well, so that a step that does not fit is refused without waiting for the
device. Compiled steps count on the device only; the host reads the lengths again when it next needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .layer_checks import check_none_left_out, refuse_broken, way_back
from .one_thread import OneThread
from .pool import CacheFullError

if TYPE_CHECKING:
    from .static_layers import PagedInt8StaticLayer


class StaticSequences:
    """Lengths of one preallocated cache's sequences, which all have the same.

    Args:
        max_batch_size: most sequences.
        max_cache_len: most tokens per sequence.
    """

    def __init__(self, max_batch_size: int, max_cache_len: int):
        self.max_batch_size = max_batch_size
        self.max_cache_len = max_cache_len
        self.guard = OneThread()
        self.layers: list[PagedInt8StaticLayer] = []
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
        for layer in self.layers:
            layer.count_again()
        lengths = [layer.length for layer in self.layers]
        self._length = max(lengths, default=0)
        # Where some layers were compiled and others not, the step is still under way.
        self.step_start = min(lengths, default=0)
        self.known = True

    def begin(self, layer: PagedInt8StaticLayer, batch: int, new_tokens: int) -> int:
        """Where a layer's new tokens start. The first layer of a step begins it for all.

        Raises:
            ValueError: another batch size, or a step that left layers out or was interrupted. Nothing has changed then.
            CacheFullError: the tokens do not fit. Nothing has changed then.
            RuntimeError: an operation was interrupted and could not be undone.
        """
        self.count_again()
        # What goes before this line changes nothing, and what goes after it is undone if an exception ends it.
        start = self.guard.inside["start"] = layer.length
        stop = start + new_tokens
        if start != self._length:
            if start != self.step_start or stop != self._length or batch != self.batch_size:
                raise ValueError(
                    f"layer {layer.index} holds {start} tokens and got {new_tokens} more for {batch} sequences, while "
                    f"the layers before it hold {self._length} for {self.batch_size}; if a forward pass was "
                    f"interrupted, {way_back(self.step_start, self._length)}"
                )
            return start
        self.refuse_if_broken()
        self.check_batch(batch)
        behind = [other for other in self.layers if other.length != start]
        kept = min((other.length for other in behind), default=start)
        check_none_left_out(len(self.layers), [other.index for other in behind], kept, start)
        if stop > self.max_cache_len:
            raise CacheFullError(
                f"{stop} tokens per sequence asked for, but max_cache_len is {self.max_cache_len}; the cache still "
                f"holds {start}; shorten the prompt, lower max_new_tokens or make a longer cache"
            )
        self.step_start, self._length, self.batch_size = start, stop, batch
        return start

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
            can_undo: of no use here; see `Sequences`.
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
        if all(layer.holds_window_of(length) for layer in self.layers):
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
            for layer in self.layers:
                if layer.length > length and not layer.holds_window_of(length):
                    raise RuntimeError(
                        f"cannot go back to {length} tokens: of the window of {layer.window} of layer {layer.index}, "
                        f"tokens before position {layer.first_held} are overwritten; a preallocated window can give "
                        f"back {layer.most_to_crop} tokens: let fewer candidates be drafted, use a cache that grows, "
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
        for layer in self.layers:
            layer.select(kept)
        self.batch_size = len(kept)

    def _set_length(self, length: int) -> None:
        for layer in self.layers:
            layer.truncate(length)
        self._length = self.step_start = length
        if not length:
            self.batch_size, self.known = None, True
