"""What callers can get wrong: a ValueError with the offending value, and not one bit of the storage changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_int8_paged.kernels import (
    BACKENDS,
    alloc_paged_int8_layer,
    copy_blocks,
    gather_dense,
    int8_kv_append_paged,
    int8_paged_decode_attention,
    load_backend,
    resolve_backend,
)

from .helpers import device_of, int32_on, poisoned_layer, snapshot

BATCH, TOKENS, HEADS, DIM, V_DIM, BLOCKS, BLOCK_SIZE = 2, 3, 2, 64, 32, 5, 16
META = torch.device("meta")
Arguments = SimpleNamespace


@pytest.fixture
def arguments(backend: str) -> Arguments:
    """Arguments that work: each test spoils one."""
    device = device_of(backend)
    int32 = int32_on(backend)
    return SimpleNamespace(
        storage=poisoned_layer(backend, BLOCKS, BLOCK_SIZE, HEADS, DIM, v_head_dim=V_DIM),
        block_table=torch.tensor([[0, 1], [2, 3]], **int32),
        k_new=torch.ones(BATCH, HEADS, TOKENS, DIM, device=device),
        v_new=torch.ones(BATCH, HEADS, TOKENS, V_DIM, device=device),
        q=torch.ones(BATCH, 2 * HEADS, TOKENS, DIM, device=device),
        lens=torch.tensor([4, 20], **int32),
        src=torch.tensor([0, 1], **int32),
        dst=torch.tensor([2, 4], **int32),
    )


def spoil(a: Arguments, change: dict[str, Any]) -> Arguments:
    return SimpleNamespace(**{**vars(a), **change})


def options(a: Arguments, *names: str) -> dict[str, Any]:
    return {name: getattr(a, name) for name in names if hasattr(a, name)}


def append(a: Arguments) -> None:
    int8_kv_append_paged(a.k_new, a.v_new, a.storage, a.block_table, a.lens)


def decode(a: Arguments) -> None:
    given = options(a, "kv_start", "key_mask", "window", "softcap", "sink_logits", "out", "backend")
    int8_paged_decode_attention(a.q, a.storage, a.block_table, a.lens, 0.1, **given)


def gather(a: Arguments) -> None:
    gather_dense(a.storage, a.block_table, a.lens, **options(a, "start", "stop", "dtype", "backend"))


def copy(a: Arguments) -> None:
    copy_blocks(a.storage, a.src, a.dst)


Change = Callable[[Arguments], dict[str, Any]]
#: function, what is spoilt, and what the message must hold.
SPOILT: dict[str, tuple[Callable[[Arguments], None], Change, str]] = {
    "k_new_3d": (append, lambda a: {"k_new": a.k_new[0]}, r"k_new must have shape \[2, 2, \*, 64\], got \[2, 3, 64\]"),
    "k_new_heads": (append, lambda a: {"k_new": a.k_new[:, :1]}, r"k_new .*got \[2, 1, 3, 64\]"),
    "k_new_head_dim": (append, lambda a: {"k_new": a.k_new[..., :32]}, r"k_new .*got \[2, 2, 3, 32\]"),
    "k_new_batch": (append, lambda a: {"k_new": a.k_new[:1]}, r"k_new .*got \[1, 2, 3, 64\]"),
    "k_new_int": (append, lambda a: {"k_new": a.k_new.int()}, "k_new must be float32 or .*, got int32"),
    "k_new_double": (append, lambda a: {"k_new": a.k_new.double()}, "k_new must be .*, got float64"),
    "k_new_elsewhere": (append, lambda a: {"k_new": a.k_new.to(META)}, "k_new is on meta, but the storage is on"),
    "v_new_width": (append, lambda a: {"v_new": a.k_new}, r"v_new .* \[2, 2, 3, 32\], got \[2, 2, 3, 64\]"),
    "v_new_fewer_tokens": (append, lambda a: {"v_new": a.v_new[:, :, :2]}, r"v_new .*got \[2, 2, 2, 32\]"),
    "v_new_other_dtype": (append, lambda a: {"v_new": a.v_new.half()}, "v_new must be float32, got float16"),
    "table_int64": (append, lambda a: {"block_table": a.block_table.long()}, "block_table must be int32, got int64"),
    "table_1d": (append, lambda a: {"block_table": a.block_table[0]}, r"block_table .* \[\*, \*\], got \[2\]"),
    "table_id": (append, lambda a: {"block_table": a.block_table + 2}, "block_table .* id 5, but the storage has 5"),
    "before_int64": (append, lambda a: {"lens": a.lens.long()}, "context_lens_before must be int32, got int64"),
    "before_batch": (append, lambda a: {"lens": a.lens[:1]}, r"context_lens_before must have shape \[2\], got \[1\]"),
    "before_negative": (append, lambda a: {"lens": a.lens - 5}, "context_lens_before .* 0 and 32 .*got -1"),
    "before_too_long": (append, lambda a: {"lens": a.lens + 10}, "between 0 and 32 .*got 30 plus 3 new tokens"),
    "q_heads": (decode, lambda a: {"q": a.q[:, :3]}, "q has 3 heads, which is no multiple of the storage's 2"),
    "q_no_heads": (decode, lambda a: {"q": a.q[:, :0]}, "q has 0 heads"),
    "q_head_dim": (decode, lambda a: {"q": a.q[..., :32]}, r"q must have shape \[2, \*, \*, 64\], got \[2, 4, 3, 32\]"),
    "q_batch": (decode, lambda a: {"q": a.q[:1]}, r"q must have shape .*got \[1, 4, 3, 64\]"),
    "q_int8": (decode, lambda a: {"q": a.q.to(torch.int8)}, "q must be .*got int8"),
    "q_elsewhere": (decode, lambda a: {"q": a.q.to(META)}, "q is on meta"),
    "no_query_rows": (decode, lambda a: {"q": a.q[:, :, :0]}, "q_len must be between 1 and 16, got 0"),
    "17_query_rows": (decode, lambda a: {"q": a.q[:, :, :1].expand(-1, -1, 17, -1)}, "got 17; gather_dense"),
    "decode_table_id": (decode, lambda a: {"block_table": a.block_table * 2}, "block id 6, but the storage has 5"),
    "decode_lens_too_long": (decode, lambda a: {"lens": a.lens + 13}, "context_lens must .* 0 and 32 .*got 33"),
    "decode_lens_negative": (decode, lambda a: {"lens": -a.lens}, "context_lens .*got -20"),
    "kv_start_shape": (decode, lambda a: {"kv_start": a.lens[:1]}, r"kv_start must have shape \[2\], got \[1\]"),
    "kv_start_int64": (decode, lambda a: {"kv_start": a.lens.long()}, "kv_start must be int32, got int64"),
    "key_mask_int": (decode, lambda a: {"key_mask": a.block_table}, "key_mask must be bool, got int32"),
    "key_mask_4d": (decode, lambda a: {"key_mask": a.q > 0}, r"key_mask .* \[2, \*\], got \[2, 4, 3, 64\]"),
    "window_0": (decode, lambda a: {"window": 0}, "window must be at least 1, got 0"),
    "softcap_0": (decode, lambda a: {"softcap": 0.0}, "softcap must be positive and finite, got 0.0"),
    "softcap_nan": (decode, lambda a: {"softcap": float("nan")}, "softcap must be positive and finite, got nan"),
    "sinks_shape": (decode, lambda a: {"sink_logits": a.q[0, :2, 0, 0]}, r"sink_logits .* \[4\], got \[2\]"),
    "out_shape": (decode, lambda a: {"out": a.q}, r"out must have shape \[2, 4, 3, 32\], got \[2, 4, 3, 64\]"),
    "out_dtype": (decode, lambda a: {"out": a.q[..., :V_DIM].half()}, "out must be float32, got float16"),
    "out_last_stride": (decode, lambda a: {"out": a.q[..., ::2]}, "contiguous in its last axis, got stride 2"),
    "gather_lens": (gather, lambda a: {"lens": a.lens + 13}, "lens must be between 0 and 32 .*got 33"),
    "gather_table_id": (gather, lambda a: {"block_table": a.block_table + 9}, "block id 12, but the storage has 5"),
    "gather_range": (gather, lambda a: {"start": 9, "stop": 8}, "start <= stop <= 32 .*got 9 and 8"),
    "gather_stop": (gather, lambda a: {"stop": 33}, "got 0 and 33"),
    "gather_dtype": (gather, lambda a: {"dtype": torch.float64}, "dtype must be .*got torch.float64"),
    "copy_counts": (copy, lambda a: {"dst": a.dst[:1]}, r"dst must have shape \[2\], got \[1\]"),
    "copy_int64": (copy, lambda a: {"src": a.src.long()}, "src must be int32, got int64"),
    "copy_from_hole": (copy, lambda a: {"src": a.src - 1}, "src holds block id -1, but the storage has 5"),
    "copy_past_the_end": (copy, lambda a: {"dst": a.dst + 1}, "dst holds block id 5"),
    "copy_twice_to_one": (copy, lambda a: {"dst": a.dst * 0 + 3}, "dst must not hold a block id twice.*got 3"),
    "copy_onto_a_source": (copy, lambda a: {"dst": a.dst - 1}, "nor one of src, got 1"),
    "anothers_tiles": (decode, lambda a: {"backend": another(a)}, "only 'reference' reads others' tiles"),
}  # fmt: skip
#: Only checked where the ids and lengths are on the host: nothing waits for a device.
HOST_ONLY = {"table_id", "before_negative", "before_too_long", "gather_lens", "gather_table_id"} | {
    name for name in SPOILT if name.startswith(("decode_", "copy_from", "copy_past", "copy_twice", "copy_onto"))
}


def another(a: Arguments) -> str:
    return next(name for name in BACKENDS if name not in ("reference", a.storage.backend))


@pytest.mark.parametrize("case", SPOILT)
def test_names_the_value_and_changes_nothing(backend: str, arguments: Arguments, case: str) -> None:
    if device_of(backend).type != "cpu" and case in HOST_ONLY:
        return
    call, change, message = SPOILT[case]
    spoilt, before = spoil(arguments, change(arguments)), snapshot(arguments.storage)
    with pytest.raises(ValueError, match=message):
        call(spoilt)
    for name, bits in snapshot(arguments.storage).items():
        np.testing.assert_array_equal(bits, before[name])


def test_the_unspoilt_arguments_work(arguments: Arguments) -> None:
    for call in (append, decode, gather, copy):
        call(arguments)


@pytest.mark.parametrize("name", ["k_new", "v_new", "block_table", "lens"])
def test_a_list_is_no_tensor(arguments: Arguments, name: str) -> None:
    spoilt = spoil(arguments, {name: [[1]]})
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
        append(spoilt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_blocks": -1}, "num_blocks must not be negative, got -1"),
        ({"block_size": 24}, "block_size must be a positive multiple of 16, got 24"),
        ({"block_size": 0}, "block_size must be a positive multiple of 16, got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads must be positive, got 0"),
        ({"head_dim": 1025}, "head_dim must be between 1 and 1024, got 1025"),
        ({"head_dim": 0}, "head_dim must be between 1 and 1024, got 0"),
        ({"v_head_dim": 2048}, "v_head_dim must be between 1 and 1024, got 2048"),
        ({"head_dim": 512, "backend": "triton"}, "backend 'triton' cannot serve"),
        ({"rotation": "random"}, "unknown rotation 'random'; choose one of hadamard, or None"),
        ({"tile_order": "zigzag"}, "unknown tile_order 'zigzag'; choose one of row_major"),
        ({"tile_order": "dot4", "head_dim": 66}, "needs a head_dim that is a multiple of 4, got 66"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; choose one of reference, cpu, triton"),
    ],
    ids=str,
)
def test_impossible_layers(change: dict[str, Any], message: str) -> None:
    sizes = {"num_blocks": 2, "block_size": 16, "num_kv_heads": 2, "head_dim": 64, "backend": "reference"}
    with pytest.raises(ValueError, match=message):
        alloc_paged_int8_layer(**{**sizes, **change})


def test_a_backend_takes_only_its_own_tile_order(backend: str) -> None:
    if backend == "reference":  # reads them all
        return
    order = "row_major" if load_backend(backend).TILE_ORDER != "row_major" else "dot4"
    with pytest.raises(ValueError, match=f"backend '{backend}' reads tile_order .*, not '{order}'"):
        alloc_paged_int8_layer(2, 16, 2, 64, device=device_of(backend), backend=backend, tile_order=order)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter serves the CPU")
def test_a_named_backend_that_cannot_serve_the_device_is_refused_not_replaced() -> None:
    with pytest.raises(ValueError, match=r"backend 'triton' cannot serve device 'cpu': .*working here: reference"):
        resolve_backend("triton", torch.device("cpu"))
    with pytest.raises(ValueError, match="backend 'cpu' cannot serve device 'cuda'"):
        resolve_backend("cpu", torch.device("cuda"))


def test_a_meta_device_gets_the_reference_unless_another_is_named() -> None:
    assert alloc_paged_int8_layer(4, 16, 2, 64, device="meta").backend == "reference"
    with pytest.raises(ValueError, match="backend 'cpu' cannot serve device 'meta'"):
        alloc_paged_int8_layer(4, 16, 2, 64, device="meta", backend="cpu")
