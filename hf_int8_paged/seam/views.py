"""Lazy keys and values: what a paged int8 layer's ``update`` returns.

transformers hands the keys and values that a cache returns to an attention function. A `PagedView` stands for the
dense tensor in both senses: our attention function recognises it and reads the int8 blocks; any other operation
gets the dequantized dense tensor. So every attention implementation computes the right thing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, ParamSpec, Protocol, TypeVar

import torch
from torch.utils._pytree import tree_map_only

from ..full import refused_memory
from ..kernels import Scoring
from .read_only import ReadOnly

_P = ParamSpec("_P")
_R = TypeVar("_R")


class HasEpoch(Protocol):
    """The place where a layer's tokens lie."""

    @property
    def epoch(self) -> int: ...


class BackedLayer(Protocol):
    """What views and the attention function need of a cache layer; `LayerReader` says what each member is."""

    window: int | None

    @property
    def room(self) -> HasEpoch: ...

    @property
    def long_chunks(self) -> bool: ...

    def attend(
        self,
        query: torch.Tensor,
        scoring: Scoring,
        stop: int,
        fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor: ...

    def gather(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]: ...

    def note_dense_read(self) -> None: ...

    def take_back_step(self, content: Content) -> None: ...


#: Attribute of dense keys and values in a compiled graph, where no view can be made: the layer that they stand for. It
#: is the tensor's own, so that it comes and goes with it.
_LAYER = "_int8_paged_layer"


def stands_for(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Note on dense keys and values that they stand for this layer's blocks, and return them."""
    setattr(keys, _LAYER, layer)
    setattr(values, _LAYER, layer)
    return keys, values


def layer_of(keys: torch.Tensor, values: torch.Tensor) -> Any:
    """The layer that dense keys and values stand for, or None."""
    layer = getattr(keys, _LAYER, None)
    return layer if layer is not None and getattr(values, _LAYER, None) is layer else None


class Content(NamedTuple):
    """What the views of a layer's keys and values stand for.

    Attributes:
        layer: the cache layer.
        start: position of the first token.
        stop: position after the last token.
        epoch: the layer's epoch when the views were made.
        fresh: full-precision keys and values of the newest tokens, if attention should see those instead of their
            quantized image, else ``None``.
    """

    layer: BackedLayer
    start: int
    stop: int
    epoch: int
    fresh: tuple[torch.Tensor, torch.Tensor] | None

    def check_epoch(self) -> None:
        """Raise RuntimeError if the layer has dropped or moved tokens since the views were made."""
        if self.epoch != self.layer.room.epoch:
            raise RuntimeError(
                "these keys and values stand for tokens that the cache has since dropped or moved; "
                "read them before the cache changes, or clone() them"
            )


class PagedView(ReadOnly):
    """A tensor of shape ``[batch, num_kv_heads, tokens, head_dim]`` without storage, backed by a layer's blocks.

    Attributes:
        content: what it stands for; to be set once after `blank`.
        is_values: whether this is the layer's values, else its keys.
    """

    content: Content
    is_values: bool
    _dense: torch.Tensor | None = None

    @staticmethod
    def blank(
        shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, *, is_values: bool
    ) -> PagedView:
        """A view without content."""
        view = torch.Tensor._make_wrapper_subclass(PagedView, shape, dtype=dtype, device=device)
        view.is_values = is_values
        return view

    def tokens(self) -> torch.Tensor:
        """The dense tensor: dequantized past, and the newest tokens in full precision where ``fresh`` has them.

        Raises:
            RuntimeError: the layer has dropped or moved tokens since the view was made.
        """
        if self._dense is None:
            self.content.check_epoch()
            layer, start, stop, _, fresh = self.content
            recent = None if fresh is None else fresh[self.is_values].to(self.dtype)
            past_stop = stop if recent is None else stop - recent.shape[2]
            past = layer.gather(start, past_stop, self.dtype)[self.is_values] if past_stop > start else None
            parts = [x for x in (past, recent) if x is not None]
            self._dense = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return self._dense

    def dense(self) -> torch.Tensor:
        """`tokens`, and zeros for the positions of a preallocated cache that come after them."""
        dense = self.tokens()
        missing = self.shape[2] - dense.shape[2]
        return torch.nn.functional.pad(dense, (0, 0, 0, missing)) if missing else dense

    def _no_storage(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            "keys and values of a PagedInt8Cache are lazy views without storage, so they have no address to hand to "
            "native code; clone() them for a dense tensor that has one"
        )

    # torch answers with 0, or with a capsule around it.
    data_ptr = const_data_ptr = untyped_storage = storage = _typed_storage = __dlpack__ = _no_storage

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        kind = "values" if self.is_values else "keys"
        return (
            f"PagedView({kind} of positions {self.content.start} to {self.content.stop}, shape={tuple(self.shape)}, "
            f"dtype={self.dtype})"
        )

    def readable(self) -> torch.Tensor:
        """The dense tensor with the strides that this view claims to have: ``view`` relies on them."""
        self.content.layer.note_dense_read()
        self._dense = self.tokens().contiguous()
        return self.dense()


def part_of_the_step(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """An attention function with which a step ends: where an exception ends it, the cache goes back to before the step,
    as it does for one in ``update``. Otherwise, in the last layer, the step would count as done."""

    @functools.wraps(function)
    def attention(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            for x in args:
                if isinstance(x, PagedView):
                    x.content.layer.take_back_step(x.content)
                    full = refused_memory(error)
                    if full is not None:
                        raise full from error
                    break
            raise

    return attention


def refusing_views(name: str, function: Callable[_P, _R]) -> Callable[_P, _R]:
    """What is registered as ``name``, an attention function of continuous batching; it refuses views by a sentence."""

    @functools.wraps(function)
    def attention(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if any(isinstance(x, PagedView) for x in (*args, *kwargs.values())):
            raise ValueError(
                f"{name!r} serves continuous batching, which brings a cache of its own; with PagedInt8Cache use "
                'model.set_attn_implementation("int8_paged")'
            )
        return function(*args, **kwargs)

    return attention


def reading_views(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """An attention function that gets tensors where the cache handed it views."""

    @functools.wraps(function)
    def attention(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if any(isinstance(x, PagedView) for x in (*args, *kwargs.values())):
            as_tensors: Any = tree_map_only(PagedView, PagedView.readable, (args, kwargs))
            args, kwargs = as_tensors
        return function(*args, **kwargs)

    return attention
