"""The C kernel for long chunks over a past, under every instruction set of this processor: against float64 on both
sides of every boundary of its tiles, and against the reference where rows hold NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_int8_paged.kernels import MAX_DECODE_ROWS, Tokens, reference
from hf_int8_paged.kernels.cpu import backend as cpu
from tests.segments import set_scale

from .conftest import backends_here
from .fresh_oracle import FLOAT32_ERROR, check_fresh, records
from .helpers import SEED, Case, make_case

if "cpu" not in backends_here():
    pytest.skip("no C compiler, so no C kernels", allow_module_level=True)


@pytest.fixture(params=cpu.isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.selected_isa()
    cpu.select_isa(request.param)
    yield request.param
    cpu.select_isa(before)


EVERYTHING: dict[str, Any] = {
    "window": 50, "softcap": 3.0, "sink_logits": True, "center": True, "rotation": "hadamard", "first_tokens": 2,
}  # fmt: skip


#: Products take 2 to 6 rows at a time, work items 64 rows, tiles 64 tokens, blocks 16: sizes on both sides of each.
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(
    ("past", "chunk"),
    [
        ((0, 1, 15), 1),
        ((16, 17, 0), 2),
        ((63, 64, 65), 5),
        ((31, 127, 3), 6),
        ((128, 0, 129), 7),
        ((48, 191, 2), 13),
        ((192, 5, 193), 31),
        ((1, 64, 255), 32),
        ((257, 0, 33), 33),
        ((100, 319, 7), 63),
        ((0, 0), 64),
        ((321, 13), 65),
        ((509, 66), 129),
        ((699, 1), 257),
    ],
    ids=str,
)
def test_both_sides_of_every_tile_boundary(past: tuple[int, ...], chunk: int, options: dict) -> None:
    group = (1, 3, 2)[chunk % 3]
    case = make_case("cpu", lens=past, kv_heads=1 + chunk % 2, group=group, head_dim=32, seed=chunk, **options)
    check_fresh("cpu", case, chunk)


@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize(
    "dims", [(4, 4), (12, 36), (16, 64), (36, 12), (64, 80), (80, 128), (128, 64), (256, 256)], ids=str
)
def test_every_width_of_rows(dims: tuple[int, int], block_size: int) -> None:
    sizes: dict[str, Any] = {"head_dim": dims[0], "v_head_dim": dims[1], "block_size": block_size}
    holes = ((0, 1), (1, 0)) if block_size < 100 else ()
    case = make_case(
        "cpu", lens=(150, 37), group=5, rotation="hadamard", center=True, first_tokens=1, holes=holes, **sizes
    )
    check_fresh("cpu", case, 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    case = make_case(
        "cpu", lens=(100, 20), group=2, rotation="hadamard", center=True, first_tokens=3, head_dim=36, dtype=dtype
    )
    # Everything is computed in float32, and the output is rounded once.
    check_fresh("cpu", case, 50, dtype, FLOAT32_ERROR + torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("start", [0, -7, 40])
@pytest.mark.parametrize("columns", [400, 230, 0])
@pytest.mark.parametrize("window", [None, 33])
def test_keys_outside_the_mask_are_not_seen(columns: int, start: int, window: int | None) -> None:
    """Holes in past and chunk, and positions past the mask's last column."""
    case = make_case("cpu", lens=(200, 33), group=2, head_dim=32, rotation="hadamard", window=window, first_tokens=3)
    seen = torch.rand(2, columns, generator=torch.Generator().manual_seed(SEED)) < 0.7
    case.options |= {"key_mask": seen, "key_mask_start": start}
    check_fresh("cpu", case, 70)


@pytest.mark.parametrize(
    "options",
    [
        {"first_tokens": 16, "first_at": (0, 29), "softcap": 50.0, "sink_logits": True},
        {"first_tokens": 7, "window": 24, "kv_start": (2, 0)},
        {"first_tokens": 4, "kv_start": (95, 60)},  # past all tokens of one sequence, and some of the other's chunk
        {"window": 1},
    ],
    ids=["left_padding", "leave_the_window", "start_in_the_chunk", "own_token_only"],
)
def test_what_rows_see(options: dict) -> None:
    case = make_case("cpu", lens=(70, 43), group=3, rotation="hadamard", center=True, **options)
    check_fresh("cpu", case, 40)


