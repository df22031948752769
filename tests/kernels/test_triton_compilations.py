"""How often Triton compiles while a cache grows: what grows with it is no reason to compile anew."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_int8_paged.kernels import FirstTokens, Scoring, Tokens, alloc_paged_int8_layer

pytest.importorskip("triton", reason="triton is not installed")
sys.path.append(str(Path(__file__).parents[2] / "eval"))

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

HEADS, GROUP, DIM, BLOCK = 2, 2, 64, 16
#: Most variants of one kernel: for the prompt, and for the steps after it.
MOST = 2


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """What a launch compiled, as (name, kernel); nothing is launched."""
    from _triton_offline import TARGETS, compiling_for

    from hf_int8_paged.kernels.triton import backend
    from hf_int8_paged.kernels.triton.tuning import Chip

    chips = {torch.device("cpu"): Chip("sm_90", 132)}
    monkeypatch.setattr(backend, "chip_of", chips.__getitem__)
    with compiling_for(TARGETS["sm_90"]) as kernels:
        yield kernels


def variants(compiled: list[tuple[str, Any]]) -> dict[str, int]:
    """How many different kernels there are of each name."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, kernel in compiled:
        found[name].add(kernel.hash)
    return {name: len(hashes) for name, hashes in found.items()}


def step(length: int, rows: int, *, batch: int, window: int | None, masked: bool, fresh: bool = False) -> None:
    """What one layer launches in a step of ``rows`` tokens after which sequences have ``length``."""
    from hf_int8_paged.kernels.triton import backend

    width = -(-length // BLOCK)
    storage = alloc_paged_int8_layer(batch * width, BLOCK, HEADS, DIM, backend="reference", center_keys=True)
    storage = type(storage)(
        storage.k,
        storage.v,
        storage.k_scales,
        storage.v_scales,
        "triton",
        "v_transposed",
        "hadamard",
        storage.key_center,
    )
    # A table has room for more columns than are in use.
    table = torch.zeros(batch, 2 * width, dtype=torch.int32)[:, :width]
    lens = torch.full((batch,), length, dtype=torch.int32)
    tokens = Tokens(table, lens - rows, lens, window)
    new, q = torch.zeros(batch, HEADS, rows, DIM), torch.zeros(batch, HEADS * GROUP, rows, DIM)
    backend.append(new, new, storage, tokens)
    if rows > 1 and not fresh:
        return  # a first prompt attends to itself
    mask = torch.ones(batch, length, dtype=torch.bool)[:, 1:] if masked else None
    place = torch.zeros(batch, dtype=torch.int32)
    first = FirstTokens(new[:, :, :1].contiguous(), new[:, :, :1].contiguous(), place, place, place + 1, limit=1)
    scoring = Scoring(0.125, None, None, mask, 1 if masked else 0)
    backend.attend(torch.empty_like(q), q, storage, tokens, scoring, (new, new) if fresh else None, first)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "padded"])
def test_a_growing_generate_compiles_each_kernel_twice_at_most(
    compiled: list[tuple[str, Any]], batch: int, window: int | None, masked: bool
) -> None:
    step(23, 23, batch=batch, window=window, masked=masked)
    for length in [*range(24, 70), *range(70, 600, 13), 608, 1024, 1040]:
        step(length, 1, batch=batch, window=window, masked=masked)
    counts = variants(compiled)
    assert set(counts) == {"append_kernel", "decode_kernel", "reduce_kernel"}
    assert all(count <= MOST for count in counts.values()), counts


def test_chunks_of_any_length_over_any_past_compile_one_kernel(compiled: list[tuple[str, Any]]) -> None:
    for length, chunk in ((70, 33), (160, 64), (177, 17), (400, 128), (1000, 511)):
        step(length, chunk, batch=1, window=None, masked=True, fresh=True)
    counts = variants(compiled)
    assert counts["extend_kernel"] == 1
    assert counts["append_kernel"] == 1
