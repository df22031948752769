"""A ragged step: sequences of different lengths with query chunks of different lengths in one call, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_int8_paged.kernels import (
    Tokens,
    int8_paged_decode_attention,
    int8_paged_ragged_attention,
    load_backend,
)
from hf_int8_paged.kernels.ragged import groups_of
from tests.segments import STORES, put_whole

from .attention_oracle import dense_attention, error_bound
from .fresh_oracle import FLOAT32_ERROR, attention_over_fresh
from .helpers import SEED, Case, device_of, int32_on, make_case, snapshot

#: rows of each sequence's chunk; tokens before it
ROWS, PAST = (1, 5, 0, 1, 33, 2, 20, 5), (37, 20, 9, 64, 45, 0, 0, 71)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "holes": {"holes": ((0, 1), (3, 0), (4, 1), (7, 2))},
    "window": {"window": 24, "rotation": "hadamard"},
    "key_mask": {"key_mask": 0.7, "key_mask_start": 3},
    "first_tokens": {"first_tokens": 3, "first_at": (0, 2, 0, 17, 5, 0, 0, 30), "rotation": "hadamard", "center": True},
    "everything": {
        "window": 40, "softcap": 4.0, "sink_logits": True, "center": True, "rotation": "hadamard",
        "first_tokens": 2, "kv_start": (1, 0, 0, 30, 0, 0, 0, 45), "holes": ((3, 2), (7, 3)),
    },
}  # fmt: skip


def packed(case: Case, b: int, rows: int) -> Any:
    """The same case with sequence b alone and as many query rows, for the oracle of tokens that lie in blocks."""
    one = slice(b, b + 1)
    options = dict(case.options)
    for name in ("kv_start", "key_mask"):
        if options.get(name) is not None:
            options[name] = options[name][one]
    held = options.get("first_tokens")
    if held is not None:
        places = {name: getattr(held, name)[one] for name in ("row", "first", "stop")}
        options["first_tokens"] = type(held)(held.k, held.v, **places, limit=held.limit)
    return Case(
        case.storage, case.block_table[one], case.context_lens[one], case.q[one, :, :rows], case.scale,
        case.keys[one], case.values[one], options, case.backend,
    )  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_every_row_against_float64(backend: str, options: str) -> None:
    """Chunks of up to 16 rows over a past read the blocks, which hold their tokens too; longer ones and first prompts
    read the past from blocks and see their own tokens as given."""
    device, rng = device_of(backend), torch.Generator().manual_seed(SEED)
    fresh_rows = [n > 16 or (n > 1 and not past) for n, past in zip(ROWS, PAST)]
    # The blocks hold the tokens of short chunks too.
    held = [past if own else past + n for past, n, own in zip(PAST, ROWS, fresh_rows)]
    case = make_case(backend, lens=held, group=2, q_len=5, head_dim=64, v_head_dim=48, **OPTIONS[options])
    total, heads = sum(ROWS), case.q.shape[1]
    starts = np.concatenate([[0], np.cumsum(ROWS)])
    q = torch.randn(total, heads, 64, generator=rng)
    k_new, v_new = (torch.randn(total, 2, dim, generator=rng) for dim in (64, 48))
    for b, own in enumerate(fresh_rows):
        if not own:
            q[starts[b] : starts[b + 1]] = case.q[b, :, : ROWS[b]].transpose(0, 1).cpu()
    out = torch.full((total, heads, 48), torch.nan, device=device)
    int8_paged_ragged_attention(
        q.to(device),
        case.storage,
        wide_enough(case, max(past + n for past, n in zip(PAST, ROWS))),
        torch.tensor([past + n for past, n in zip(PAST, ROWS)], **int32_on(backend)),
        torch.from_numpy(starts).to(**int32_on(backend)),
        case.scale,
        k_new=k_new.to(device),
        v_new=v_new.to(device),
        out=out,
        **case.options,
    )
    for b, own in enumerate(fresh_rows):
        rows = slice(int(starts[b]), int(starts[b + 1]))
        got = out[rows].cpu().transpose(0, 1)
        if own:
            want = attention_over_fresh(case, b, *(x[rows].transpose(0, 1) for x in (q, k_new, v_new)))
            assert ((got - want).norm(dim=-1) <= FLOAT32_ERROR * want.norm(dim=-1)).all(), b
        elif ROWS[b]:
            alone = packed(case, b, ROWS[b])
            dense = dense_attention(alone)
            assert (np.abs(got.numpy() - dense[0]) <= error_bound(alone, dense)[0]).all(), b


def wide_enough(case: Case, longest: int) -> torch.Tensor:
    """The case's block table, widened by holes to cover so many tokens: those of fresh rows are in no block."""
    missing = max(-(-longest // case.storage.block_size) - case.block_table.shape[1], 0)
    return torch.nn.functional.pad(case.block_table, (0, missing), value=-1)


def test_equal_rows_are_one_call_whatever_the_lengths(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(backend, lens=(40, 3, 17, 60, 22), group=2, q_len=1)
    serving, calls = load_backend(backend), []
    attend = serving.attend

    def counted(out: torch.Tensor, q: torch.Tensor, *rest: Any) -> None:
        calls.append(tuple(q.shape))
        attend(out, q, *rest)

    starts = torch.arange(6, **int32_on(backend))
    q = case.q[:, :, 0].contiguous()
    tokens = Tokens(case.block_table, case.context_lens - 1, case.context_lens, cu_seqlens_q=starts)
    (group,) = groups_of(tokens)
    assert group.q_len == 1
    assert group.sequences.tolist() == [0, 1, 2, 3, 4]
    assert groups_of(tokens)[0] is group, "worked out once for all layers of a step"
    monkeypatch.setattr(serving, "attend", counted)
    packed_out = int8_paged_ragged_attention(q, case.storage, case.block_table, case.context_lens, starts, case.scale)
    assert calls == [(5, 4, 64), (5, 4, 1, 64)], "the packed call, and one of all sequences within it"
    monkeypatch.undo()
    assert torch.equal(packed_out, int8_paged_decode_attention(*case.arguments)[:, :, 0])


def test_packed_rows_are_appended_as_if_each_sequence_came_alone(backend: str) -> None:
    device, lens = device_of(backend), (20, 3, 33)
    case = make_case(backend, lens=lens, rotation="hadamard")
    rng, counts = torch.Generator().manual_seed(SEED), (1, 7, 1)
    k_new, v_new = (torch.randn(9, 2, 64, generator=rng).to(device) for _ in range(2))
    starts = torch.tensor([0, 1, 8, 9], **int32_on(backend))
    before = snapshot(case.storage)
    serving = load_backend(backend)
    tokens = Tokens(case.block_table, case.context_lens, case.context_lens, cu_seqlens_q=starts)
    serving.append(k_new, v_new, case.storage, tokens)
    together = snapshot(case.storage)
    for name in STORES:
        dtype = getattr(case.storage, name).dtype
        put_whole(case.storage, name, torch.from_numpy(before[name]).view(dtype))
    for b, (first, count) in enumerate(zip((0, 1, 8), counts)):
        rows, one = slice(first, first + count), slice(b, b + 1)
        alone = Tokens.at(case.block_table[one], case.context_lens[one])
        serving.append(k_new[rows].transpose(0, 1)[None], v_new[rows].transpose(0, 1)[None], case.storage, alone)
    apart = snapshot(case.storage)
    assert all((together[name] == apart[name]).all() for name in apart)
    assert any((together[name] != before[name]).any() for name in apart)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": [0, 2, 4]}, "cu_seqlens_q must ascend from 0 to 3, the rows of q, got"),
        ({"cu_seqlens_q": [1, 2, 3]}, "cu_seqlens_q must ascend from 0 to 3"),
        ({"cu_seqlens_q": [0, 4, 3]}, "cu_seqlens_q must ascend from 0 to 3"),
        ({"cu_seqlens_q": [0, 3]}, r"cu_seqlens_q must have shape \[3\], got \[2\]"),
        ({"context_lens": [2, 0]}, "sequence 1 has 1 rows, but context_lens counts 0 tokens"),
        ({"k_new": None}, "k_new and v_new come together"),
        ({"k_new": 2}, r"k_new must have shape \[3, 2, 64\], got \[2, 2, 64\]"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(backend: str, change: dict[str, Any], message: str) -> None:
    case = make_case(backend, lens=(20, 30), group=2)
    device = device_of(backend)
    lens = change.get("context_lens", [20, 30])
    starts = change.get("cu_seqlens_q", [0, 2, 3])
    k_rows = change.get("k_new", 3)
    with pytest.raises(ValueError, match=message):
        int8_paged_ragged_attention(
            torch.ones(3, 4, 64, device=device),
            case.storage,
            case.block_table,
            torch.tensor(lens, **int32_on(backend)),
            torch.tensor(starts, **int32_on(backend)),
            0.1,
            k_new=None if k_rows is None else torch.ones(k_rows, 2, 64, device=device),
            v_new=torch.ones(3, 2, 64, device=device),
        )


def test_a_long_chunk_needs_its_own_keys(backend: str) -> None:
    case = make_case(backend, lens=(20, 30), group=2)
    starts = torch.tensor([0, 17, 18], **int32_on(backend))
    with pytest.raises(ValueError, match="a chunk of 17 rows needs k_new and v_new; without them it has 16 rows"):
        int8_paged_ragged_attention(
            torch.ones(18, 4, 64, device=device_of(backend)),
            case.storage,
            case.block_table,
            case.context_lens,
            starts,
            1.0,
        )
