"""Contestants of `latency.py` and `_latency_cuda.py`, the calls that they rotate over, and how they take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_int8_paged.kernels import Scoring, Tokens, alloc_paged_int8_layer, load_backend

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Case:
    batch: int
    kv_heads: int
    group: int
    head_dim: int
    context: int

    @property
    def elements(self) -> int:
        """Of keys and values together."""
        return 2 * self.batch * self.kv_heads * self.context * self.head_dim

    def in_lines(self) -> str:
        return (
            f"batch {self.batch}, {self.kv_heads} KV heads\n"
            f"group {self.group}, head_dim {self.head_dim}\ncontext {self.context}"
        )


@dataclass
class Contestant:
    """Calls to rotate over, the bytes that each of them reads, and the same call on little."""

    calls: list[Callable[[], Any]]
    bytes_read: int
    warm_up: Callable[[], Any]

    def __post_init__(self) -> None:
        self.times: list[float] = []

    def step(self) -> None:
        call = self.calls[len(self.times) % len(self.calls)]
        self.warm_up()
        start = time.perf_counter()
        call()
        self.times.append(time.perf_counter() - start)

    def summary(self) -> dict[str, float]:
        tenths = statistics.quantiles(self.times, n=10, method="inclusive")
        median = statistics.median(self.times)
        return {
            "median_ms": median * 1e3,
            "p10_ms": tenths[0] * 1e3,
            "p90_ms": tenths[-1] * 1e3,
            "min_ms": min(self.times) * 1e3,
            "gb_per_s": self.bytes_read / median / 1e9,
            "sets": len(self.calls),
        }


def sets_for(bytes_read: int, cold_bytes: int) -> int:
    return max(2, -(-cold_bytes // bytes_read))


def warm_up_context(case: Case) -> int:
    """Tokens that are enough to put all threads to work, and too few to matter for the cache: half a MiB of int8."""
    blocks = (1 << 19) // (case.elements // case.context * BLOCK_SIZE)
    return BLOCK_SIZE * max(1, min(blocks, case.context // BLOCK_SIZE))


def int8_calls(case: Case, count: int, *, q: torch.Tensor, random_order: bool = False) -> list[Callable[[], Any]]:
    blocks = case.context // BLOCK_SIZE
    calls: list[Callable[[], Any]] = []
    lens = torch.full((case.batch,), case.context, dtype=torch.int32, device=q.device)
    out = torch.empty_like(q)
    for _ in range(count):
        storage = alloc_paged_int8_layer(
            case.batch * blocks, BLOCK_SIZE, case.kv_heads, case.head_dim, device=q.device, rotation="hadamard"
        )
        for values, scales in ((storage.k, storage.k_scales), (storage.v, storage.v_scales)):
            values.random_(-127, 128)
            scales.uniform_(0.015, 0.03)
        ids = torch.randperm(case.batch * blocks) if random_order else torch.arange(case.batch * blocks)
        table = ids.to(torch.int32).view(case.batch, blocks).to(q.device)
        # As the cache calls it at every step, past the public function's argument checks.
        attend = load_backend(storage.backend).attend
        calls.append(partial(attend, out, q, storage, Tokens.at(table, lens), Scoring(case.head_dim**-0.5)))
    return calls


def sdpa_calls(case: Case, count: int, q: torch.Tensor) -> list[Callable[[], Any]]:
    shape = (case.batch, case.kv_heads, case.context, case.head_dim)
    packed = q.view(case.batch, case.kv_heads, case.group, case.head_dim)
    pairs = [[torch.randn(shape, device=q.device).to(q.dtype) for _ in "kv"] for _ in range(count)]
    return [partial(scaled_dot_product_attention, packed, k, v) for k, v in pairs]


def race(contestants: Mapping[str, Contestant], rounds: int) -> dict[str, dict[str, float]]:
    """Every contestant once over all its calls, untimed; then all in turns."""
    for contestant in contestants.values():
        for _ in range(len(contestant.calls)):
            contestant.step()
        contestant.times.clear()
    for _ in range(rounds):
        for contestant in contestants.values():
            contestant.step()
    return {name: contestant.summary() for name, contestant in contestants.items()}
