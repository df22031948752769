"""No kernel gets an address of a tensor whose dtype, device, shape or strides it cannot read: every tensor of every
backend function is spoilt in every way, and is refused or read as what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from hf_int8_paged.kernels import FirstTokens, KvCacheQuant, Scoring, Tokens, load_backend
from hf_int8_paged.kernels.cpu import backend as cpu
from hf_int8_paged.kernels.cpu import library as cpu_library
from hf_int8_paged.kernels.cpu import records as cpu_records

from .conftest import CPU, backends_here
from .helpers import device_of, poisoned_layer, snapshot

BATCH, ROWS, HEADS, Q_HEADS, DIM, V_DIM, WIDTH, BLOCK_SIZE = 3, 5, 2, 4, 64, 32, 2, 32
META = torch.device("meta")
NATIVE = [name for name in backends_here() if name != "reference"]


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(backend: str) -> dict[str, Any]:
    """What the functions of a backend take, each tensor under the name of its place in a record."""
    rng, device = torch.Generator().manual_seed(0), device_of(backend)
    storage = poisoned_layer(
        backend, 7, BLOCK_SIZE, HEADS, DIM, v_head_dim=V_DIM, rotation="hadamard", center_keys=True, segments=False
    )  # fmt: skip
    given = {
        "k": storage.k, "v": storage.v, "k_scales": storage.k_scales, "v_scales": storage.v_scales,
        "key_center": storage.key_center,
        "k_new": torch.randn(BATCH, HEADS, ROWS, DIM, generator=rng),
        "v_new": torch.randn(BATCH, HEADS, ROWS, V_DIM, generator=rng),
        "q": torch.randn(BATCH, Q_HEADS, ROWS, DIM, generator=rng),
        "out": torch.full((BATCH, Q_HEADS, ROWS, V_DIM), torch.nan),
        "block_table": int32([0, 1], [2, 3], [4, 5]),
        "before": int32(0, 30, 7),
        "lens": int32(5, 35, 12),
        "kv_start": int32(1, 0, 3),
        "key_mask": torch.rand(BATCH, 40, generator=rng) < 0.8,
        "sink_logits": torch.randn(Q_HEADS, generator=rng),
        "first_k": torch.randn(4, HEADS, 2, DIM, generator=rng),
        "first_v": torch.randn(4, HEADS, 2, V_DIM, generator=rng),
        "row": int32(3, 0, 1),
        "first": int32(0, 1, 0),
        "stop": int32(2, 3, 1),
        "src": int32(0, 2, 4),
        "dst": int32(6, 1, 5),
    }  # fmt: skip
    return {name: x.to(device) for name, x in given.items() if x is not None}


def call(function: str, backend: str, a: dict[str, Any]) -> Any:
    """One function of a backend, itself: not the public one, which checks on its own."""
    module: Any = load_backend(backend)
    order = module.TILE_ORDER
    storage = KvCacheQuant(a["k"], a["v"], a["k_scales"], a["v_scales"], backend, order, "hadamard", a["key_center"])
    held = FirstTokens(a["first_k"], a["first_v"], a["row"], a["first"], a["stop"], limit=3)
    tokens = Tokens(a["block_table"], a["before"], a["lens"], 9, a["kv_start"])
    scoring = Scoring(0.1, 5.0, a["sink_logits"], a["key_mask"])
    if function == "append":
        module.append(a["k_new"], a["v_new"], storage, tokens)
        return snapshot(storage)
    if function in ("attend", "attend_to_fresh"):
        fresh = None if function == "attend" else (a["k_new"], a["v_new"])
        module.attend(a["out"], a["q"], storage, tokens, scoring, fresh, held)
        return a["out"].clone()
    if function == "gather":
        return module.gather(storage, tokens, 3, 37, torch.float32)
    module.copy(storage, a["src"], a["dst"])
    return snapshot(storage)


def fill(a: dict[str, Any], backend: str) -> None:
    """Tokens for the blocks, so that attention has something to read."""
    call("append", backend, {**a, "before": torch.zeros_like(a["before"])})
    call("append", backend, a)


LAYER = ("k", "v", "k_scales", "v_scales", "key_center")
OPTIONS = ("kv_start", "key_mask", "sink_logits", "first_k", "first_v", "row", "first", "stop")
#: Every tensor whose address a function hands to a kernel.
POINTERS = {
    "append": (*LAYER, "k_new", "v_new", "block_table", "before"),
    "attend": (*LAYER, "out", "q", "block_table", "lens", *OPTIONS),
    "attend_to_fresh": (*LAYER, "out", "q", "k_new", "v_new", "block_table", "before", *OPTIONS),
    "gather": (*LAYER, "block_table", "lens"),
    "copy": (*LAYER, "src", "dst"),
}


def other_dtype(x: torch.Tensor) -> torch.Tensor:
    narrower = {torch.float32: torch.float16, torch.float16: torch.int16, torch.int8: torch.bool}
    return x.to(narrower.get(x.dtype, torch.int64 if x.dtype == torch.int32 else torch.uint8))


def wider_rows(x: torch.Tensor) -> torch.Tensor:
    """The same values, the elements of the last axis three apart."""
    wide = x.new_full((*x.shape, 3), 1)
    wide[..., 0] = x
    return wide[..., 0]


def first_axis_last(x: torch.Tensor) -> torch.Tensor:
    """The same values in another order in memory, for example what indexing of columns leaves."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0) if x.ndim > 1 else wider_rows(x)


