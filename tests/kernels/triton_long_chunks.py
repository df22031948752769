"""Chunks whose past is dequantized slice by slice, against float64 and the reference, as in triton_extend.py.
test_triton.py runs this file under TRITON_INTERPRET=1, and `make test-gpu` on a GPU."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_int8_paged.kernels import load_backend
from hf_int8_paged.kernels.triton import long_chunks

from .conftest import on_the_device
from .fresh_oracle import check_fresh, records
from .helpers import SEED, device_of, make_case

pytestmark = on_the_device
#: A GPU's flash attention takes no float32.
ON_CPU = device_of("triton").type == "cpu"
DTYPE = torch.float32 if ON_CPU else torch.float16
#: Beside the output: weights, rotated queries, keys, values and the slices' means are rounded once each.
TOLERANCE = 1e-5 if ON_CPU else 6 * torch.finfo(torch.float16).eps


@pytest.fixture(autouse=True)
def slices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All chunks take this way, over slices of few tokens; notes how many tokens each of them had."""
    seen: list[int] = []
    attend_slice = long_chunks.attend_slice

    def noted(rows: torch.Tensor, keys: torch.Tensor, *others: torch.Tensor) -> Any:
        seen.append(keys.shape[1])
        return attend_slice(rows, keys, *others)

    monkeypatch.setattr(long_chunks, "MOST_ROWS_FROM_INT8", 1)
    monkeypatch.setattr(long_chunks, "attend_slice", noted)
    return seen


def slices_of(tokens: int, case: Any) -> int:
    """Bytes of a slice of so many tokens."""
    sizes = case.storage.num_kv_heads * case.storage.head_dim * len(case.context_lens)
    return 2 * DTYPE.itemsize * sizes * tokens


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotated_and_centred": {"rotation": "hadamard", "center": True},
    "sink_logits": {"sink_logits": True, "center": True},
    "left_padding": {"kv_start": (5, 40), "rotation": "hadamard"},
    "first_tokens": {"first_tokens": 5, "first_at": (0, 29), "rotation": "hadamard", "center": True},
    "holes": {"holes": ((0, 0), (0, 3), (1, 2), (1, 4)), "kv_start": (0, 3)},
    "large_blocks": {"block_size": 64, "holes": ((0, 1),), "first_tokens": 1},
    "everything": {
        "sink_logits": True, "center": True, "rotation": "hadamard", "first_tokens": 2, "kv_start": (0, 1),
        "holes": ((1, 3),),
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("slice_tokens", [16, 48, 1000])
def test_slices_of_a_past_equal_gather_and_dense_attention(
    options: str, slice_tokens: int, slices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("triton", lens=(150, 83), group=3, head_dim=64, **OPTIONS[options])
    monkeypatch.setattr(long_chunks, "SCRATCH_BYTES", slices_of(slice_tokens, case))
    check_fresh("triton", case, 40, DTYPE, TOLERANCE)
    assert slices, "the chunk took another way"
    assert max(slices) <= slice_tokens


@pytest.mark.parametrize("past", [(0, 0), (1, 0), (15, 16), (17, 33), (64, 47)], ids=str)
def test_pasts_on_both_sides_of_a_slice(
    past: tuple[int, int], slices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("triton", lens=past, group=2, head_dim=32, rotation="hadamard", first_tokens=1)
    monkeypatch.setattr(long_chunks, "SCRATCH_BYTES", slices_of(16, case))
    check_fresh("triton", case, 33, DTYPE, TOLERANCE)
    assert slices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-5, 1.0, 3e4], ids=["tiny", "usual", "huge"])
def test_half_precision_with_values_of_any_size(dtype: torch.dtype, size: float) -> None:
    """Rotated, some are beyond float16 or below its normal numbers."""

    def scaled(q: Any, k: Any, v: Any) -> None:
        k *= min(size, 1.0)
        v[:] = size * (1 + v / 10)
        v[:, :, 3:5] *= 1e-3

    case = make_case("triton", lens=(100, 20), group=2, head_dim=64, rotation="hadamard", edit=scaled)
    check_fresh("triton", case, 50, dtype, 6 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("values", [False, True], ids=["key", "value"])
def test_a_faulty_row_of_the_past_reaches_its_head_and_sequence(values: bool) -> None:
    case = make_case("triton", lens=(40, 70), group=2, head_dim=32, rotation="hadamard")
    storage, device = case.storage, device_of("triton")
    block, slot = case.slot_of(1, 45)
    (storage.v_scales if values else storage.k_scales)[1, block, slot] = torch.nan
    rng = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(2, heads, 20, 32, generator=rng).to(device, DTYPE) for heads in (4, 2, 2))
    out = torch.empty_like(q)
    load_backend("triton").attend(out, q, storage, *records(case), (k, v))
    spoilt = out.isnan().cpu()
    assert spoilt[1, 2:].all(), "every row sees the whole past"
    assert not spoilt[0].any()
    assert not spoilt[1, :2].any()


def test_chunks_that_flash_attention_cannot_serve_are_left_to_the_int8_kernel(slices: list[int]) -> None:
    given: list[dict[str, Any]] = [
        {"window": 50}, {"softcap": 5.0}, {"key_mask": 0.7}, {"v_head_dim": 48}, {"head_dim": 36},
    ]  # fmt: skip
    for options in given:
        check_fresh("triton", make_case("triton", lens=(70, 33), **{"head_dim": 64, **options}), 20)
    assert not slices


def test_short_chunks_are_left_to_the_int8_kernel(slices: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_chunks, "MOST_ROWS_FROM_INT8", 40)
    for rows in (40, 41):
        assert not slices
        check_fresh("triton", make_case("triton", lens=(70,), head_dim=32), rows, DTYPE, TOLERANCE)
    assert slices


class Peak(TorchDispatchMode):
    """Counts the most bytes that tensors made inside hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known:
                size = x.untyped_storage().nbytes()
                self.held += size
                self.most = max(self.most, self.held)
                weakref.finalize(x.untyped_storage(), self.released, size)
        return result

    def released(self, size: int) -> None:
        self.held -= size


def test_memory_does_not_grow_with_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the block table's copies, of 8 bytes per column at most: `SCRATCH_BYTES` for keys and values of a slice,
    and what the chunk itself needs."""
    scratch, heads, dim, rows = 1 << 16, 2, 32, 24
    monkeypatch.setattr(long_chunks, "SCRATCH_BYTES", scratch)
    peaks = {}
    for past in (1000, 5000):
        case = make_case("triton", lens=(past,), kv_heads=heads, head_dim=dim)
        q, k, v = (torch.zeros(1, heads, rows, dim, dtype=DTYPE, device=device_of("triton")) for _ in range(3))
        with Peak() as peak:
            load_backend("triton").attend(torch.empty_like(q), q, case.storage, *records(case), (k, v))
        peaks[past] = peak.most
    of_the_table = 10 * 8 * (5000 - 1000) // case.storage.block_size
    assert peaks[5000] - peaks[1000] <= of_the_table
    of_the_chunk = 8 * 4 * heads * rows * dim
    assert peaks[5000] <= scratch * 1.25 + of_the_table * 2 + of_the_chunk
