"""Decode attention of every backend against float64 attention over the same int8 blocks.

Slots that no query row sees hold int8 127 with scale NaN, in these tests always.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_int8_paged.kernels import TILE_ORDERS, int8_paged_decode_attention
from tests.segments import set_scale

from .attention_oracle import assert_close, dense_attention, error_bound
from .helpers import Case, device_of, make_case, poison_slots

wide = pytest.mark.wide


def check(case: Case) -> torch.Tensor:
    """The backend against dense float64 attention, and the reference's float64 path too."""
    want = dense_attention(case)
    out = torch.full(want.shape, torch.nan, dtype=case.q.dtype, device=case.q.device)
    int8_paged_decode_attention(*case.arguments, **case.options, out=out)
    assert_close(out, want, error_bound(case, want))
    q, *rest = case.arguments
    exact = int8_paged_decode_attention(q.double(), *rest, **case.options, backend="reference")
    # float64 rounding, with room for scores of some thousands.
    assert_close(exact, want, np.full(want.shape, 1e-12 * np.nanmax(np.abs(case.values), initial=1)))
    return out


SHAPES: dict[str, dict[str, Any]] = {
    "one_token_in_the_cache": dict(lens=(1,)),
    "MHA": dict(lens=(37,), kv_heads=2, head_dim=64),
    "GQA_of_2_batch_2_ragged": dict(lens=(5, 50), group=2, head_dim=32),
    "GQA_of_3_as_in_SmolLM2": dict(lens=(70,), kv_heads=3, group=3, head_dim=64),
    "GQA_of_4_head_dim_128": dict(lens=(45,), group=4, head_dim=128),
    "GQA_of_7": dict(lens=(33,), group=7, head_dim=64),
    "GQA_of_8_head_dim_96": dict(lens=(23,), kv_heads=1, group=8, head_dim=96),
    "MQA_of_16_head_dim_80": dict(lens=(29,), kv_heads=1, group=16, head_dim=80),
    "head_dim_256": dict(lens=(19,), kv_heads=1, group=4, head_dim=256),
    "v_narrower_than_k": dict(lens=(41,), group=2, head_dim=96, v_head_dim=64),
    "v_wider_than_k": dict(lens=(41,), group=2, head_dim=64, v_head_dim=128),
    "block_of_32": dict(lens=(75,), group=2, head_dim=64, block_size=32),
    "block_of_64": dict(lens=(75, 131), group=2, head_dim=32, block_size=64),
    "block_of_128": dict(lens=(131,), group=2, head_dim=64, block_size=128),
    "two_query_rows": dict(lens=(35, 18), group=2, q_len=2),
    "five_query_rows_GQA_of_3": dict(lens=(37,), group=3, q_len=5),
    "sixteen_query_rows_MQA_of_16": dict(lens=(51,), kv_heads=1, group=16, head_dim=32, q_len=16),
    "more_query_rows_than_tokens": dict(lens=(3, 20), q_len=5),
}
WIDE_SHAPES: dict[str, dict[str, Any]] = {
    "batch_5_ragged": dict(lens=(1, 16, 17, 130, 333), kv_heads=3, group=3),
    "batch_3_block_of_32_q_len_2": dict(lens=(31, 64, 97), kv_heads=3, group=4, head_dim=128, block_size=32, q_len=2),
    "batch_3_block_of_128": dict(lens=(127, 129, 300), kv_heads=4, group=2, head_dim=80, block_size=128),
    "long_context_batch_1": dict(lens=(5003,), kv_heads=1, group=3),
    "long_context_beside_a_short_one": dict(lens=(2, 2049), kv_heads=2, group=7, head_dim=128),
    "long_context_16_rows": dict(lens=(1500, 700), kv_heads=1, group=8, head_dim=256, q_len=16),
    "32_kv_heads": dict(lens=(40, 9), kv_heads=32, head_dim=128),
    "nine_query_rows_GQA_of_7_head_dim_96": dict(lens=(200, 9), group=7, head_dim=96, q_len=9),
}


def named(cases: dict[str, Any], wide_cases: dict[str, Any]) -> list:
    return [pytest.param(c, id=n) for n, c in cases.items()] + [
        pytest.param(c, id=n, marks=wide) for n, c in wide_cases.items()
    ]


