"""The records that cross to C: the structs of cpu_src/int8_paged.h, packed from tensors that `layouts` has checked.

No other code packs an address. A record names memory without owning it, so what it was made of is returned with it, to
be held until the C function has returned.
"""

from __future__ import annotations

import struct

import torch

from .checks import (
    FLOAT_DTYPES,
    MAX_NATIVE_HEAD_DIM,
    check_contiguous,
    check_range,
    check_tensor,
    clamp_mask_start,
    clamp_window,
)
from .first_tokens import FirstTokens
from .layouts import (
    FirstTokensLayout,
    LayerLayout,
    OncePerObject,
    check_append,
    check_decode,
    check_first_tokens,
    check_layer,
    check_table,
    rows_contiguous,
)
from .storage import KvCacheQuant

#: The structs in the order of int8_paged_record_size; every field is 8 bytes wide.
RECORDS = {
    "Layer": struct.Struct("=11q"),
    "AppendCall": struct.Struct("=15q"),
    "DecodeCall": struct.Struct("=16qd6qd9q"),
    "SinkTokens": struct.Struct("=8q"),
    "GatherCall": struct.Struct("=10q"),
}
TILE_ORDER = "dot4"
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_pack_append = RECORDS["AppendCall"].pack
# Without the FirstTokens at its end, which are packed on their own.
_pack_decode = struct.Struct("=16qd6qdq").pack
_pack_gather = RECORDS["GatherCall"].pack
_NO_FIRST_TOKENS = bytes(RECORDS["SinkTokens"].size)


def _make_layer(storage: KvCacheQuant) -> tuple[bytes, LayerLayout]:
    layout = check_layer(storage, "cpu", TILE_ORDER)
    for name, dim in (("head_dim", storage.head_dim), ("v_head_dim", storage.v_head_dim)):
        if dim % 4:
            raise ValueError(f"{name} must be a multiple of 4, got {dim}")
    tensors = (storage.k, storage.v, storage.k_scales, storage.v_scales)
    packed = RECORDS["Layer"].pack(
        *(_address(x) for x in tensors),
        0 if storage.key_center is None else _address(storage.key_center),
        *layout[1:],
        storage.rotation is not None,
    )
    return packed, layout


def _make_first_tokens(first_tokens: FirstTokens) -> tuple[bytes, FirstTokensLayout]:
    layout = check_first_tokens(first_tokens)
    k, v, row, first, stop = (getattr(first_tokens, name) for name in ("k", "v", "row", "first", "stop"))
    # A row that nobody has is an address too: without one there would be no first tokens.
    addresses = (_address(k) or 1, *(_address(x) for x in (v, row, first, stop)))
    return RECORDS["SinkTokens"].pack(*addresses, k.shape[0], k.shape[2], _DTYPES[k.dtype]), layout


#: The record of a layer's storage and its sizes, made once.
layer_record = OncePerObject(_make_layer)
_first_record = OncePerObject(_make_first_tokens)


def _address(x: torch.Tensor) -> int:
    """Address of the first element. A tensor without memory of its own, a fake one for instance, has none."""
    if not x.is_cpu:
        raise ValueError(f"the CPU kernels read memory of the host, got a tensor on {x.device}")
    address = x.data_ptr()
    if not address and x.numel():
        raise ValueError(f"a tensor of type {type(x).__name__} on {x.device} has no memory that a kernel could read")
    return address


def append_record(
    layout: LayerLayout, k_new: torch.Tensor, v_new: torch.Tensor, block_table: torch.Tensor, lens: torch.Tensor
) -> tuple[bytes, tuple]:
    """An AppendCall, and what it reads. Rows of new tokens that are not contiguous are copied."""
    block_table, lens = check_append(layout, k_new, v_new, block_table, lens)
    k_batch, k_head, k_token, k_last = k_new.stride()
    v_batch, v_head, v_token, v_last = v_new.stride()
    if (k_last != 1 or v_last != 1) and k_new.numel():
        k_new, v_new = rows_contiguous(k_new), rows_contiguous(v_new)
        (k_batch, k_head, k_token, _), (v_batch, v_head, v_token, _) = k_new.stride(), v_new.stride()
    batch, _, tokens, _ = k_new.shape
    record = _pack_append(
        k_new.data_ptr() or _address(k_new), v_new.data_ptr() or _address(v_new),
        k_batch, k_head, k_token, v_batch, v_head, v_token, _DTYPES[k_new.dtype], batch, tokens,
        block_table.data_ptr() or _address(block_table), block_table.stride()[0], block_table.shape[1],
        lens.data_ptr() or _address(lens),
    )  # fmt: skip
    return record, (k_new, v_new, block_table, lens)


