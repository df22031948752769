"""The CPU backend: C kernels in `cpu_src`, called through ctypes.

A call is one packed struct; what is constant for a layer is packed once. The functions check nothing that the public
ones have checked, except what the C code checks for nothing: lengths, and the block ids it uses.
"""

from __future__ import annotations

import functools
import struct
import warnings
import weakref

import torch

from . import cpu_library
from .checks import MAX_NATIVE_HEAD_DIM, check_block_ids, check_lengths
from .cpu_memory import empty
from .sink_tokens import SinkTokens
from .storage import KvCacheQuant

__all__ = [
    "NAME",
    "TILE_ORDER",
    "append",
    "copy",
    "decode",
    "empty",
    "gather",
    "hadamard",
    "isas",
    "select_isa",
    "selected_isa",
    "unavailable",
]

NAME = "cpu"
TILE_ORDER = "dot4"

_LIBRARY = cpu_library.load()
_BAD_LENGTH, _BAD_BLOCK, _NO_MEMORY = -1, -2, -3
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# The structs of cpu_src/int8_paged.h; pointers are integers.
_pack_layer = struct.Struct("=11q").pack
_pack_append = struct.Struct("=15q").pack
_pack_decode = struct.Struct("=16qd6qd8q").pack
_pack_gather = struct.Struct("=10q").pack


def unavailable(device: torch.device, block_size: int, head_dim: int, v_head_dim: int) -> str | None:
    """Why this backend cannot serve such a layer, or None if it can.

    Warns, once, when the C kernels are missing on a CPU.
    """
    if device.type != "cpu":
        return f"its kernels run on 'cpu', not on {device.type!r}"
    if _LIBRARY.missing is not None:
        _warn_once(_LIBRARY.missing)
        return _LIBRARY.missing
    if block_size % 16:
        return f"block_size must be a multiple of 16, got {block_size}"
    for name, dim in (("head_dim", head_dim), ("v_head_dim", v_head_dim)):
        if dim % 4 or not 4 <= dim <= MAX_NATIVE_HEAD_DIM:
            return f"{name} must be a multiple of 4 up to {MAX_NATIVE_HEAD_DIM}, got {dim}"
    return None


@functools.cache
def _warn_once(missing: str) -> None:
    warnings.warn(f"int8 paged attention on the CPU runs on slow reference code: {missing}", stacklevel=3)


def append(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    cache: KvCacheQuant,
    block_table: torch.Tensor,
    context_lens_before: torch.Tensor,
) -> None:
    batch, _, tokens, _ = k_new.shape
    k_batch, k_head, k_token, k_last = k_new.stride()
    v_batch, v_head, v_token, v_last = v_new.stride()
    if k_last != 1 or v_last != 1:
        return append(_rows_contiguous(k_new), _rows_contiguous(v_new), cache, block_table, context_lens_before)
    ids_stride, ids_last = block_table.stride()
    if ids_last != 1 or context_lens_before.stride(0) != 1:
        return append(k_new, v_new, cache, _rows_contiguous(block_table), _rows_contiguous(context_lens_before))
    error = _LIBRARY.append(
        _layer(cache),
        _pack_append(
            k_new.data_ptr(), v_new.data_ptr(), k_batch, k_head, k_token, v_batch, v_head, v_token,
            _DTYPES[k_new.dtype], batch, tokens,
            block_table.data_ptr(), ids_stride, block_table.shape[1], context_lens_before.data_ptr(),
        ),
    )  # fmt: skip
    if error:
        _raise(error, cache, block_table, context_lens_before, new_tokens=tokens)


def decode(
    out: torch.Tensor,
    q: torch.Tensor,
    cache: KvCacheQuant,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    kv_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    key_mask_start: int,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    sink_tokens: SinkTokens | None = None,
) -> None:
    batch, num_q_heads, q_len, _ = q.shape
    q_batch, q_head, q_row, q_last = q.stride()
    out_batch, out_head, out_row, _ = out.stride()
    ids_stride, ids_last = block_table.stride()
    if q_last != 1 or ids_last != 1 or context_lens.stride(0) != 1:
        q, block_table, context_lens = (_rows_contiguous(x) for x in (q, block_table, context_lens))
        ids_stride, (q_batch, q_head, q_row, _) = block_table.stride(0), q.stride()
    starts = mask = mask_stride = mask_columns = sink_logits = 0
    if kv_start is not None:
        kv_start = kv_start.contiguous()
        starts = kv_start.data_ptr()
    if key_mask is not None:
        key_mask = _rows_contiguous(key_mask)
        # A mask without columns has no address, but it is a mask: nobody sees anything.
        mask, mask_stride, mask_columns = key_mask.data_ptr() or 1, key_mask.stride(0), key_mask.shape[1]
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
        sink_logits = sinks.data_ptr()
    first_tokens = (0,) * 7
    if sink_tokens is not None:
        k, v, row, first, stop, _ = sink_tokens
        first_tokens = (
            k.data_ptr(), v.data_ptr(), row.data_ptr(), first.data_ptr(), stop.data_ptr(), k.shape[2], _DTYPES[k.dtype]
        )  # fmt: skip
    error = _LIBRARY.decode(
        _layer(cache),
        _pack_decode(
            out.data_ptr(), q.data_ptr(), out_batch, out_head, out_row, q_batch, q_head, q_row,
            _DTYPES[q.dtype], batch, num_q_heads, q_len,
            block_table.data_ptr(), ids_stride, block_table.shape[1], context_lens.data_ptr(),
            scale, starts, mask, mask_stride, mask_columns, key_mask_start, window or 0, softcap or 0.0, sink_logits,
            *first_tokens,
        ),
    )  # fmt: skip
    if error:
        _raise(error, cache, block_table, context_lens)