@pytest.mark.parametrize("shape", named(SHAPES, WIDE_SHAPES))
def test_attention_over_blocks_in_any_order(backend: str, shape: dict[str, Any]) -> None:
    check(make_case(backend, **shape))


OPTIONS: dict[str, dict[str, Any]] = {
    "kv_start_skips_left_padding": dict(kv_start=(0, 19, 37)),
    "window_of_1": dict(window=1),
    "window_inside_a_block": dict(window=5),
    "window_over_block_boundaries": dict(window=21),
    "window_larger_than_the_context": dict(window=1000),
    "key_mask": dict(key_mask=0.6),
    "key_mask_from_position_7": dict(key_mask=0.6, key_mask_start=7),
    "softcap": dict(softcap=0.8),
    "sink_logits": dict(sink_logits=True),
    "rotation": dict(rotation="hadamard"),
    "key_center": dict(center=True),
    "key_center_softcap_sinks": dict(center=True, softcap=2.0, sink_logits=True),
    "rotation_key_center_softcap": dict(rotation="hadamard", center=True, softcap=2.0),
    "holes": dict(holes=((0, 0), (1, 1), (2, 2))),
    "window_sinks_as_in_gpt_oss": dict(window=24, sink_logits=True),
    "window_softcap_as_in_Gemma_2": dict(window=33, softcap=50.0),
    "one_sink_token": dict(first_tokens=1),
    "first_tokens_after_left_padding": dict(first_tokens=4, first_at=(7, 0, 16)),
    "first_tokens_past_a_subtile": dict(first_tokens=16, first_at=(0, 3, 20)),
    "first_tokens_out_of_the_window": dict(first_tokens=3, window=7),
    "first_tokens_conditioned": dict(first_tokens=2, rotation="hadamard", center=True),
    "first_tokens_conditioned_softcap": dict(first_tokens=2, rotation="hadamard", center=True, softcap=2.0),
    "first_tokens_conditioned_sinks_mask": dict(first_tokens=5, center=True, sink_logits=True, key_mask=0.6),
    "first_tokens_in_holes_after_kv_start": dict(first_tokens=9, holes=((0, 0), (1, 1), (2, 0)), kv_start=(2, 3, 0)),
    "all": dict(
        kv_start=(0, 3, 20), key_mask=0.8, key_mask_start=2, window=30, softcap=1.5, sink_logits=True,
        rotation="hadamard", center=True, holes=((2, 1),), first_tokens=3, first_at=(0, 4, 24),
    ),
}  # fmt: skip
OPTION_SHAPES: dict[str, dict[str, Any]] = {"three_rows": dict(lens=(9, 40, 53), group=2, head_dim=32, q_len=3)}
WIDE_OPTION_SHAPES: dict[str, dict[str, Any]] = {
    "one_row": dict(lens=(20, 64, 333), kv_heads=3, group=3, head_dim=64),
    "head_dim_80_to_96_block_of_32": dict(lens=(33, 95, 100), head_dim=80, v_head_dim=96, block_size=32, q_len=2),
    "sixteen_rows_MQA": dict(lens=(16, 70, 150), kv_heads=1, group=16, head_dim=128, q_len=16),
}


@pytest.mark.parametrize("options", named(OPTIONS, {}))
@pytest.mark.parametrize("shape", named(OPTION_SHAPES, WIDE_OPTION_SHAPES))
def test_options(backend: str, shape: dict[str, Any], options: dict[str, Any]) -> None:
    check(make_case(backend, **shape, **{**options, "holes": within(options.get("holes", ()), shape)}))


def within(holes: tuple, shape: dict[str, Any]) -> tuple:
    """The holes that lie inside their sequence."""
    return tuple((b, j) for b, j in holes if j * shape.get("block_size", 16) < shape["lens"][b])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("options", named({"plain": {}, "sinks_window_rotation": OPTIONS["all"]}, {}))
