"""The cut of decode attention's work as the kernels compute it. test_triton.py runs this file under TRITON_INTERPRET=1,
and `make test-gpu` on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from hf_int8_paged.kernels import int8_paged_decode_attention
from hf_int8_paged.kernels.triton import backend as triton_backend
from hf_int8_paged.kernels.triton import decode
from hf_int8_paged.kernels.triton.schedule import cut_evenly
from hf_int8_paged.kernels.triton.tuning import Chip, Config

from .attention_oracle import dense_attention
from .conftest import on_the_device
from .helpers import int32_on, make_case
from .interpreted_triton import ROW_ERROR

sys.path.append(str(Path(__file__).parents[2] / "eval"))

pytestmark = on_the_device


@triton.jit
def cut_kernel(
    positions_ptr,
    share_ptr,
    lens_ptr,
    first_ptr,
    batch,
    units,
    programs,
    q_len,
    window,
    HAS_WINDOW: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    positions, share, lead = cut_evenly(
        lens_ptr, first_ptr, batch, units, programs, q_len, window, HAS_WINDOW, SEQUENCES
    )
    tl.store(positions_ptr + tl.arange(0, SEQUENCES), positions)
    tl.store(share_ptr, share)
    tl.store(share_ptr + 1, lead)


@pytest.mark.parametrize("window", [None, 700], ids=["whole_context", "window"])
@pytest.mark.parametrize("programs", [1, 7, 264])
def test_the_kernels_cut_as_the_model(window: int | None, programs: int) -> None:
    import _schedule_model

    rng = np.random.default_rng(programs)
    for batch, longest in ((1, 5000), (2, 300), (31, 100_000), (33, 1_000_000), (200, 3000)):
        lengths, first = rng.integers(0, longest, batch), rng.integers(0, 40, batch)
        lengths[0], units, q_len = 0 if batch > 1 else longest, int(rng.integers(1, 9)), 2
        size = 1 if batch == 1 else max(32, triton.next_power_of_2(batch))
        positions, share = torch.zeros(size, **int32_on("triton")), torch.zeros(2, **int32_on("triton"))
        on_device = [torch.from_numpy(x).to(**int32_on("triton")) for x in (lengths, first)]
        cut_kernel[(1,)](
            positions, share, *on_device, batch, units, programs, q_len, window or 0, window is not None, size
        )  # fmt: skip
        if window is not None:
            first = np.maximum(first, lengths - q_len - window + 1)
        chunks = _schedule_model.chunks_of(lengths, first)
        want, want_share, want_lead = _schedule_model.cut_evenly(chunks, units, programs)
        np.testing.assert_array_equal(positions[:batch].cpu(), want)
        assert not positions[batch:].any()
        assert share.tolist() == [want_share, want_lead]


@pytest.mark.parametrize(
    ("processors", "lens"),
    [
        (1, (0, 1, 0, 803)),
        (2, (1300, 16, 255, 256, 257)),
        (3, (17,) * 9),
        (5, (1500, 40)),
        (11, (0, 0, 0)),
        (40, (1283,)),
    ],
    ids=lambda x: "_".join(map(str, x[:5])) if isinstance(x, tuple) else f"{x}_processors",
)
@pytest.mark.parametrize("options", [{}, {"window": 300, "q_len": 3}, {"q_len": 9}], ids=["row", "window", "two_tiles"])
def test_any_cut_gives_the_answer_of_the_oracle(monkeypatch, processors: int, lens: tuple, options: dict) -> None:
    """Units that begin and end within a program's share, several of them, several programs per unit, none at all."""
    monkeypatch.setattr(triton_backend, "chip_of", lambda device: Chip("interpreter", processors))
    monkeypatch.setattr(decode, "config_for", lambda *a: Config(None, 1))
    decode.decode_constants.cache_clear()
    lens = tuple(max(length, options.get("q_len", 1)) if length else 0 for length in lens)
    case = make_case("triton", lens=lens, kv_heads=2, group=2, head_dim=32, **options)
    out = int8_paged_decode_attention(*case.arguments, **case.options).double().cpu().numpy()
    want = dense_attention(case)
    decode.decode_constants.cache_clear()
    size = np.linalg.norm(want, axis=-1)
    assert (np.linalg.norm(out - want, axis=-1) <= ROW_ERROR * size).all()
    assert (out[size == 0] == 0).all()
