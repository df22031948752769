"""Attention of a chunk over its own keys and values in full precision and over a past in blocks, in every backend. The
Triton kernel for it has a file of its own, triton_extend.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_int8_paged.kernels import Scoring, Tokens, reference

from .conftest import backends_here
from .fresh_oracle import attention_over_fresh, check_fresh, records
from .helpers import SEED, make_case

#: lengths of the past, rows of the chunk, options of the case
CHUNKS: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "no_past": ((0, 0), 20, {}),
    "ragged_past": ((37, 0, 5), 17, {"rotation": "hadamard", "center": True}),
    "window_and_holes": ((90, 40), 33, {"window": 50, "holes": ((0, 0), (0, 1), (1, 0)), "v_head_dim": 48}),
    "softcap_sink_logits": ((60, 20), 9, {"softcap": 5.0, "sink_logits": True, "center": True, "kv_start": (3, 12)}),
    "first_tokens": ((40, 33), 21, {"first_tokens": 4, "first_at": (0, 9), "holes": ((0, 0),), "rotation": "hadamard"}),
    "everything": (
        (70, 33), 25,
        {"window": 60, "softcap": 3.0, "sink_logits": True, "center": True, "rotation": "hadamard", "first_tokens": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("backend", [name for name in backends_here() if name != "triton"])
def test_fresh_keys_and_values_against_float64(backend: str, chunk: str) -> None:
    past, rows, options = CHUNKS[chunk]
    check_fresh(backend, make_case(backend, lens=past, **{"group": 3, "head_dim": 64, **options}), rows)


def test_the_reference_computes_in_float64_if_the_queries_are() -> None:
    """Stored rows are exact there, so the only rounding is float64's: sums of a hundred terms of size one."""
    case = make_case("reference", lens=(37, 12), group=2, first_tokens=3, window=30, holes=((0, 1),))
    rng = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(2, heads, 6, 64, generator=rng, dtype=torch.float64) for heads in (4, 2, 2))
    out = torch.empty_like(q)
    reference.attend(out, q, case.storage, *records(case), (k, v), case.options["first_tokens"])
    want = torch.stack([attention_over_fresh(case, b, q[b], k[b], v[b]) for b in range(2)])
    assert (out - want).abs().max() <= 100 * torch.finfo(torch.float64).eps * want.abs().max()


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("values", [False, True], ids=["key", "value"])
def test_a_faulty_row_reaches_only_the_rows_that_see_it(values: bool, fault: float) -> None:
    case = make_case("reference", lens=(20,), group=2)
    rng = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(1, heads, 5, 64, generator=rng) for heads in (4, 2, 2))
    (v if values else k)[0, 1, 2, 7] = fault
    out = torch.empty_like(q)
    reference.attend(out, q, case.storage, *records(case), (k, v))
    # Query heads 2 and 3 read the second head, whose row 2 the rows 2 to 4 see.
    assert out.isnan().any(-1)[0].tolist() == [[False] * 5] * 2 + [[False, False, True, True, True]] * 2


def test_it_makes_no_difference_whether_the_chunk_has_been_appended() -> None:
    case = make_case("reference", lens=(20, 11), group=2, rotation="hadamard", center=True)
    rng = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(2, heads, 4, 64, generator=rng) for heads in (4, 2, 2))
    tokens, scoring, outputs = Tokens.at(case.block_table, case.context_lens), Scoring(0.125), []
    for _ in range(2):
        out = torch.empty_like(q)
        reference.attend(out, q, case.storage, tokens, scoring, (k, v))
        outputs.append(out)
        reference.append(k, v, case.storage, tokens)
    assert not outputs[0].isnan().any()
    assert torch.equal(*outputs)