def test_half_precision_queries(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    check(make_case(backend, **OPTION_SHAPES["three_rows"], **options, dtype=dtype))


@pytest.mark.parametrize("tile_order", TILE_ORDERS)
@pytest.mark.parametrize("dims", [(64, 64), (80, 96), (32, 128)], ids=str)
def test_the_reference_reads_every_tile_order(tile_order: str, dims: tuple[int, int]) -> None:
    head_dim, v_head_dim = dims
    check(make_case("reference", lens=(35, 16), head_dim=head_dim, v_head_dim=v_head_dim, tile_order=tile_order))


@pytest.mark.parametrize("block_size", [16, *(pytest.param(n, marks=wide) for n in (32, 64, 128))])
@pytest.mark.parametrize("head_dim", [64, pytest.param(96, marks=wide)])
def test_context_lengths_at_every_residue_of_the_block_size(backend: str, block_size: int, head_dim: int) -> None:
    lens = [residue + block_size * (residue % 3) for residue in range(1, block_size + 1)]
    check(make_case(backend, lens=lens, kv_heads=1, group=2, head_dim=head_dim, block_size=block_size, q_len=2))


@pytest.mark.parametrize("window", [1, 15, 16, 17, 31])
def test_windows_that_end_anywhere_in_a_block(backend: str, window: int) -> None:
    check(make_case(backend, lens=(47, 48, 49, 64), kv_heads=1, head_dim=32, q_len=2, window=window))


def test_rows_that_see_nothing_are_zero(backend: str) -> None:
    case = make_case(backend, lens=(0, 20, 40, 12), group=2, q_len=2, kv_start=(0, 25, 0, 0), key_mask=1.0)
    case.options["key_mask"][3] = False
    poison_slots(case.storage, [case.slot_of(3, p) for p in range(12)])
    out = check(case)
    assert not out[[0, 1, 3]].any()
    assert out[2].all()


@pytest.mark.parametrize("columns", [0, 20])
def test_columns_outside_the_mask_are_not_seen(backend: str, columns: int) -> None:
    case = make_case(backend, lens=(50, 33), q_len=2, key_mask=0.9, key_mask_start=4)
    case.options["key_mask"] = case.options["key_mask"][:, :columns]
    out = check(case)
    assert columns or not out.any()


def test_an_empty_batch_gives_an_empty_result(backend: str) -> None:
    case = make_case(backend, lens=())
    assert int8_paged_decode_attention(*case.arguments).shape == (0, 2, 1, 64)


@pytest.mark.parametrize("store", ["k", "v"])
@pytest.mark.parametrize("rotation", [None, "hadamard"])
def test_a_faulty_row_reaches_only_the_queries_that_see_it(backend: str, store: str, rotation: str | None) -> None:
    case = make_case(backend, lens=(40, 40), group=2, q_len=3, window=20, kv_start=(0, 30), rotation=rotation)
    # Windows of sequence 0 start at 18, 19 and 20: its first two query rows see position 19. Sequence 1 starts at 30.
    block, slot = case.slot_of(0, 19)
    set_scale(case.storage, f"{store}_scales", (1, block, slot), torch.nan)
    dense = case.keys if store == "k" else case.values
    dense[0, 1, 19] = np.nan
    want = dense_attention(case)
    out = int8_paged_decode_attention(*case.arguments, **case.options)
    assert_close(out, want, error_bound(case, want))
    faulty = out.isnan().any(-1)
    assert faulty[0].tolist() == [[False] * 3, [False] * 3, [True, True, False], [True, True, False]]
    assert not faulty[1].any()


def test_a_faulty_query_row_spoils_only_its_own_output(backend: str) -> None:
    case = make_case(backend, lens=(40, 20), group=2, q_len=3)
    case.q[1, 2, 1, 5] = torch.nan
    want = dense_attention(case)
    out = int8_paged_decode_attention(*case.arguments)
    assert_close(out, want, error_bound(case, want))
    assert out.isnan().any(-1).nonzero().tolist() == [[1, 2, 1]]


def test_sinks_of_another_dtype_than_the_queries(backend: str) -> None:
    case = make_case(backend, lens=(40, 20), group=2, sink_logits=True, dtype=torch.bfloat16)
    case.options["sink_logits"] = case.options["sink_logits"].float() + 0.001
    check(case)


@pytest.mark.parametrize("scale", [0.0, 0.01, 65504.0, torch.inf])
@pytest.mark.parametrize("options", named({"whole_context": {}, "window_and_mask": dict(window=19, key_mask=0.7)}, {}))
def test_what_nobody_may_read_changes_not_a_bit(backend: str, options: dict[str, Any], scale: float) -> None:
    """NaN scales in unused slots show a read of theirs. Numbers there must not steer the arithmetic either."""
    case = make_case(backend, lens=(50, 37), group=2, head_dim=64, **options)
    poisoned = int8_paged_decode_attention(*case.arguments, **case.options)
    for segment in case.storage.segments:
        for scales in (segment.k_scales, segment.v_scales):
            scales[scales.isnan()] = scale
    assert torch.equal(int8_paged_decode_attention(*case.arguments, **case.options), poisoned)


def test_strided_queries(backend: str) -> None:
    case = make_case(backend, lens=(37, 20), group=2, q_len=3)
    plain = check(case)
    q = case.q
    for same in (q.transpose(1, 2).contiguous().transpose(1, 2), torch.stack((q, q * torch.nan), -1)[..., 0]):
        assert not same.is_contiguous()
        case.q = same
        assert torch.equal(check(case), plain)


def test_writes_into_a_strided_out_and_nothing_else(backend: str) -> None:
    case = make_case(backend, lens=(37, 20), group=2, q_len=3, v_head_dim=96)
    want = check(case)
    memory = torch.full((2, 3 + 1, 4, 96 + 8), torch.nan, device=device_of(backend))
    out = memory[:, :3, :, :96].transpose(1, 2)  # what a model reshapes to [batch, q_len, hidden]
    assert int8_paged_decode_attention(*case.arguments, out=out) is out
    assert torch.equal(out, want)
    assert memory[:, 3].isnan().all()
    assert memory[..., 96:].isnan().all()


def test_the_storage_and_inputs_are_left_alone(backend: str) -> None:
    case = make_case(backend, lens=(37, 20), group=2, **OPTIONS["key_center_softcap_sinks"])
    tensors = [*(getattr(case.storage, n) for n in ("k", "v", "k_scales", "v_scales", "key_center")), case.q]
    before = [x.clone() for x in tensors]
    int8_paged_decode_attention(*case.arguments, **case.options)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, tensors))


