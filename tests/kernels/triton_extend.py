"""Extend attention against a dense copy of the past. test_triton.py runs this file under TRITON_INTERPRET=1, and
`make test-gpu` on a GPU."""

from __future__ import annotations

import pytest
import torch

from hf_int8_paged.kernels import gather_dense, triton_backend

from .conftest import on_the_device
from .helpers import SEED, Case, device_of, make_case

pytestmark = on_the_device


def extend_by_gathering(case: Case, q: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor) -> torch.Tensor:
    """Attention of a chunk over a dense copy of the past and over itself, in float64, on the CPU."""
    held = case.options.get("first_tokens")
    past_k, past_v = gather_dense(
        case.storage, case.block_table, case.context_lens, first_tokens=held, backend="reference"
    )
    chunk, group = q.shape[2], q.shape[1] // k_new.shape[1]
    window, softcap, kv_start, key_mask, sink_logits = (
        case.options.get(name) for name in ("window", "softcap", "kv_start", "key_mask", "sink_logits")
    )
    outputs = []
    for b, past in enumerate(case.context_lens.tolist()):
        k, v = (
            # Tokens that no row sees are poisoned.
            torch.cat([dense[b, :, :past].nan_to_num(0.0).double(), new[b].double()], 1)
            .cpu()
            .repeat_interleave(group, 0)
            for dense, new in ((past_k, k_new), (past_v, v_new))
        )
        scores = q[b].double().cpu() @ k.mT * case.scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        positions, keys = past + torch.arange(chunk)[:, None], torch.arange(past + chunk)
        visible = keys <= positions
        if window is not None:
            visible &= keys > positions - window
        if kv_start is not None:
            visible &= keys >= kv_start[b].cpu()
        if held is not None:
            visible &= keys >= held.first[b].cpu()
        if key_mask is not None:
            columns = key_mask[b].cpu()
            visible &= torch.cat([columns, columns.new_zeros(past + chunk)])[: past + chunk]
        scores = scores.masked_fill(~visible, -torch.inf)
        if sink_logits is not None:
            scores = torch.cat([scores, sink_logits.double().cpu()[:, None, None].expand(-1, chunk, 1)], dim=-1)
        outputs.append(scores.softmax(-1).nan_to_num(0.0)[..., : past + chunk] @ v)
    return torch.stack(outputs)


def check_extend(case: Case, chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    """A random chunk after the case's tokens, into a poisoned output."""
    rng = torch.Generator().manual_seed(SEED)
    storage, (batch, heads), device = case.storage, case.q.shape[:2], device_of("triton")
    q = torch.randn(batch, heads, chunk, storage.head_dim, generator=rng).to(device, dtype)
    k_new = torch.randn(batch, storage.num_kv_heads, chunk, storage.head_dim, generator=rng).to(device, dtype)
    # Strided, as a model's projections are.
    v_new = torch.randn(batch, chunk, storage.num_kv_heads, storage.v_head_dim, generator=rng).to(device, dtype)
    v_new = v_new.transpose(1, 2)
    out = torch.full((batch, heads, chunk, storage.v_head_dim), torch.nan, dtype=dtype, device=device)
    names = ("kv_start", "key_mask", "window", "softcap", "sink_logits", "first_tokens")
    options = [case.options.get(name) for name in names]
    triton_backend.extend(out, q, k_new, v_new, storage, case.block_table, case.context_lens, case.scale, *options)
    want = extend_by_gathering(case, q, k_new, v_new)
    assert ((out.cpu() - want).norm(dim=-1) <= tolerance * want.norm(dim=-1)).all()


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
    # float32 sums of some hundred terms
    check_extend(make_case("triton", lens=past, **{"group": 3, "head_dim": 64, **options}), chunk, torch.float32, 1e-5)


@pytest.mark.parametrize("columns", [400, 230, 0])
def test_keys_outside_the_mask_are_not_seen(columns: int) -> None:
    """Holes in past and chunk, and positions past the mask's last column."""
    case = make_case("triton", lens=(200, 33), group=2, head_dim=32, rotation="hadamard")
    seen = torch.rand(2, columns, generator=torch.Generator().manual_seed(SEED)) < 0.7
    case.options["key_mask"] = seen.to(device_of("triton"))
    check_extend(case, 70, torch.float32, 1e-5)


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
    check_extend(case, chunk, torch.float32, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_extend_in_half_precision(dtype: torch.dtype) -> None:
    case = make_case("triton", lens=(100, 20), group=2, head_dim=64, rotation="hadamard", center=True)
    # Output, weights and rotated queries are rounded once each.
    check_extend(case, 50, dtype, 3 * torch.finfo(dtype).eps)
