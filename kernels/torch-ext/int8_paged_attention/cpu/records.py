"""The records that cross to C: the structs of src/int8_paged.h, packed from tensors that `layouts` has checked.

No other code packs an address. A record names memory without owning it, so what it was made of is returned with it, to
be held until the C function has returned.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch

from ..calls import Scoring, Tokens, rows_contiguous
from ..checks import (
    FLOAT_DTYPES,
    MAX_NATIVE_HEAD_DIM,
    check_contiguous,
    check_range,
    check_tensor,
    clamp_mask_start,
    clamp_window,
)
from ..first_tokens import FirstTokens
from ..layouts import (
    FirstTokensLayout,
    LayerLayout,
    TokensLayout,
    check_append,
    check_attend,
    check_batch,
    check_first_tokens,
    check_layer,
    check_tokens,
)
from ..storage import KvCacheQuant

#: The structs in the order of int8_paged_record_size; every field is 8 bytes wide.
RECORDS = {
    "Layer": struct.Struct("=8q"),
    "Segment": struct.Struct("=6q"),
    "AppendCall": struct.Struct("=15q"),
    "DecodeCall": struct.Struct("=16qd6qd9q"),
    "FirstTokens": struct.Struct("=8q"),
    "GatherCall": struct.Struct("=10q"),
    "ExtendCall": struct.Struct("=16qd6qd9q8q"),
}
TILE_ORDER = "dot4"
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_pack_append = RECORDS["AppendCall"].pack
# Without the FirstTokens at its end, which are packed on their own.
_pack_decode = struct.Struct("=16qd6qdq").pack
# What an ExtendCall has behind its DecodeCall.
_pack_fresh = struct.Struct("=8q").pack
_pack_gather = RECORDS["GatherCall"].pack
_NO_FIRST_TOKENS = bytes(RECORDS["FirstTokens"].size)


#: Under this name what is packed of an object stands in its notes.
_NOTE = "cpu"


def layer_record(storage: KvCacheQuant) -> tuple[bytes, LayerLayout]:
    """The record of a layer's storage, its segments behind it, and its sizes: packed once, and kept with it."""
    layout = check_layer(storage, "cpu", TILE_ORDER, segments=True)
    for name, dim in (("head_dim", storage.head_dim), ("v_head_dim", storage.v_head_dim)):
        if dim % 4:
            raise ValueError(f"{name} must be a multiple of 4, got {dim}")
    center = 0 if storage.key_center is None else _address(storage.key_center)
    packed = RECORDS["Layer"].pack(center, *layout[1:], storage.rotation is not None, len(storage.segments))
    first = 0
    for segment in storage.segments:
        packed += RECORDS["Segment"].pack(*(_address(x) for x in segment), first, segment.num_blocks)
        first += segment.num_blocks
    storage.notes[_NOTE] = packed, layout
    return packed, layout


def _first_record(first_tokens: FirstTokens) -> tuple[bytes, FirstTokensLayout]:
    layout = check_first_tokens(first_tokens)
    k, v, row, first, stop = (getattr(first_tokens, name) for name in ("k", "v", "row", "first", "stop"))
    # A row that nobody has is an address too: without one there would be no first tokens.
    addresses = (_address(k) or 1, *(_address(x) for x in (v, row, first, stop)))
    packed = RECORDS["FirstTokens"].pack(*addresses, k.shape[0], k.shape[2], _DTYPES[k.dtype])
    first_tokens.notes[_NOTE] = packed, layout
    return packed, layout


class TokensRecord(NamedTuple):
    """A step's tokens, checked: their sizes, and the addresses that a call's record gets, 0 for none."""

    layout: TokensLayout
    block_table: int
    context_lens_before: int
    context_lens: int
    kv_start: int


def _tokens_record(tokens: Tokens) -> TokensRecord:
    layout = check_tokens(tokens)
    lens = (_address(tokens.context_lens_before), _address(tokens.context_lens))
    kv_start = 0 if tokens.kv_start is None else _address(tokens.kv_start)
    record = tokens.notes[_NOTE] = TokensRecord(layout, _address(tokens.block_table), *lens, kv_start)
    return record


def _address(x: torch.Tensor) -> int:
    """Address of the first element. A tensor without memory of its own, a fake one for instance, has none."""
    if not x.is_cpu:
        raise ValueError(f"the CPU kernels read memory of the host, got a tensor on {x.device}")
    address = x.data_ptr()
    if not address and x.numel():
        raise ValueError(f"a tensor of type {type(x).__name__} on {x.device} has no memory that a kernel could read")
    return address