def outlier_in_q(q, k, v) -> None:
    q[..., 5] = 30.0


def one_key_takes_all_weight(q, k, v) -> None:
    k[:, :, 11] = q[:, :: q.shape[1] // k.shape[1], 0] * 8


def equal_scores(q, k, v) -> None:
    k[:] = k[:, :, :1]


def scales_over_6_orders(q, k, v) -> None:
    tokens = np.arange(k.shape[2])
    k *= 10.0 ** -(tokens[:, None] * 5 % 7)
    v *= 10.0 ** (tokens[:, None] * 3 % 7 - 3.0)


def outlier_channel_in_k_and_v(q, k, v) -> None:
    k[..., 3] *= 40
    v[..., 9] *= 100


def all_zero(q, k, v) -> None:
    k[:] = 0
    v[:, :, ::2] = 0


@pytest.mark.parametrize("rotation", [None, "hadamard"])
@pytest.mark.parametrize("edit", [
    outlier_in_q, one_key_takes_all_weight, equal_scores, scales_over_6_orders, outlier_channel_in_k_and_v, all_zero,
])  # fmt: skip
@pytest.mark.parametrize("shape", named(
    {"short": dict(lens=(53,), group=2, head_dim=64)},
    {"long": dict(lens=(1201, 800), kv_heads=2, group=4, head_dim=128, q_len=2)},
))  # fmt: skip
def test_adversarial_inputs(backend: str, shape: dict[str, Any], edit: Any, rotation: str | None) -> None:
    check(make_case(backend, **shape, edit=edit, rotation=rotation))


def test_a_window_of_1_returns_the_rows_own_value(backend: str) -> None:
    case = make_case(backend, lens=(40, 17), group=2, q_len=4, window=1)
    out = check(case)
    own = torch.from_numpy(case.values)
    for b, n in enumerate((40, 17)):
        rows = own[b, :, n - 4 : n].repeat_interleave(2, 0).to(out)
        # A weight that is split into two terms is not exactly 1.
        torch.testing.assert_close(out[b], rows, rtol=0, atol=3e-4 * float(rows.abs().max()))
