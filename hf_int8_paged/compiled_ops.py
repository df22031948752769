"""The kernels as custom operators, so that ``torch.compile`` traces through the static cache without a graph break.

Each takes a layer's storage as its tensors and names; the fakes give shapes only.
"""

from __future__ import annotations

import torch

from .kernels import FirstTokens, KvCacheQuant, load_backend


@torch.library.custom_op("hf_int8_paged::append", mutates_args=("k", "v", "k_scales", "v_scales"))
def append(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    key_center: torch.Tensor | None,
    block_table: torch.Tensor,
    lens_before: torch.Tensor,
    backend: str,
    tile_order: str,
    rotation: str | None,
) -> None:
    """Quantize and write new tokens, as ``int8_kv_append_paged`` does; mutates the storage's four tensors."""
    cache = KvCacheQuant(k, v, k_scales, v_scales, backend, tile_order, rotation, key_center)
    load_backend(backend).append(k_new, v_new, cache, block_table, lens_before)


@append.register_fake
def _append_fake(
    k_new, v_new, k, v, k_scales, v_scales, key_center, block_table, lens_before, backend, tile_order, rotation
) -> None:
    return None


@torch.library.custom_op("hf_int8_paged::decode", mutates_args=())
def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    key_center: torch.Tensor | None,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    key_mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    sink_k: torch.Tensor | None,
    sink_v: torch.Tensor | None,
    sink_places: torch.Tensor | None,
    sink_limit: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
    tile_order: str,
    rotation: str | None,
) -> torch.Tensor:
    """``int8_paged_decode_attention``: ``[batch, num_q_heads, q_len, head_dim]`` -> ``[batch, q_len, num_q_heads,
    v_head_dim]``. ``sink_places`` is int32 ``[3, batch]``: row, first and stop of `FirstTokens`."""
    cache = KvCacheQuant(k, v, k_scales, v_scales, backend, tile_order, rotation, key_center)
    batch, num_q_heads, q_len, _ = q.shape
    out = q.new_empty(batch, q_len, num_q_heads, v.shape[3])
    load_backend(backend).decode(
        out.transpose(1, 2), q, cache, block_table, lens, scale, None, key_mask, 0, window, softcap, sinks,
        _sink_tokens(sink_k, sink_v, sink_places, sink_limit),
    )  # fmt: skip
    return out


@decode.register_fake
def _decode_fake(
    q,
    k,
    v,
    k_scales,
    v_scales,
    key_center,
    block_table,
    lens,
    key_mask,
    sinks,
    sink_k,
    sink_v,
    sink_places,
    sink_limit,
    scale,
    window,
    softcap,
    backend,
    tile_order,
    rotation,
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("hf_int8_paged::gather_dense", mutates_args=())
def gather_dense(
    k: torch.Tensor,
    v: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    key_center: torch.Tensor | None,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    sink_k: torch.Tensor | None,
    sink_v: torch.Tensor | None,
    sink_places: torch.Tensor | None,
    sink_limit: int,
    stop: int,
    dtype: torch.dtype,
    backend: str,
    tile_order: str,
    rotation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense keys and values of positions 0 to ``stop``; the compiler drops it where attention reads the blocks."""
    cache = KvCacheQuant(k, v, k_scales, v_scales, backend, tile_order, rotation, key_center)
    keys, values = load_backend(backend).gather(cache, block_table, lens, 0, stop, dtype)
    keys, values = keys.contiguous(), values.contiguous()
    sink_tokens = _sink_tokens(sink_k, sink_v, sink_places, sink_limit)
    return (keys, values) if sink_tokens is None else sink_tokens.put_both(keys, values, 0)


@gather_dense.register_fake
def _gather_dense_fake(
    k,
    v,
    k_scales,
    v_scales,
    key_center,
    block_table,
    lens,
    sink_k,
    sink_v,
    sink_places,
    sink_limit,
    stop,
    dtype,
    backend,
    tile_order,
    rotation,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (block_table.shape[0], k.shape[0], stop)
    return (
        torch.empty(*shape, k.shape[3], dtype=dtype, device=k.device),
        torch.empty(*shape, v.shape[3], dtype=dtype, device=k.device),
    )


def _sink_tokens(
    k: torch.Tensor | None, v: torch.Tensor | None, places: torch.Tensor | None, limit: int
) -> FirstTokens | None:
    return None if k is None or v is None or places is None else FirstTokens(k, v, *places, limit)