def decode_record(
    layout: LayerLayout,
    out: torch.Tensor,
    q: torch.Tensor,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    scale: float,
    kv_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    key_mask_start: int,
    window: int | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    first_tokens: FirstTokens | None,
) -> tuple[bytes, tuple]:
    """A DecodeCall, and what it reads and writes. Query rows that are not contiguous are copied."""
    first_record, held = (_NO_FIRST_TOKENS, None) if first_tokens is None else _first_record(first_tokens)
    block_table, lens, kv_start, key_mask, sink_logits = check_decode(
        layout, out, q, block_table, lens, kv_start, key_mask, softcap, sink_logits, held
    )
    q_batch, q_head, q_row, q_last = q.stride()
    if q_last != 1 and q.numel():
        q = rows_contiguous(q)
        q_batch, q_head, q_row, _ = q.stride()
    out_batch, out_head, out_row, _ = out.stride()
    batch, num_q_heads, q_len, _ = q.shape
    max_blocks = block_table.shape[1]
    starts = mask = mask_stride = mask_columns = mask_start = logits = 0
    if kv_start is not None:
        starts = _address(kv_start)
    if key_mask is not None:
        # A mask without columns has no address, but it is a mask: nobody sees anything.
        mask, mask_stride, mask_columns = _address(key_mask) or 1, key_mask.stride()[0], key_mask.shape[1]
        mask_start = clamp_mask_start(key_mask_start, key_mask, max_blocks * layout.block_size)
    if window is not None:
        window = clamp_window(window, max_blocks * layout.block_size)
    if sink_logits is not None:
        sink_logits = sink_logits.to(torch.float32)
        logits = _address(sink_logits)
    record = _pack_decode(
        out.data_ptr() or _address(out), q.data_ptr() or _address(q),
        out_batch, out_head, out_row, q_batch, q_head, q_row, _DTYPES[q.dtype], batch, num_q_heads, q_len,
        block_table.data_ptr() or _address(block_table), block_table.stride()[0], max_blocks,
        lens.data_ptr() or _address(lens),
        scale, starts, mask, mask_stride, mask_columns, mask_start, window or 0, softcap or 0.0, logits,
    )  # fmt: skip
    return record + first_record, (out, q, block_table, lens, kv_start, key_mask, sink_logits, first_tokens)


def gather_record(
    layout: LayerLayout, block_table: torch.Tensor, lens: torch.Tensor, start: int, stop: int, dtype: torch.dtype
) -> tuple[bytes, torch.Tensor, torch.Tensor, tuple]:
    """A GatherCall, the keys and values that it will have written, and what it reads."""
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    block_table, lens = check_table(layout.device, len(block_table), block_table, lens)
    batch, max_blocks = block_table.shape
    start, stop = check_range(start, stop, max_blocks * layout.block_size)
    shape = (batch, layout.num_kv_heads, stop - start)
    k = torch.empty(*shape, layout.head_dim, dtype=dtype, device=layout.device)
    v = torch.empty(*shape, layout.v_head_dim, dtype=dtype, device=layout.device)
    table = (_address(block_table), block_table.stride()[0], max_blocks, _address(lens))
    record = _pack_gather(_address(k), _address(v), _DTYPES[dtype], batch, start, stop, *table)
    return record, k, v, (block_table, lens)


def copy_arguments(layout: LayerLayout, src: torch.Tensor, dst: torch.Tensor) -> tuple[int, int, int, tuple]:
    """Addresses of block ids ``[count]`` to copy from and to, how many there are, and what is there."""
    check_tensor(src, "src", shape=(None,), dtypes=(torch.int32,), device=layout.device)
    check_tensor(dst, "dst", shape=src.shape, dtypes=(torch.int32,), device=layout.device)
    src, dst = src.contiguous(), dst.contiguous()
    return _address(src), _address(dst), len(src), (src, dst)


def hadamard_arguments(x: torch.Tensor) -> tuple[int, int, int, int, tuple]:
    """Addresses of a new tensor and of ``x``, float32 ``[..., head_dim]``, their rows and columns, and the two."""
    if x.dtype != torch.float32 or not 0 < x.shape[-1] <= MAX_NATIVE_HEAD_DIM:
        raise ValueError(f"x must be float32 with at most {MAX_NATIVE_HEAD_DIM} columns, got {x.dtype} {list(x.shape)}")
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check_contiguous(x, "x")
    return _address(out), _address(x), x.numel() // x.shape[-1], x.shape[-1], (out, x)