def append_record(
    layout: LayerLayout, k_new: torch.Tensor, v_new: torch.Tensor, tokens: Tokens
) -> tuple[bytes, tuple[torch.Tensor, torch.Tensor]]:
    """An AppendCall, and the rows that it reads. Rows of new tokens that are not contiguous are copied."""
    held, table, before, _, _ = tokens.notes.get(_NOTE) or _tokens_record(tokens)
    check_append(layout, held, k_new, v_new)
    k_batch, k_head, k_token, k_last = k_new.stride()
    v_batch, v_head, v_token, v_last = v_new.stride()
    if (k_last != 1 or v_last != 1) and k_new.numel():
        k_new, v_new = rows_contiguous(k_new), rows_contiguous(v_new)
        (k_batch, k_head, k_token, _), (v_batch, v_head, v_token, _) = k_new.stride(), v_new.stride()
    record = _pack_append(
        k_new.data_ptr() or _address(k_new), v_new.data_ptr() or _address(v_new),
        k_batch, k_head, k_token, v_batch, v_head, v_token, _DTYPES[k_new.dtype], held[1], k_new.shape[2],
        table, held[3], held[2], before,
    )  # fmt: skip
    return record, (k_new, v_new)


def decode_record(
    layout: LayerLayout,
    out: torch.Tensor,
    q: torch.Tensor,
    tokens: Tokens,
    scoring: Scoring,
    first_tokens: FirstTokens | None,
    new: int = 0,
) -> tuple[bytes, tuple]:
    """A DecodeCall, and what it reads and writes. Query rows that are not contiguous are copied. With ``new`` tokens
    that only an ExtendCall brings, its lengths are those before the step."""
    first_record, first_layout = _NO_FIRST_TOKENS, None
    if first_tokens is not None:
        first_record, first_layout = first_tokens.notes.get(_NOTE) or _first_record(first_tokens)
    held, table, before, lens, starts = tokens.notes.get(_NOTE) or _tokens_record(tokens)
    key_mask, sink_logits = check_attend(layout, held, out, q, scoring, first_layout)
    q_batch, q_head, q_row, q_last = q.stride()
    if q_last != 1 and q.numel():
        q = rows_contiguous(q)
        q_batch, q_head, q_row, _ = q.stride()
    out_batch, out_head, out_row, _ = out.stride()
    batch, num_q_heads, q_len, _ = q.shape
    max_blocks, window = held[2], tokens.window
    mask = mask_stride = mask_columns = mask_start = logits = 0
    if key_mask is not None:
        # A mask without columns has no address, but it is a mask: nobody sees anything.
        mask, mask_stride, mask_columns = _address(key_mask) or 1, key_mask.stride()[0], key_mask.shape[1]
        mask_start = clamp_mask_start(scoring.key_mask_start, key_mask, max_blocks * layout.block_size + new)
    if window is not None:
        window = clamp_window(window, max_blocks * layout.block_size + new)
    if sink_logits is not None:
        sink_logits = sink_logits.to(torch.float32)
        logits = _address(sink_logits)
    record = _pack_decode(
        out.data_ptr() or _address(out), q.data_ptr() or _address(q),
        out_batch, out_head, out_row, q_batch, q_head, q_row, _DTYPES[q.dtype], batch, num_q_heads, q_len,
        table, held[3], max_blocks, before if new else lens,
        scoring[0], starts, mask, mask_stride, mask_columns, mask_start, window or 0, scoring[1] or 0.0, logits,
    )  # fmt: skip
    return record + first_record, (out, q, key_mask, sink_logits)


def extend_record(
    layout: LayerLayout,
    out: torch.Tensor,
    q: torch.Tensor,
    tokens: Tokens,
    scoring: Scoring,
    fresh: tuple[torch.Tensor, torch.Tensor],
    first_tokens: FirstTokens | None,
) -> tuple[bytes, tuple]:
    """An ExtendCall, and what it reads and writes. Rows that are not contiguous are copied."""
    k_new, v_new = fresh
    held: TokensRecord = tokens.notes.get(_NOTE) or _tokens_record(tokens)
    check_append(layout, held.layout, k_new, v_new)
    if k_new.dtype != q.dtype or k_new.shape[2] != q.shape[2]:
        raise ValueError(
            f"the chunk's keys are {k_new.dtype} {list(k_new.shape)}, its queries {q.dtype} {list(q.shape)}"
        )
    k_new, v_new = rows_contiguous(k_new), rows_contiguous(v_new)
    record, read = decode_record(layout, out, q, tokens, scoring, first_tokens, k_new.shape[2])
    places = (_address(k_new), _address(v_new), *k_new.stride()[:3], *v_new.stride()[:3])
    return record + _pack_fresh(*places), (*read, k_new, v_new)


def gather_record(
    layout: LayerLayout, tokens: Tokens, start: int, stop: int, dtype: torch.dtype
) -> tuple[bytes, torch.Tensor, torch.Tensor]:
    """A GatherCall, and the keys and values that it will have written."""
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    held: TokensRecord = tokens.notes.get(_NOTE) or _tokens_record(tokens)
    _, batch, max_blocks, table_stride = held.layout
    check_batch(layout, held.layout, batch)
    start, stop = check_range(start, stop, max_blocks * layout.block_size)
    shape = (batch, layout.num_kv_heads, stop - start)
    k = torch.empty(*shape, layout.head_dim, dtype=dtype, device=layout.device)
    v = torch.empty(*shape, layout.v_head_dim, dtype=dtype, device=layout.device)
    table = (held.block_table, table_stride, max_blocks, held.context_lens)
    return _pack_gather(_address(k), _address(v), _DTYPES[dtype], batch, start, stop, *table), k, v


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