def attend_both(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    outputs = []
    for attend in (cpu.attend, reference.attend):
        out = q.new_full((*q.shape[:3], v.shape[-1]), 7.0)
        attend(out, q, case.storage, *records(case), (k, v), case.options.get("first_tokens"))
        outputs.append(out)
    return outputs


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["query", "key", "value", "stored key", "stored value", "first key", "first value"])
def test_a_fault_reaches_only_the_rows_that_see_it(place: str, fault: float) -> None:
    case = make_case("cpu", lens=(90, 33), group=2, first_tokens=2, rotation="hadamard", center=True, window=70)
    rng = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(2, heads, 80, 64, generator=rng) for heads in (4, 2, 2))
    held = case.options["first_tokens"]
    block, slot = case.slot_of(0, 75)
    if place == "stored key":
        set_scale(case.storage, "k_scales", (1, block, slot), torch.nan)
    elif place == "stored value":
        set_scale(case.storage, "v_scales", (1, block, slot), torch.nan)
    else:
        tensor = {"query": q, "key": k, "value": v, "first key": held.k, "first value": held.v}[place]
        tensor[int(held.row[1]) if "first" in place else 0, 1, 1 if "first" in place else 33, 9] = fault
    ours, want = attend_both(case, q, k, v)
    assert ours.isnan().any()
    assert torch.equal(ours.isnan(), want.isnan())
    norm = want.nan_to_num(0.0).norm(dim=-1)
    assert ((ours.nan_to_num(0.0) - want.nan_to_num(0.0)).norm(dim=-1) <= FLOAT32_ERROR * norm).all()


def test_rows_that_see_nothing_are_zero() -> None:
    """Even where a query holds NaN, and with sink logits alone in the denominator."""
    case = make_case("cpu", lens=(20,), group=2, sink_logits=True)
    case.options["key_mask"] = torch.zeros(1, 90, dtype=torch.bool)
    q, k, v = torch.full((1, 4, 30, 64), torch.nan), torch.randn(1, 2, 30, 64), torch.randn(1, 2, 30, 64)
    assert not attend_both(case, q, k, v)[0].any()


def test_a_large_center_costs_no_precision() -> None:
    """Keys far from the origin, as those of models with biases: scores of past and chunk are compared relative to the
    centre, whose own score is thousands of times as large as their differences."""
    case = make_case("cpu", lens=(60,), group=2, center=True, rotation="hadamard")
    shift = 1000.0 * torch.randn(2, 64, generator=torch.Generator().manual_seed(SEED))
    assert case.storage.key_center is not None
    before = case.storage.key_center.clone()
    rng = torch.Generator().manual_seed(SEED + 1)
    q, k, v = (torch.randn(1, heads, 40, 64, generator=rng) for heads in (4, 2, 2))
    k_far = k + before[:, None] + shift[:, None]
    case.storage.key_center.add_(shift)
    # What is left after rounding the far keys to float32 is the same question about a centre of 0.
    near = make_case("cpu", lens=(60,), group=2, center=True, rotation="hadamard")
    assert near.storage.key_center is not None
    near.storage.key_center.zero_()
    ours, _ = attend_both(case, q, k_far, v)
    want, _ = attend_both(near, q, k_far - case.storage.key_center[:, None], v)
    assert ((ours - want).norm(dim=-1) <= FLOAT32_ERROR * want.norm(dim=-1)).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_fresh("cpu", make_case("cpu", lens=(700, 333), kv_heads=1, group=3, window=600), 90)
    finally:
        torch.set_num_threads(before)


def test_blocks_of_later_positions_are_not_read() -> None:
    """The chunk may have been appended or not, and its table may end before it."""
    case = make_case("cpu", lens=(48, 33), group=2, rotation="hadamard", center=True)
    rng = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(2, heads, 31, 64, generator=rng) for heads in (4, 2, 2))
    _, scoring = records(case)
    outputs = []
    for width in (case.block_table.shape[1], 3):
        tokens = Tokens.at(case.block_table[:, :width], case.context_lens)
        out = torch.empty_like(q)
        cpu.attend(out, q, case.storage, tokens, scoring, (k, v))
        outputs.append(out)
    assert torch.equal(*outputs)


def test_lengths_and_blocks_out_of_range_are_refused() -> None:
    case = make_case("cpu", lens=(48,))
    q = torch.randn(1, 2, MAX_DECODE_ROWS + 1, 64)
    scoring = records(case)[1]
    for lens, table in (([65], case.block_table), ([-1], case.block_table), ([48], case.block_table + 99)):
        tokens = Tokens.at(table, torch.tensor(lens, dtype=torch.int32))
        with pytest.raises(ValueError, match=r"lengths|block_table"):
            cpu.attend(torch.empty_like(q), q, case.storage, tokens, scoring, (q, q))