def gather(
    cache: KvCacheQuant, block_table: torch.Tensor, lens: torch.Tensor, start: int, stop: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    block_table, lens = _rows_contiguous(block_table), lens.contiguous()
    shape = (len(block_table), cache.num_kv_heads, stop - start)
    k = torch.empty(*shape, cache.head_dim, dtype=dtype)
    v = torch.empty(*shape, cache.v_head_dim, dtype=dtype)
    table = (block_table.data_ptr(), block_table.stride(0), block_table.shape[1], lens.data_ptr())
    call = _pack_gather(k.data_ptr(), v.data_ptr(), _DTYPES[dtype], len(block_table), start, stop, *table)
    error = _LIBRARY.gather(_layer(cache), call)
    if error:
        _raise(error, cache, block_table, lens)
    return k, v


def copy(cache: KvCacheQuant, src: torch.Tensor, dst: torch.Tensor) -> None:
    src, dst = src.contiguous(), dst.contiguous()
    error = _LIBRARY.copy(_layer(cache), src.data_ptr(), dst.data_ptr(), len(src))
    if error:
        raise ValueError(f"src and dst must hold block ids from 0 to {cache.num_blocks - 1}")


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """`conditioning.hadamard` in C, to the same bits: float32 ``[..., head_dim]``, head_dim at most 256."""
    if x.dtype != torch.float32 or not 0 < x.shape[-1] <= MAX_NATIVE_HEAD_DIM:
        raise ValueError(f"x must be float32 with at most {MAX_NATIVE_HEAD_DIM} columns, got {x.dtype} {list(x.shape)}")
    x = x.contiguous()
    out = torch.empty_like(x)
    _LIBRARY.hadamard(out.data_ptr(), x.data_ptr(), x.numel() // x.shape[-1], x.shape[-1])
    return out


def isas() -> list[str]:
    """Instruction sets that this processor has and the library serves, the fastest first."""
    return _LIBRARY.isas()


def selected_isa() -> str:
    """The instruction set in use."""
    return _LIBRARY.isa


def select_isa(name: str | None) -> None:
    """Use one instruction set from now on, in the whole process; None: the fastest.

    Raises:
        ValueError: the processor lacks it; the message names what it has.
    """
    _LIBRARY.select_isa(name)


def _rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


#: By id of a cache: its packed struct, and a weak reference that forgets it.
_layers: dict[int, tuple[bytes, weakref.ref]] = {}


def _layer(cache: KvCacheQuant) -> bytes:
    """The struct `Layer` of a cache, made once: its tensors are never replaced."""
    entry = _layers.get(id(cache))
    return _make_layer(cache) if entry is None else entry[0]


def _make_layer(cache: KvCacheQuant) -> bytes:
    tensors = (cache.k, cache.v, cache.k_scales, cache.v_scales)
    center = cache.key_center
    if cache.tile_order != TILE_ORDER or not all(x.is_contiguous() and x.device.type == "cpu" for x in tensors):
        raise ValueError(f"backend {NAME!r} needs contiguous CPU tensors of tile_order {TILE_ORDER!r}")
    if center is not None and (center.dtype != torch.float32 or not center.is_contiguous()):
        raise ValueError(f"key_center must be contiguous float32, got {center.dtype} with strides {center.stride()}")
    packed = _pack_layer(
        *(x.data_ptr() for x in tensors),
        0 if center is None else center.data_ptr(),
        cache.num_kv_heads, cache.num_blocks, cache.block_size, cache.head_dim, cache.v_head_dim,
        cache.rotation is not None,
    )  # fmt: skip
    key = id(cache)
    _layers[key] = (packed, weakref.ref(cache, lambda _: _layers.pop(key, None)))
    return packed


def _raise(
    error: int, cache: KvCacheQuant, block_table: torch.Tensor, lengths: torch.Tensor, *, new_tokens: int = 0
) -> None:
    """Turn an error code into the exception that the public functions raise."""
    if error == _NO_MEMORY:
        raise MemoryError("no memory for the partial results of decode attention")
    check_lengths(lengths, "lengths", block_table.shape[1] * cache.block_size - new_tokens)
    check_block_ids(block_table, "block_table", cache.num_blocks)
    raise ValueError(f"block_table or lengths changed during the call (error {error})")
