"""Tensors that may be read like any other, and not be written to: what is written there would reach no block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

_REMEDY = (
    "the cache keeps int8 blocks, of which this is only a dequantized copy: nothing written to it would be kept. "
    "Change a clone() of it, and assign that: `layer.keys = tensor`, `layer.values = tensor` store a whole tensor anew"
)


class ReadOnly(torch.Tensor):
    """Stands for the dense tensor that `readable` returns, in every operation that does not write to it.

    What shares memory with that tensor (a slice, a transpose) is read-only too.
    """

    # Operations reach __torch_dispatch__ as they are, not wrapped a second time.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def readable(self) -> torch.Tensor:
        """The dense tensor."""
        raise NotImplementedError

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise RuntimeError(f"cannot assign to elements of keys or values: {_REMEDY}")

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """A copy as a NumPy array."""
        return self.readable().clone().numpy(force=force)

    def tolist(self) -> Any:
        return self.readable().tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.numpy(), dtype=dtype)

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        return self.readable().clone()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema  # type: ignore[attr-defined]
        if schema.is_mutable:
            for position, argument in enumerate(schema.arguments):
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                writes = argument.alias_info is not None and argument.alias_info.is_write
                if writes and any(isinstance(x, ReadOnly) for x in tree_leaves(value)):
                    raise RuntimeError(f"{schema.name} would write to keys or values: {_REMEDY}")
        args, kwargs = tree_map_only(ReadOnly, lambda x: x.readable(), (args, kwargs))
        result = func(*args, **kwargs)
        if any(x.alias_info is not None and not x.alias_info.is_write for x in schema.returns):
            return tree_map_only(torch.Tensor, Slice.of, result)
        return result


class Slice(ReadOnly):
    """Memory of a dense tensor that a `ReadOnly` stands for."""

    _dense: torch.Tensor

    @staticmethod
    def of(dense: torch.Tensor) -> Slice:
        """A read-only tensor over the memory of ``dense``; native code may read it by its address."""
        part = torch.Tensor._make_subclass(Slice, dense)
        part._dense = dense
        return part

    def readable(self) -> torch.Tensor:
        return self._dense

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self._dense!r} (read-only)"
