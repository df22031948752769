"""The kernels as custom operators, so that ``torch.compile`` traces through a preallocated cache without a graph break.

Operators take tensors and plain values only: records are flattened by the functions whose names begin with ``flat`` and
made again on the other side. The fakes give shapes only.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ..kernels import FirstTokens, KvCacheQuant, Scoring, Tokens, load_backend

#: Storages that preallocated layers own, by the address of their keys. Backends keep what they know of a storage with
#: the object, so an operator looks for the layer's own before it makes another one of the tensors.
_owned: weakref.WeakValueDictionary[int, KvCacheQuant] = weakref.WeakValueDictionary()


def remember(storage: KvCacheQuant) -> None:
    """Let operators that get this storage's tensors find it, as long as its owner keeps it."""
    if storage.num_blocks and storage.device.type != "meta" and type(storage.k) is torch.Tensor:
        _owned[storage.k.data_ptr()] = storage


def flat_storage(storage: KvCacheQuant) -> tuple[list[torch.Tensor], str]:
    """A storage as operators take it: keys, values, their scales and perhaps a centre; and its names, in one string."""
    s = storage
    tensors = [s.k, s.v, s.k_scales, s.v_scales]
    names = f"{s.backend} {s.tile_order} {s.rotation} {s.format}"
    return tensors if s.key_center is None else [*tensors, s.key_center], names


def flat_scoring(scoring: Scoring) -> tuple[list[torch.Tensor | None], list[float]]:
    """`Scoring` as operators take it: in each list one entry for each field, None or NaN where it is of the other kind
    or not given."""
    tensors = [x if isinstance(x, torch.Tensor) else None for x in scoring]
    return tensors, [math.nan if x is None or isinstance(x, torch.Tensor) else float(x) for x in scoring]


def _storage(tensors: Sequence[torch.Tensor], names: str) -> KvCacheQuant:
    """The storage whose flat form this is: its owner's object, or one like it."""
    known = _owned.get(tensors[0].data_ptr())
    if known is not None:
        mine, my_names = flat_storage(known)
        if names == my_names and len(mine) == len(tensors) and all(map(_same, mine, tensors)):
            return known
    k, v, k_scales, v_scales, *center = tensors
    backend, tile_order, rotation, form = names.split(" ")
    key_center = center[0] if center else None
    return KvCacheQuant(
        k, v, k_scales, v_scales, backend, tile_order, None if rotation == "None" else rotation, key_center, form
    )


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors are the same memory seen in the same way."""
    seen = (mine.data_ptr(), mine.shape, mine.stride(), mine.dtype)
    return seen == (theirs.data_ptr(), theirs.shape, theirs.stride(), theirs.dtype)


def _scoring(tensors: Sequence[torch.Tensor | None], numbers: Sequence[float]) -> Scoring:
    values = [None if math.isnan(number) else number for number in numbers]
    given: list[Any] = [value if tensor is None else tensor for tensor, value in zip(tensors, values, strict=True)]
    for i, name in enumerate(Scoring._fields):
        if isinstance(Scoring._field_defaults.get(name), int):
            given[i] = int(given[i])
    return Scoring(*given)


def _first_tokens(tensors: Sequence[torch.Tensor], limit: int) -> FirstTokens | None:
    """First tokens of keys, values and int32 ``[3, batch]`` of row, first and stop, or None of nothing."""
    if not tensors:
        return None
    k, v, places = tensors
    row, first, stop = places
    return FirstTokens(k, v, row, first, stop, limit)


def _tokens(where: Sequence[torch.Tensor], window: int | None = None) -> Tokens:
    block_table, lens = where
    return Tokens.at(block_table, lens, window)


@torch.library.custom_op("hf_int8_paged::append", mutates_args=("k", "v", "k_scales", "v_scales"))
def append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    center: Sequence[torch.Tensor],
    names: str,
    new: Sequence[torch.Tensor],
    where: Sequence[torch.Tensor],
) -> None:
    """Quantize and write new tokens, as ``int8_kv_append_paged`` does.

    Args:
        k, v, k_scales, v_scales: of the storage; mutated. Not in a list, as compilers would copy what is in one.
        center: one tensor, or none.
        names: of `flat_storage`.
        new: keys and values.
        where: block table and lengths before.
    """
    storage = _storage((k, v, k_scales, v_scales, *center), names)
    k_new, v_new = new
    load_backend(storage.backend).append(k_new, v_new, storage, _tokens(where))


@append.register_fake
def _append_fake(*_: Any, **__: Any) -> None:
    return None


@torch.library.custom_op("hf_int8_paged::attend", mutates_args=())
def attend(
    q: torch.Tensor,
    storage: Sequence[torch.Tensor],
    names: str,
    where: Sequence[torch.Tensor],
    window: int | None,
    first_tokens: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor | None],
    numbers: Sequence[float],
) -> torch.Tensor:
    """``int8_paged_decode_attention``: ``[batch, num_q_heads, q_len, head_dim]`` -> ``[batch, q_len, num_q_heads,
    v_head_dim]``.

    Args:
        storage, names: of `flat_storage`.
        where: block table and lengths.
        window: sliding window in tokens.
        first_tokens: nothing, or keys, values and int32 ``[3, batch]``: row, first and stop of `FirstTokens`.
        tensors, numbers: of `flat_scoring`.
    """
    blocks = _storage(storage, names)
    batch, num_q_heads, q_len, _ = q.shape
    out = q.new_empty(batch, q_len, num_q_heads, blocks.v_head_dim)
    load_backend(blocks.backend).attend(
        out.transpose(1, 2),
        q,
        blocks,
        _tokens(where, window),
        _scoring(tensors, numbers),
        None,
        _first_tokens(first_tokens, where[0].shape[1] * blocks.block_size),
    )
    return out


@attend.register_fake
def _attend_fake(q: torch.Tensor, storage: Sequence[torch.Tensor], *_: Any) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], storage[1].shape[3])


@torch.library.custom_op("hf_int8_paged::gather_dense", mutates_args=())
def gather_dense(
    storage: Sequence[torch.Tensor],
    names: str,
    where: Sequence[torch.Tensor],
    first_tokens: Sequence[torch.Tensor],
    stop: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense keys and values of positions 0 to ``stop``; the compiler drops it where attention reads the blocks. The
    other arguments are those of `attend`."""
    blocks = _storage(storage, names)
    keys, values = load_backend(blocks.backend).gather(blocks, _tokens(where), 0, stop, dtype)
    keys, values = keys.contiguous(), values.contiguous()
    first = _first_tokens(first_tokens, where[0].shape[1] * blocks.block_size)
    return (keys, values) if first is None else first.put_both(keys, values, 0)


@gather_dense.register_fake
def _gather_dense_fake(
    storage: Sequence[torch.Tensor],
    names: str,
    where: Sequence[torch.Tensor],
    first_tokens: Sequence[torch.Tensor],
    stop: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = storage[:2]
    shape = (where[0].shape[0], k.shape[0], stop)
    return (
        torch.empty(*shape, k.shape[3], dtype=dtype, device=k.device),
        torch.empty(*shape, v.shape[3], dtype=dtype, device=k.device),
    )
