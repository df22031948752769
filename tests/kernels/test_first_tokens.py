"""First tokens in full precision: what tests/kernels/test_decode.py does not ask of every backend anyway."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from hf_int8_paged.kernels import MAX_FIRST_TOKENS, gather_dense, int8_paged_decode_attention

from .attention_oracle import assert_close, dense_attention, error_bound
from .helpers import make_case
from .test_decode import SHAPES, WIDE_SHAPES, check, named

CONDITIONED: dict[str, Any] = {"rotation": "hadamard", "center": True}


@pytest.mark.parametrize("count", [1, MAX_FIRST_TOKENS])
@pytest.mark.parametrize("shape", named(SHAPES, WIDE_SHAPES))
def test_every_shape(backend: str, shape: dict[str, Any], count: int) -> None:
    check(make_case(backend, **shape, **CONDITIONED, first_tokens=count))


def test_a_context_of_nothing_but_first_tokens_is_exact(backend: str) -> None:
    """No integer arithmetic is left: float32 rounding only."""
    case = make_case(backend, lens=(1, 9, 16), group=2, q_len=3, **CONDITIONED, first_tokens=16)
    want = dense_attention(case)
    case.backend = "reference"  # the bound without a backend's integer error
    assert_close(int8_paged_decode_attention(*case.arguments, **case.options), want, error_bound(case, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_first_tokens_of_every_dtype_under_queries_of_every_dtype(backend: str, dtype: torch.dtype) -> None:
    case = make_case(backend, lens=(9, 40), group=2, **CONDITIONED, first_tokens=3, dtype=dtype)
    for q_dtype in (torch.float32, torch.float16, torch.bfloat16):
        case.q = case.q.to(q_dtype)
        check(case)


@pytest.mark.parametrize("store", ["k", "v"])
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_a_faulty_first_token_reaches_only_the_queries_that_see_it(backend: str, store: str, fault: float) -> None:
    case = make_case(backend, lens=(21, 21), group=2, q_len=3, window=19, first_tokens=2)
    # Windows of the rows start at 0, 1 and 2: the first two see position 1, the first one position 0.
    held = case.options["first_tokens"]
    getattr(held, store)[int(held.row[0]), 1, 1, 5] = fault
    (case.keys if store == "k" else case.values)[0, 1, 1] = np.nan
    want = dense_attention(case)
    out = int8_paged_decode_attention(*case.arguments, **case.options)
    assert_close(out, want, error_bound(case, want))
    assert out.isnan().any(-1)[0].tolist() == [[False] * 3, [False] * 3, [True, True, False], [True, True, False]]
    assert not out[1].isnan().any()


def test_a_faulty_query_spoils_only_its_own_output(backend: str) -> None:
    case = make_case(backend, lens=(2, 40), q_len=2, first_tokens=2)
    case.q[0, 1, 1, 5] = torch.nan
    want = dense_attention(case)
    out = int8_paged_decode_attention(*case.arguments, **case.options)
    assert_close(out, want, error_bound(case, want))
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 1, 1]]


def test_dominant_and_negligible_first_tokens(backend: str) -> None:
    def dominant(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        k[0, :, 0] = q[0, ::2, 0] * 20
        k[1, :, 0] = q[1, ::2, 0] * -20

    out = check(make_case(backend, lens=(40, 40), group=2, **CONDITIONED, first_tokens=1, edit=dominant))
    assert out.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"center": True}, {"softcap": 3.0}, {"sink_logits": True}], ids=str)
def test_rows_of_other_strides(backend: str, options: dict[str, Any]) -> None:
    case = make_case(backend, lens=(9, 40), group=2, q_len=2, first_tokens=3, **options)
    want = int8_paged_decode_attention(*case.arguments, **case.options)
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(int8_paged_decode_attention(*case.arguments, **case.options), want)


@pytest.mark.parametrize(("start", "stop"), [(0, 48), (0, 1), (2, 9), (5, 40), (30, 48)])
def test_gather_puts_them_in_their_places(backend: str, start: int, stop: int) -> None:
    case = make_case(
        backend, lens=(5, 48, 33), q_len=1, first_tokens=4, first_at=(0, 3, 16), holes=((1, 0),), **CONDITIONED
    )
    keys, values = gather_dense(
        case.storage,
        case.block_table,
        case.context_lens,
        start=start,
        stop=stop,
        first_tokens=case.options["first_tokens"],
    )
    for b, (first, last) in enumerate(((0, 4), (3, 7), (16, 20))):
        for p in range(max(first, start), min(last, stop)):
            assert np.array_equal(keys[b, :, p - start].cpu(), case.keys[b, :, p].astype(np.float32))
            assert np.array_equal(values[b, :, p - start].cpu(), case.values[b, :, p].astype(np.float32))
        for p in range(max(last, start), min(stop, int(case.context_lens[b]))):
            if int(case.block_table[b, p // 16]) >= 0:
                np.testing.assert_allclose(keys[b, :, p - start].cpu(), case.keys[b, :, p], atol=1e-5)


def test_wrong_first_tokens_are_refused(backend: str) -> None:
    case = make_case(backend, lens=(9, 40), first_tokens=3)
    held = case.options["first_tokens"]

    def refused(message: str, **fields: Any) -> None:
        wrong = dataclasses.replace(held, **fields)
        with pytest.raises(ValueError, match=message):
            int8_paged_decode_attention(*case.arguments, **{**case.options, "first_tokens": wrong})
        with pytest.raises(ValueError, match=message):
            gather_dense(case.storage, case.block_table, case.context_lens, first_tokens=wrong)

    refused(r"first_tokens\.k must have shape \[\*, 2, \*, 64\]", k=held.k[:, :1])
    refused("must hold 1 to 16 tokens per sequence, got 17", k=held.k.repeat(1, 1, 6, 1)[:, :, :17].contiguous())
    refused(r"first_tokens\.v must be float32, got float16", v=held.v.half())
    refused(r"first_tokens\.k must be contiguous", k=held.k.transpose(1, 2).contiguous().transpose(1, 2))
    refused(r"first_tokens\.stop must have shape \[2\]", stop=held.stop[:1])
    refused(r"first_tokens\.first must be int32", first=held.first.long())
    if case.storage.device.type == "cpu":
        refused(r"first_tokens\.row must be between 0 and 2, got \[3, 0\]", row=held.row.new_tensor([3, 0]))
        refused("stop at most first \\+ 3", stop=held.stop + 1)
        refused("stop at most first \\+ 3 and limit = 2", limit=2)
        refused("first must not be negative", first=held.first - 1)
