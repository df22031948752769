"""Random calls of `int8_paged_ragged_attention`, as in test_fuzz.py: chunks of different lengths, of which the long
ones and first prompts bring keys and values of their own."""

from __future__ import annotations

import pytest
import torch

from hf_int8_paged.kernels import FLOAT_DTYPES, gather_dense, int8_paged_ragged_attention

from . import test_fuzz
from .attention_oracle import RELATIVE_ERROR
from .test_fuzz import NATIVE, Draw, outcome


def longest(x: torch.Tensor) -> float:
    """Length of the longest row."""
    return float(x.double().norm(dim=-1).max()) if x.numel() else 0.0


def ragged(draw: Draw, backend: str) -> str | None:
    storage, batch, width = draw.layer(backend), draw.choice((1, 1, 2, 3)), draw.randint(0, 3)
    table, lens = draw.tables(storage, batch, width)
    counts = [draw.choice((0, 1, 2, 17, 20, 70)) for _ in range(batch)]
    if not draw.rarely():
        counts = [min(count, max(n, 0)) for count, n in zip(counts, lens.tolist())]
    starts = [sum(counts[:b]) for b in range(batch + 1)]
    if draw.rarely():
        starts[draw.randrange(batch + 1)] = draw.choice((-1, 1, 2**31 - 1))
    kv_heads, dtype = storage.num_kv_heads, draw.choice(FLOAT_DTYPES)
    heads, capacity = kv_heads * draw.choice((1, 2, 5)), width * storage.block_size
    shapes = (heads, storage.head_dim), (kv_heads, storage.head_dim), (kv_heads, storage.v_head_dim)
    q, k_new, v_new = (draw.normal(sum(counts), *shape, dtype=dtype) for shape in shapes)
    options = draw.options(batch, heads, capacity)
    if draw.random() < 0.4:
        past = [n - count for n, count in zip(lens.tolist(), counts)]
        options["first_tokens"] = draw.first_tokens(storage, batch, past)
    packed, scale = draw.int32(starts), storage.head_dim**-0.5

    def attention(exact: bool) -> torch.Tensor:
        rows = [x.double() if exact else x for x in (q, k_new, v_new)]
        name = "reference" if exact else None
        return int8_paged_ragged_attention(
            rows[0], storage, table, lens, packed, scale, k_new=rows[1], v_new=rows[2], backend=name, **options
        )

    got, refused = outcome(lambda: attention(False))
    want, why = outcome(lambda: attention(True))
    assert refused == why
    if refused is None and got.numel():
        keys, values = gather_dense(storage, table, lens, first_tokens=options.get("first_tokens"), backend="reference")
        center = 0.0 if storage.key_center is None else longest(storage.key_center)
        score = scale * longest(q) * (max(longest(keys), longest(k_new)) + center)
        loudest = max(float(x.abs().max()) if x.numel() else 0.0 for x in (values, v_new))
        # As in test_fuzz.py, with the chunk's own tokens beside those in the blocks.
        rounding = 4 * 2.0**-23 * ((capacity + max(counts)) ** 0.5 + score + 8)
        bound = loudest * (rounding + RELATIVE_ERROR[backend])
        if dtype is not torch.float32:
            bound = bound * (1 + torch.finfo(dtype).eps) + want.abs() * torch.finfo(dtype).eps / 2 + 2.0**-24
        assert got.isfinite().all()
        assert ((got.double() - want).abs() <= bound).all(), float((got.double() - want).abs().max())
    return refused


@pytest.mark.parametrize("backend", NATIVE)
def test_the_references_answer_or_a_refusal(backend: str) -> None:
    test_fuzz.test_the_references_answer_or_a_refusal(backend, ragged)
