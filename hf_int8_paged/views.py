"""Lazy keys and values: what a paged int8 layer's ``update`` returns.

transformers hands the keys and values that a cache returns to an attention function. A `PagedView` stands for the
dense tensor in both senses: our attention function recognises it and reads the int8 blocks; any other operation
gets the dequantized dense tensor. So every attention implementation computes the right thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from .layers import PagedInt8Layer


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

    layer: PagedInt8Layer
    is_values: bool
    start: int
    stop: int
    fresh: torch.Tensor | None

    @staticmethod
    def __new__(
        cls,
        layer: PagedInt8Layer,
        is_values: bool,
        shape: tuple[int, int, int, int],
        like: torch.Tensor,
        start: int,
        fresh: torch.Tensor | None,
    ):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(
        self,
        layer: PagedInt8Layer,
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
        args, kwargs = tree_map_only(PagedView, PagedView.dense, (args, kwargs or {}))
        return func(*args, **kwargs)
