"""The kernel for long chunks against float64 and the reference. test_triton.py runs this file under
TRITON_INTERPRET=1, and `make test-gpu` on a GPU."""

from __future__ import annotations

import pytest
import torch

from .conftest import on_the_device
from .fresh_oracle import check_fresh
from .helpers import SEED, device_of, make_case

pytestmark = on_the_device


@pytest.mark.parametrize(
    ("past", "chunk", "options"),
    [
        ((0,), 1, {}),
        ((37, 0, 5), 17, {}),
        ((70, 33), 40, {"rotation": "hadamard", "center": True}),
        ((200, 64), 130, {"window": 90, "head_dim": 80, "v_head_dim": 48, "rotation": "hadamard", "center": True}),
        ((100, 20), 50, {"softcap": 5.0, "sink_logits": True, "center": True, "kv_start": (3, 30)}),
        ((700,), 300, {"group": 1, "head_dim": 32, "block_size": 128}),
        ((70, 33), 40, {"rotation": "hadamard", "center": True, "first_tokens": 1}),
        ((90, 43), 40, {"center": True, "softcap": 5.0, "sink_logits": True, "first_tokens": 16, "first_at": (0, 29)}),
        ((9, 20), 50, {"window": 24, "rotation": "hadamard", "first_tokens": 7, "kv_start": (2, 0)}),
    ],
    ids=[
        "one_token",
        "ragged",
        "rotated_and_centred",
        "window",
        "softcap_sinks_left_padding",
        "long",
        "first_token",
        "first_tokens_left_padding",
        "first_tokens_leave_the_window",
    ],
)
def test_extend_equals_gather_and_dense_attention(past: tuple[int, ...], chunk: int, options: dict) -> None:
    check_fresh("triton", make_case("triton", lens=past, **{"group": 3, "head_dim": 64, **options}), chunk)


@pytest.mark.parametrize("start", [0, -7, 40])
@pytest.mark.parametrize("columns", [400, 230, 0])
def test_keys_outside_the_mask_are_not_seen(columns: int, start: int) -> None:
    """Holes in past and chunk, and positions past the mask's last column."""
    case = make_case("triton", lens=(200, 33), group=2, head_dim=32, rotation="hadamard")
    seen = torch.rand(2, columns, generator=torch.Generator().manual_seed(SEED)) < 0.7
    case.options |= {"key_mask": seen.to(device_of("triton")), "key_mask_start": start}
    check_fresh("triton", case, 70)


EVERYTHING = {
    "window": 50, "softcap": 3.0, "sink_logits": True, "center": True, "rotation": "hadamard", "first_tokens": 2,
}  # fmt: skip


#: Tiles hold 32 rows of query, 64 tokens, and blocks 16 tokens: sizes on both sides of each boundary.
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(
    ("past", "chunk"),
    [
        ((0, 1, 15), 2),
        ((16, 17, 0), 15),
        ((63, 64, 65), 16),
        ((31, 127, 3), 31),
        ((128, 0, 129), 32),
        ((48, 191, 2), 33),
        ((192, 5, 193), 63),
        ((1, 64, 255), 64),
        ((257, 0, 33), 65),
        ((100, 319, 7), 97),
        ((0, 0), 127),
        ((321, 13), 129),
        ((509, 66), 193),
        ((699, 1), 257),
        ((700, 0), 300),
    ],
    ids=str,
)
def test_extend_on_both_sides_of_every_tile_boundary(past: tuple[int, ...], chunk: int, options: dict) -> None:
    case = make_case("triton", lens=past, kv_heads=1, group=1 + chunk % 2, head_dim=32, seed=chunk, **options)
    check_fresh("triton", case, chunk)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_extend_in_half_precision(dtype: torch.dtype) -> None:
    case = make_case("triton", lens=(100, 20), group=2, head_dim=64, rotation="hadamard", center=True)
    # Output, weights and rotated queries are rounded once each.
    check_fresh("triton", case, 50, dtype, 3 * torch.finfo(dtype).eps)
