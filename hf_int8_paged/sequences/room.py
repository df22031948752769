"""What a cache layer asks of the place where its tokens lie: the one interface of both ways of finding room."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ..kernels import Backend, FirstTokens, KvCacheQuant, Scoring, Tokens
from ..layer_checks import LayerShape
from ..offloading.storages import Blocks
from ..seam.views import PagedView


class Step(Protocol):
    """What all layers know of the newest step.

    Attributes:
        from_blocks: whether attention reads the newest tokens from the blocks.
        prompt_tokens: in a padded first prompt's step: bool ``[batch, tokens]`` on the host, False for padding.
        enough_for_center: tokens from which on the step may center the keys late; 0 if it never does.
    """

    @property
    def from_blocks(self) -> bool: ...

    @property
    def prompt_tokens(self) -> torch.Tensor | None: ...

    @property
    def enough_for_center(self) -> int: ...


class CanTakeBack(Protocol):
    """Sequences of a cache, whichever way room is found.

    Attributes:
        beside_recurrent_states: whether the cache has layers whose state cannot go back.
        broken: name of an operation that was interrupted and could not be undone, or None.
    """

    beside_recurrent_states: bool
    broken: str | None

    def take_back(self, length: int | None = None) -> None:
        """Take back what some layers have stored of a step that an exception ended; see `GrowingSequences`."""


class Room(Protocol):
    """Room for the tokens of one layer: `GrowingRoom` finds it step by step, `PreallocatedRoom` has it from the start.

    Attributes:
        preallocated: which of the two it is.
        index: of the layer in the model.
        storages: the layer's blocks by its index, perhaps among those of others: nothing before the first keys.
            Whoever takes them from here may write to all of them.
        for_reading: the same for who only reads.
        for_appending: the same for a step's new tokens, and nothing else.
        window: sliding window in tokens (a query sees ``window`` positions, its own included), or ``None``.
        shape: heads, widths and device of keys and values; None before the first ones.
        dtypes: that dense keys and values are shown in.
        backend: whose kernels the layer uses.
        epoch: counts the times that tokens were dropped or moved; views made before are no longer valid.
        length: tokens per sequence that the layer holds. Waits for the device after compiled steps.
        batch_size: sequences; None before the first token.
        writer: entered while a kernel writes.
    """

    preallocated: bool
    index: int
    window: int | None
    dtypes: tuple[torch.dtype, torch.dtype]

    @property
    def storages(self) -> dict[int, KvCacheQuant]: ...

    @property
    def for_reading(self) -> Blocks: ...

    @property
    def for_appending(self) -> Blocks: ...

    @property
    def shape(self) -> LayerShape | None: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def writer(self) -> AbstractContextManager[Any]: ...

    @property
    def epoch(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def batch_size(self) -> int | None: ...

    @property
    def sequences(self) -> CanTakeBack:
        """Of the whole cache."""

    @property
    def storage(self) -> KvCacheQuant:
        """The layer's blocks."""

    def begin(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> Step:
        """Find room for a step's keys and values, which are checked. The first layer of a step does it for all.

        Raises:
            ValueError: another batch size, or a forward pass was interrupted or has left layers out.
            CacheFullError: a limit is reached. Nothing has changed then.
            RuntimeError: an operation was interrupted and could not be undone.
        """

    def allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Have blocks for the heads, widths and device of the layer's first keys and values, in place of those for
        others."""

    def center(self, keys: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """In the first prompt: subtract the mean of its keys from all that come, if they are enough.

        Args:
            keys: ``[batch, num_kv_heads, tokens, head_dim]``.
            tokens: bool ``[batch, tokens]`` on the host, False for padding, which does not count; ``None`` without.
        """

    @property
    def lacks_center(self) -> bool:
        """Whether the keys are to be centred, are not yet, and still can be."""

    def center_late(self, keys: torch.Tensor) -> bool:
        """Center the keys when they are enough for the first time.

        Args:
            keys: float32, of all tokens: those that are stored, and the step's.

        Returns:
            Whether the stored ones are to be stored once more.
        """

    def keep_first_tokens(self, keys: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor | None) -> None:
        """Keep the first of a prompt's tokens in full precision, as many as the cache was asked for."""

    def first_tokens(self, first_visible: int) -> FirstTokens | None:
        """Those in full precision, or ``None`` if all stand before position ``first_visible``."""

    def overwrites(self, stop: int) -> bool:
        """Whether tokens up to position ``stop`` overwrite what the first of a long chunk still sees."""

    def to_write(
        self, keys: torch.Tensor, values: torch.Tensor, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
        """Those of a step's keys and values that are written, and where."""

    def wrote(self, stop: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        """The layer holds tokens up to position ``stop`` now, the newest of these dtypes."""

    def tokens(self) -> Tokens:
        """Where the tokens lie, with the newest step's lengths."""

    def tokens_for(self, stop: int, rows: int, fresh: bool) -> Tokens:
        """The same for attention of ``rows`` rows up to position ``stop``, whose own tokens may be at hand."""

    @property
    def newest_from_blocks(self) -> bool:
        """Whether dense keys and values of the newest step are, or may be, a dequantized copy."""

    def first_shown(self, position: int) -> int:
        """Position of the first token in views for a query at ``position``."""

    def blank_views(self, tokens: int) -> tuple[PagedView, PagedView]:
        """Views of so many keys and values, without content."""

    def checked(self, result: torch.Tensor) -> torch.Tensor:
        """``result``, or NaN in its place where only the device knows that the newest step did not fit."""

    def attend_on_device(self, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Attention within a compiled graph, where nothing of the host may be used."""

    @property
    def first_tokens_nbytes(self) -> int:
        """Bytes of the tokens in full precision."""

    @property
    def long_chunks(self) -> bool:
        """Whether a kernel serves long chunks over a past in blocks."""
