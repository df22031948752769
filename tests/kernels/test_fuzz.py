"""Random calls of every public function: the reference's answer, or ``ValueError`` or ``TypeError``; nothing else.

HF_INT8_PAGED_FUZZ is the number of calls per function. `make test-sanitize` runs thousands under AddressSanitizer,
where one byte read past a tensor ends the process.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_int8_paged.kernels import (
    FLOAT_DTYPES,
    FirstTokens,
    KvCacheQuant,
    alloc_paged_int8_layer,
    copy_blocks,
    gather_dense,
    int8_kv_append_paged,
    int8_paged_decode_attention,
    mean_key,
)
from tests.segments import STORES, in_segments, whole

from .attention_oracle import RELATIVE_ERROR
from .conftest import backends_here
from .helpers import SEED, device_of, snapshot

CALLS = int(os.environ.get("HF_INT8_PAGED_FUZZ", "100"))
NATIVE = [name for name in backends_here() if name != "reference"]
#: Numbers that no table covers, and some whose sums overflow 32 or 64 bits.
FAR = (-1, 2**31 - 1, -(2**31), 2**31, 2**32 + 5, 2**63 - 1, -(2**63), 2**63, 10**30, -(10**30))
REFUSED = (ValueError, TypeError)


class Draw(random.Random):
    """Random arguments of one call."""

    def __new__(cls, seed: int, backend: str) -> Draw:
        # That of Python 3.10 takes no other arguments.
        return super().__new__(cls, seed)  # type: ignore[call-arg]

    def __init__(self, seed: int, backend: str) -> None:
        super().__init__(seed)
        self.device = device_of(backend)
        self.torch = torch.Generator().manual_seed(seed)

    def rarely(self) -> bool:
        return self.random() < 0.06

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.laid_out(torch.randn(shape, generator=self.torch).to(self.device, dtype))

    def int32(self, values: list) -> torch.Tensor:
        return self.laid_out(torch.tensor(values, dtype=torch.int32, device=self.device))

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """The same values in another layout, or for expanded ones others of the same shape."""
        way = self.choice(("plain", "permuted", "sliced", "expanded", "odd_strides"))
        if way == "permuted":
            order = self.sample(range(x.ndim), x.ndim)
            return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
        if way == "sliced":
            step, before, after = self.randint(1, 3), self.randint(0, 2), self.randint(0, 2)
            axis = self.randrange(x.ndim)
            shape = list(x.shape)
            shape[axis] = before + x.shape[axis] * step + after
            wide = torch.full(shape, 1, dtype=x.dtype, device=x.device)
            inside = wide.narrow(axis, before, x.shape[axis] * step)
            inside = inside[(slice(None),) * axis + (slice(None, None, step),)]
            return inside.copy_(x)
        if way == "expanded" and x.ndim > 1 and x.numel():
            return x.narrow(axis := self.randrange(x.ndim - 1), 0, 1).expand(
                [size if i == axis else -1 for i, size in enumerate(x.shape)]
            )
        if way == "odd_strides":
            free = [x.numel() == 0 or size == 1 for size in x.shape]
            strides = [self.choice((0, 1, 2, 7, 2**40)) if f else s for f, s in zip(free, x.stride())]
            return x.as_strided(x.shape, strides)
        return x

    def number(self, low: int, high: int) -> int:
        return self.choice(FAR) if self.rarely() else self.randint(low, high)

    def position(self, capacity: int) -> int:
        """Mostly in a context or just beside it; any int32."""
        return max(min(self.number(-2, capacity + 2), 2**31 - 1), -(2**31))

    def tables(self, storage: KvCacheQuant, batch: int, width: int, room: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """A block table without repeated blocks, and lengths that leave ``room``; each sometimes spoilt."""
        ids = self.sample(range(storage.num_blocks), min(storage.num_blocks, batch * width))
        ids += [-1] * (batch * width - len(ids))
        table = [[i if self.random() < 0.9 else -1 for i in ids[b * width : (b + 1) * width]] for b in range(batch)]
        if self.rarely() and batch and width:
            table[self.randrange(batch)][self.randrange(width)] = self.choice((storage.num_blocks, 2**31 - 1))
        highest = max(width * storage.block_size - room, 0)
        lens = [self.choice((0, highest, self.randint(0, highest))) for _ in range(batch)]
        if self.rarely() and batch:
            lens[self.randrange(batch)] = self.choice((highest + 1, -1, 2**31 - 1, -(2**31)))
        return self.int32(table).view(batch, width) if batch * width == 0 else self.int32(table), self.int32(lens)

    def layer(self, backend: str) -> KvCacheQuant:
        """Storage whose every slot holds a token."""
        sizes = [4, 12, 16, 36, 64, 128, 256] if backend == "cpu" else [1, 5, 16, 40]
        storage = in_segments(
            self.choice((0, 1, 4, 6)), self.choice((16, 32, 48, 128)), self.choice((1, 2, 3)), self.choice(sizes),
            v_head_dim=self.choice((None, self.choice(sizes))), device=self.device, backend=backend,
            rotation=self.choice((None, "hadamard")), center_keys=self.random() < 0.5,
        )  # fmt: skip
        for x in (x for segment in storage.segments for x in segment):
            drawn = torch.rand(x.shape, generator=self.torch)
            x.copy_(drawn * 0.02 if x.dtype == torch.float16 else (drawn * 255).floor() - 127)
        if storage.key_center is not None:
            storage.key_center.copy_(torch.randn(storage.key_center.shape, generator=self.torch))
        return storage

    def options(self, batch: int, heads: int, capacity: int) -> dict[str, Any]:
        """What attention may be given beside queries and blocks, but for first tokens and an output."""
        options: dict[str, Any] = {}
        if self.random() < 0.4:
            options["kv_start"] = self.int32([self.position(capacity) for _ in range(batch)])
        if self.random() < 0.4:
            mask = torch.rand(batch, self.randint(0, capacity + 3), generator=self.torch) < 0.7
            options["key_mask"] = self.laid_out(mask.to(self.device))
            options["key_mask_start"] = self.number(-capacity - 3, capacity + 3)
        if self.random() < 0.3:
            wide = self.number(1, 40), self.number(1, capacity + 2)
            options["window"] = self.choice((0, 2.5) if self.rarely() else wide)
        if self.random() < 0.3:
            options["softcap"] = self.choice((0.0, -1.0, math.inf, math.nan) if self.rarely() else (5.0, 30.0))
        if self.random() < 0.3:
            options["sink_logits"] = self.normal(heads)
        return options

    def first_tokens(self, storage: KvCacheQuant, batch: int, lens: list[int]) -> FirstTokens:
        """Mostly what the contract wants; sometimes a place or a stride is wrong."""
        rows, count, heads = batch + self.randint(0, 2), self.choice((1, 2, 3, 16)), storage.num_kv_heads
        dtype = self.choice(FLOAT_DTYPES)
        k, v = (
            torch.randn(rows, heads, count, dim, generator=self.torch).to(self.device, dtype)
            for dim in (storage.head_dim, storage.v_head_dim)
        )
        row = [self.randrange(rows) for _ in range(batch)]
        first = [self.choice((0, self.randint(0, 40))) for _ in range(batch)]
        stop = [min(f + count, max(n, 0)) if self.random() < 0.7 else f + count for f, n in zip(first, lens)]
        stop = [s if self.random() < 0.8 else self.randint(0, s) for s in stop]
        limit = max(stop, default=0)
        if self.rarely() and batch:
            self.choice((row, first, stop))[self.randrange(batch)] = self.choice((-1, rows, 2**31 - 1, -(2**31)))
        places = [torch.tensor(x, dtype=torch.int64).to(self.device, torch.int32) for x in (row, first, stop)]
        tensors = [self.laid_out(x) if self.rarely() else x for x in (k, v, *places)]
        return FirstTokens(*tensors, limit=limit)


Outcome = tuple[Any, str | None]


def outcome(call: Callable[[], Any]) -> Outcome:
    """What a call answers, or the name of the error with which it was refused; every other error is a failure."""
    try:
        return call(), None
    except REFUSED as error:
        return None, type(error).__name__


def clone(storage: KvCacheQuant) -> KvCacheQuant:
    stores = (whole(storage, name).clone() for name in STORES)
    return KvCacheQuant(*stores, storage.backend, storage.tile_order, storage.rotation, storage.key_center)


def append(draw: Draw, backend: str) -> str | None:
    storage, batch = draw.layer(backend), draw.choice((0, 1, 1, 2, 3))
    width, tokens = draw.randint(0, 3), draw.randint(0, 5)
    table, lens = draw.tables(storage, batch, width, tokens)
    dtype = draw.choice(FLOAT_DTYPES)
    new = [
        draw.normal(batch, storage.num_kv_heads, tokens, d, dtype=dtype) for d in (storage.head_dim, storage.v_head_dim)
    ]
    other = clone(storage)
    _, refused = outcome(lambda: int8_kv_append_paged(*new, storage, table, lens))
    _, want = outcome(lambda: int8_kv_append_paged(*new, other, table, lens, backend="reference"))
    assert refused == want
    before, after = snapshot(other), snapshot(storage)
    assert all((before[name] == after[name]).all() for name in before)
    return refused


def decode(draw: Draw, backend: str) -> str | None:
    storage, batch, width = draw.layer(backend), draw.choice((0, 1, 1, 2, 3)), draw.randint(0, 3)
    table, lens = draw.tables(storage, batch, width)
    heads, q_len = storage.num_kv_heads * draw.choice((1, 2, 5)), draw.choice((1, 1, 2, 3, 16))
    dtype, capacity = draw.choice(FLOAT_DTYPES), width * storage.block_size
    q = draw.normal(batch, heads, q_len, storage.head_dim, dtype=dtype)
    options = draw.options(batch, heads, capacity)
    if draw.random() < 0.4:
        options["first_tokens"] = draw.first_tokens(storage, batch, lens.tolist())
    scale = math.nan if draw.rarely() and draw.rarely() else storage.head_dim**-0.5
    if draw.random() < 0.3:
        options["out"] = draw.normal(batch, heads, q_len, storage.v_head_dim, dtype=dtype)
    got, refused = outcome(lambda: int8_paged_decode_attention(q, storage, table, lens, scale, **options))
    if "out" in options:
        options["out"] = torch.empty(options["out"].shape, dtype=torch.float64, device=draw.device)
    want, why = outcome(
        lambda: int8_paged_decode_attention(q.double(), storage, table, lens, scale, backend="reference", **options)
    )
    if refused is not None and why is None:
        assert "out" in options, "only the layout of an output may be refused where the reference is content"
    else:
        assert refused == why
    if refused is None:
        held = options.get("first_tokens")
        keys, values = gather_dense(storage, table, lens, first_tokens=held, backend="reference")
        rows = [x.norm(dim=-1).double().max().item() if x.numel() else 0.0 for x in (keys, q)]
        center = 0.0 if storage.key_center is None else float(storage.key_center.norm(dim=-1).max())
        loudest = float(values.abs().max()) if values.numel() else 0.0
        # As attention_oracle.error_bound has it, with the largest of all rows in place of those seen.
        rounding = 4 * 2.0**-23 * (capacity**0.5 + scale * rows[1] * (rows[0] + center) + 8)
        bound = loudest * (rounding + RELATIVE_ERROR[backend])
        if dtype is not torch.float32:
            bound = bound * (1 + torch.finfo(dtype).eps) + want.abs() * torch.finfo(dtype).eps / 2 + 2.0**-24
        assert got.isfinite().all()
        assert ((got.double() - want).abs() <= bound).all(), float((got.double() - want).abs().max())
    return refused


def gather(draw: Draw, backend: str) -> str | None:
    storage, batch, width = draw.layer(backend), draw.choice((0, 1, 1, 2, 3)), draw.randint(0, 3)
    table, lens = draw.tables(storage, batch, width)
    capacity = width * storage.block_size
    start = draw.number(0, capacity)
    stop = draw.choice((None, draw.number(0, capacity), 3.5 if draw.rarely() else start + 1, start))
    dtype = draw.choice((*FLOAT_DTYPES, torch.float64)) if draw.rarely() else draw.choice(FLOAT_DTYPES)
    held = draw.first_tokens(storage, batch, lens.tolist()) if draw.random() < 0.3 else None
    arguments: dict[str, Any] = dict(start=start, stop=stop, dtype=dtype, first_tokens=held)
    got, refused = outcome(lambda: gather_dense(storage, table, lens, **arguments))
    want, why = outcome(lambda: gather_dense(storage, table, lens, backend="reference", **arguments))
    assert refused == why
    if refused is None:
        assert all(torch.equal(x, y) for x, y in zip(got, want))
    return refused


def copy(draw: Draw, backend: str) -> str | None:
    storage, count = draw.layer(backend), draw.randint(0, 3)
    ids = draw.sample(range(-1, storage.num_blocks + 1), min(2 * count, storage.num_blocks + 2))
    src, dst = draw.int32(ids[::2]), draw.int32(ids[1::2])
    other = clone(storage)
    _, refused = outcome(lambda: copy_blocks(storage, src, dst))
    _, why = outcome(lambda: copy_blocks(other, src, dst, backend="reference"))
    assert refused == why
    before, after = snapshot(other), snapshot(storage)
    assert all((before[name] == after[name]).all() for name in before)
    return refused


def allocate(draw: Draw, backend: str) -> str | None:
    sizes: list[Any] = [draw.choice((0, 1, 5)), draw.choice((16, 48)), draw.choice((1, 3))]
    dims: list[Any] = [draw.choice((4, 64)), draw.choice((4, 256))]
    if draw.random() < 0.6:
        wrong = draw.choice((sizes, dims))
        wrong[draw.randrange(len(wrong))] = draw.choice((draw.number(-1, 300), 16.0, "64"))
    # A size that memory refuses is no business of the function.
    if any(isinstance(size, int) and size > 10**4 for size in sizes):
        return "left out"
    storage, refused = outcome(
        lambda: alloc_paged_int8_layer(*sizes, dims[0], v_head_dim=dims[1], device=draw.device, backend=backend)
    )
    assert storage is None or storage.k.shape == (sizes[2], sizes[0], sizes[1], dims[0])
    return refused


def mean(draw: Draw, backend: str) -> str | None:
    k = draw.normal(draw.randint(0, 3), 2, draw.randint(0, 5), 16, dtype=draw.choice(FLOAT_DTYPES))
    tokens = torch.rand(len(k), k.shape[2], generator=draw.torch) < 0.7
    got = mean_key(k, draw.laid_out(tokens.to(k.device)))
    assert got.shape == (2, 16)
    assert got.isfinite().all()
    return None


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("function", [append, decode, gather, copy, allocate, mean], ids=lambda f: f.__name__)
def test_the_references_answer_or_a_refusal(backend: str, function: Callable[[Draw, str], str | None]) -> None:
    calls = CALLS if backend == "cpu" else max(CALLS // 10, 1)
    results: Counter[str] = Counter()
    for i in range(calls):
        seed = SEED + 1000003 * i
        try:
            results[function(Draw(seed, backend), backend) or "answered"] += 1
        except Exception as error:
            raise AssertionError(f"call {i} (seed {seed})") from error
    print(f"{function.__name__} on {backend}: {calls} calls, {dict(results)}")
    assert results["answered"] > calls // 5
