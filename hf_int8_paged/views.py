"""Lazy keys and values: what a paged int8 layer's ``update`` returns.

transformers hands the keys and values that a cache returns to an attention function. A `PagedView` stands for the
dense tensor in both senses: our attention function recognises it and reads the int8 blocks; any other operation
gets the dequantized dense tensor. So every attention implementation computes the right thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only


class BackedLayer(Protocol):
    """What a view needs of a cache layer."""

    @property
    def epoch(self) -> int: ...

    def gather(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]: ...

    def note_dense_read(self) -> None: ...


class HandOver:
    """The way from ``update`` to the attention function in a compiled graph, where no view can be made.

    It holds the very tensors that ``update`` returned, and their layer. Whoever takes them empties it, or they would
    become outputs of the graph.
    """

    layer: Any = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None


_handed_over = HandOver()


def hand_over(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Note that these dense keys and values stand for this layer's blocks."""
    _handed_over.layer, _handed_over.keys, _handed_over.values = layer, keys, values


def take_over(keys: torch.Tensor, values: torch.Tensor) -> Any:
    """The layer that these keys and values were noted for, or None; forgets them."""
    layer = _handed_over.layer if _handed_over.keys is keys and _handed_over.values is values else None
    _handed_over.layer = _handed_over.keys = _handed_over.values = None
    return layer


class PagedView(torch.Tensor):
    """A tensor of shape ``[batch, num_kv_heads, tokens, head_dim]`` without storage, backed by a layer's blocks.

    Attributes:
        layer: the cache layer.
        is_values: whether this is the layer's values, else its keys.
        start: position of the first token.
        stop: position after the last token.
        fresh: the full-precision rows of the newest tokens if attention should see those instead of their
            quantized image, else ``None``.
    """

    layer: Any
    is_values: bool
    start: int
    stop: int
    fresh: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        layer: BackedLayer,
        is_values: bool,
        shape: tuple[int, int, int, int],
        like: torch.Tensor,
        start: int,
        fresh: torch.Tensor | None,
    ):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(
        self,
        layer: BackedLayer,
        is_values: bool,
        shape: tuple[int, int, int, int],
        like: torch.Tensor,
        start: int,
        fresh: torch.Tensor | None,
    ):
        self.layer = layer
        self.is_values = is_values
        self.start = start
        self.stop = start + shape[2]
        self.fresh = fresh
        self._epoch = layer.epoch
        self._dense: torch.Tensor | None = None

    # Operations reach __torch_dispatch__ as they are, not wrapped a second time.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def dense(self) -> torch.Tensor:
        """The dense tensor: dequantized past, and the newest tokens in full precision where ``fresh`` has them.

        Raises:
            RuntimeError: the layer has dropped or moved tokens since the view was made.
        """
        if self._dense is None:
            if self._epoch != self.layer.epoch:
                raise RuntimeError(
                    "these keys and values stand for tokens that the cache has since dropped or moved; "
                    "read them before the cache changes, or clone() them"
                )
            past_stop = self.stop - (0 if self.fresh is None else self.fresh.shape[2])
            past = None
            if past_stop > self.start:
                past = self.layer.gather(self.start, past_stop, self.dtype)[self.is_values]
            parts = [x for x in (past, self.fresh) if x is not None]
            self._dense = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return self._dense

    @property
    def from_blocks(self) -> bool:
        """Whether the blocks hold everything that attention should see."""
        return self.fresh is None

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        kind = "values" if self.is_values else "keys"
        return (
            f"PagedView({kind} of positions {self.start} to {self.stop}, shape={tuple(self.shape)}, dtype={self.dtype})"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        layer = next(x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, PagedView)).layer
        layer.note_dense_read()
        args, kwargs = tree_map_only(PagedView, PagedView._contiguous, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _contiguous(self) -> torch.Tensor:
        """The dense tensor with the strides that this view claims to have: ``view`` relies on them."""
        self._dense = self.dense().contiguous()
        return self._dense
