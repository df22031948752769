"""The kernels as custom operators, so that ``torch.compile`` traces through the static cache without a graph break.

Operators take tensors and plain values only: a layer's storage goes through `flat` and comes back by `_storage_of`. The
fakes give shapes only.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from .kernels import FirstTokens, KvCacheQuant, Scoring, Tokens, load_backend

#: Storages that preallocated layers own, by the address of their keys. Backends keep what they know of a storage with
#: the object, so an operator looks for the layer's own before it makes another one of the tensors.
_owned: weakref.WeakValueDictionary[int, KvCacheQuant] = weakref.WeakValueDictionary()


def remember(storage: KvCacheQuant) -> None:
    """Let operators that get this storage's tensors find it, as long as its owner keeps it."""
    if storage.num_blocks and storage.device.type != "meta" and type(storage.k) is torch.Tensor:
        _owned[storage.k.data_ptr()] = storage


def flat(storage: KvCacheQuant) -> tuple[Any, ...]:
    """A storage as the operators take it, in their order."""
    s = storage
    return s.k, s.v, s.k_scales, s.v_scales, s.key_center, s.backend, s.tile_order, s.rotation, s.format


def _storage_of(*given: Any) -> KvCacheQuant:
    """The storage whose `flat` form this is: its owner's object, or one like it."""
    known = _owned.get(given[0].data_ptr())
    if known is not None and all(_same(mine, theirs) for mine, theirs in zip(flat(known), given)):
        return known
    k, v, k_scales, v_scales, key_center, backend, tile_order, rotation, form = given
    return KvCacheQuant(k, v, k_scales, v_scales, backend, tile_order, rotation, key_center, form)


def _same(mine: Any, theirs: Any) -> bool:
    """Whether two tensors are the same memory seen in the same way, or two other values equal."""
    if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        seen = (mine.data_ptr(), mine.shape, mine.stride(), mine.dtype)
        return seen == (theirs.data_ptr(), theirs.shape, theirs.stride(), theirs.dtype)
    return mine is theirs or (not isinstance(mine, torch.Tensor) and mine == theirs)


def _first_tokens(
    k: torch.Tensor | None, v: torch.Tensor | None, places: torch.Tensor | None, limit: int
) -> FirstTokens | None:
    return None if k is None or v is None or places is None else FirstTokens(k, v, *places, limit)


@torch.library.custom_op("hf_int8_paged::append", mutates_args=("k", "v", "k_scales", "v_scales"))
def append(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    key_center: torch.Tensor | None,
    backend: str,
    tile_order: str,
    rotation: str | None,
    form: str,
    block_table: torch.Tensor,
    lens_before: torch.Tensor,
) -> None:
    """Quantize and write new tokens, as ``int8_kv_append_paged`` does; mutates the storage's four tensors."""
    storage = _storage_of(k, v, k_scales, v_scales, key_center, backend, tile_order, rotation, form)
    load_backend(backend).append(k_new, v_new, storage, Tokens.at(block_table, lens_before))


@append.register_fake
def _append_fake(*_: Any) -> None:
    return None


@torch.library.custom_op("hf_int8_paged::attend", mutates_args=())
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    key_center: torch.Tensor | None,
    backend: str,
    tile_order: str,
    rotation: str | None,
    form: str,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    window: int | None,
    first_k: torch.Tensor | None,
    first_v: torch.Tensor | None,
    first_places: torch.Tensor | None,
    first_limit: int,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    key_mask: torch.Tensor | None,
) -> torch.Tensor:
    """``int8_paged_decode_attention``: ``[batch, num_q_heads, q_len, head_dim]`` -> ``[batch, q_len, num_q_heads,
    v_head_dim]``. ``first_places`` is int32 ``[3, batch]``: row, first and stop of `FirstTokens`."""
    storage = _storage_of(k, v, k_scales, v_scales, key_center, backend, tile_order, rotation, form)
    batch, num_q_heads, q_len, _ = q.shape
    out = q.new_empty(batch, q_len, num_q_heads, v.shape[3])
    load_backend(backend).attend(
        out.transpose(1, 2),
        q,
        storage,
        Tokens.at(block_table, lens, window),
        Scoring(scale, softcap, sink_logits, key_mask),
        None,
        _first_tokens(first_k, first_v, first_places, first_limit),
    )
    return out


@attend.register_fake
def _attend_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("hf_int8_paged::gather_dense", mutates_args=())
def gather_dense(
    k: torch.Tensor,
    v: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    key_center: torch.Tensor | None,
    backend: str,
    tile_order: str,
    rotation: str | None,
    form: str,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    stop: int,
    dtype: torch.dtype,
    first_k: torch.Tensor | None,
    first_v: torch.Tensor | None,
    first_places: torch.Tensor | None,
    first_limit: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense keys and values of positions 0 to ``stop``; the compiler drops it where attention reads the blocks."""
    storage = _storage_of(k, v, k_scales, v_scales, key_center, backend, tile_order, rotation, form)
    keys, values = load_backend(backend).gather(storage, Tokens.at(block_table, lens), 0, stop, dtype)
    keys, values = keys.contiguous(), values.contiguous()
    first_tokens = _first_tokens(first_k, first_v, first_places, first_limit)
    return (keys, values) if first_tokens is None else first_tokens.put_both(keys, values, 0)


@gather_dense.register_fake
def _gather_dense_fake(k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    block_table, _, stop, dtype = rest[7:11]
    shape = (block_table.shape[0], k.shape[0], stop)
    return (
        torch.empty(*shape, k.shape[3], dtype=dtype, device=k.device),
        torch.empty(*shape, v.shape[3], dtype=dtype, device=k.device),
    )