def one_more_axis(x: torch.Tensor) -> torch.Tensor:
    return x[None]


def shorter(x: torch.Tensor) -> torch.Tensor:
    return x[:-1]


def narrower(x: torch.Tensor) -> torch.Tensor:
    return x[..., : max(x.shape[-1] // 2, 1)].contiguous()


SPOILT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dtype": other_dtype,
    "device": lambda x: x.to(META),
    "elements_apart": wider_rows,
    "axes_permuted": first_axis_last,
    "expanded": lambda x: x[:1].expand(x.shape),
    "one_more_axis": one_more_axis,
    "fewer": shorter,
    "narrower": narrower,
}
#: Spoilt tensors that are others, but none the worse: fewer tokens to store, a mask of fewer columns, a table that
#: covers less, any dtype of the sink_logits, values of another width where nothing else has it.
FINE = {
    ("key_mask", "narrower"), ("block_table", "narrower"), ("sink_logits", "dtype"), ("gather", "v", "narrower"),
    ("copy", "v", "narrower"),
}  # fmt: skip


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("function", POINTERS)
def test_every_tensor_of_every_record_is_refused_or_read_as_it_is(backend: str, function: str) -> None:
    if (function == "attend_to_fresh" and not load_backend(backend).LONG_CHUNKS) or (
        function in ("gather", "copy") and backend == "triton"
    ):
        return  # torch computes it, which checks on its own
    filled = arguments(backend)
    fill(filled, backend)
    tried = refused = 0
    for name in POINTERS[function]:
        for way, spoil in SPOILT.items():
            a = {n: x.clone() for n, x in filled.items()}
            spoilt = {**a, name: spoil(a[name])}
            # What the tensor says, in the layout that the kernels like best; expanded, its values are others too.
            alike = {**a, name: spoilt[name].contiguous()} if spoilt[name].device == a[name].device else a
            alike = {n: x.clone() for n, x in alike.items()}
            tried += 1
            try:
                got = call(function, backend, spoilt)
            except (ValueError, TypeError):
                refused += 1
                continue
            assert way not in ("device", "one_more_axis"), (name, way)
            if way in ("dtype", "fewer", "narrower"):
                assert (name, way) in FINE or (function, name, way) in FINE, (name, way)
            want = call(function, backend, alike)
            same = torch.equal if isinstance(got, torch.Tensor) else None
            if same is not None:
                assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0)), (name, way)
            elif isinstance(got, tuple):
                assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(got, want)), (name, way)
            else:
                assert all((got[key] == want[key]).all() for key in got), (name, way)
    print(f"{backend} {function}: {tried} calls, {refused} refused")
    assert refused >= 5 * len(POINTERS[function])


@pytest.mark.parametrize("backend", NATIVE)
def test_columns_of_a_table_are_no_places_of_first_tokens(backend: str) -> None:
    """What indexing of columns made of row, first and stop once: the kernel read the neighbours' instead."""
    a = arguments(backend)
    fill(a, backend)
    table = torch.stack([a["row"], a["first"], a["stop"]]).T.contiguous().T
    places = dict(zip(("row", "first", "stop"), table))
    for name in places:
        with pytest.raises(ValueError, match=rf"first_tokens\.{name} must be contiguous, got strides \(3,\)"):
            call("attend", backend, {**a, name: places[name]})


@pytest.mark.skipif("cpu" not in NATIVE, reason="needs the C library")
def test_hadamard_takes_rows_of_the_host_only() -> None:
    x = torch.randn(3, 4, 64)
    with pytest.raises(ValueError, match="memory of the host"):
        cpu.hadamard(x.to(META))
    with pytest.raises(ValueError, match="must be float32"):
        cpu.hadamard(x.half())
    for layout in (x.transpose(0, 1), x[:1].expand(3, -1, -1), wider_rows(x)):
        assert torch.equal(cpu.hadamard(layout), cpu.hadamard(layout.clone()))


@pytest.mark.skipif("cpu" not in NATIVE, reason="needs the C library")
def test_a_tensor_without_memory_is_refused() -> None:
    a = arguments("cpu")
    wrapper = torch.Tensor._make_wrapper_subclass(TwoTensor, a["k_new"].shape, dtype=torch.float32)
    assert wrapper.device == CPU
    with pytest.raises((ValueError, RuntimeError), match=r"no memory that a kernel could read|data pointer"):
        call("append", "cpu", {**a, "k_new": wrapper})


@pytest.mark.skipif("cpu" not in NATIVE, reason="needs the C library")
def test_a_library_of_other_records_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import struct

    monkeypatch.setitem(cpu_records.RECORDS, "DecodeCall", struct.Struct("=40q"))
    missing = cpu_library.load().missing
    assert missing is not None
    assert "its DecodeCall has 264 bytes, and 320 are packed; reinstall hf-int8-paged" in missing


@pytest.mark.skipif("cpu" not in NATIVE, reason="needs the C library")
def test_a_library_that_tells_no_sizes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of an earlier release, left over beside newer Python files."""
    import ctypes.util

    libc = ctypes.util.find_library("m")
    if libc is None:
        return
    missing = cpu_library.Library(Path(libc)).missing
    assert missing is not None
    assert "does not tell the sizes of its records; reinstall hf-int8-paged" in missing


def test_fields_of_first_tokens_cannot_be_replaced() -> None:
    held = FirstTokens(*(torch.zeros(1) for _ in range(5)), limit=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        held.row = torch.zeros(2)
