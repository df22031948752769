"""Room for one more storage format: 16-bit rows, which live in this file alone and are served by the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels import (
    BACKENDS,
    Format,
    KvCacheQuant,
    alloc_paged_int8_layer,
    copy_blocks,
    formats,
    gather_dense,
    int8_kv_append_paged,
    int8_paged_decode_attention,
    load_backend,
    register_format,
    why_unavailable,
)
from tests.models import random_ids, tiny_model


class Int16(Format):
    """int16 elements with one float32 scale per row."""

    name = "int16"
    dtype = torch.int16
    scale_dtype = torch.float32
    largest = 32767

    def quantize(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        largest = rows.abs().amax(dim=-1)
        scales = torch.where(largest < torch.inf, largest / self.largest, torch.nan)
        divisor = torch.where(scales > 0, scales, 1.0)[..., None]
        stored = torch.where(scales[..., None] > 0, rows / divisor, 0.0).round()
        return stored.to(torch.int16), scales

    def restore(self, stored: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return stored.to(dtype) * scales[..., None].to(dtype)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_format(Int16())
    yield
    del formats.FORMATS["int16"]


def layer(rotation: str | None = "hadamard") -> KvCacheQuant:
    return alloc_paged_int8_layer(6, 16, 2, 64, v_head_dim=32, rotation=rotation, center_keys=True, format="int16")


@pytest.mark.parametrize("rotation", [None, "hadamard"])
def test_rows_come_back_to_half_a_step_and_attention_reads_them(rotation: str | None) -> None:
    storage = layer(rotation)
    assert (storage.backend, storage.format, storage.k.dtype) == ("reference", "int16", torch.int16)
    assert storage.bytes_per_token == 2 * (2 * (64 + 32) + 2 * 4)
    assert storage.nbytes == sum(x.nbytes for x in (storage.k, storage.v, storage.k_scales, storage.v_scales))
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, 37, dim, generator=generator) for dim in (64, 32))
    table = torch.tensor([[5, 0, 2], [1, 4, 3]], dtype=torch.int32)
    before, lens = torch.zeros(2, dtype=torch.int32), torch.full((2,), 37, dtype=torch.int32)
    int8_kv_append_paged(k, v, storage, table, before)
    dense = gather_dense(storage, table, lens, stop=37)
    for stored, row in zip(dense, (k, v)):
        # A stored element is off by half a step of its row, whose largest element is at most the row's length; a
        # rotation adds up the squares of the errors of all elements. float32 rounds a tenth of that.
        bound = 1.1 * 0.5 * row.shape[-1] ** 0.5 * row.norm(dim=-1, keepdim=True) / Int16.largest
        assert ((stored - row).abs() <= bound).all()
    q = torch.randn(2, 4, 1, 64, generator=generator)
    out = int8_paged_decode_attention(q, storage, table, lens, 0.125)
    keys, values = (x.repeat_interleave(2, dim=1) for x in dense)
    want = torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=0.125)
    # Both read the same rows: sums of 37 and 64 terms in float32.
    torch.testing.assert_close(out, want, rtol=0, atol=64 * torch.finfo(torch.float32).eps * float(v.abs().max()))


def test_blocks_are_copied_whole() -> None:
    storage = layer()
    for x in (storage.k, storage.v, storage.k_scales, storage.v_scales):
        x.copy_(torch.arange(x.numel()).view(x.shape) % 1000)
    copy_blocks(storage, torch.tensor([0, 3], dtype=torch.int32), torch.tensor([5, 1], dtype=torch.int32))
    for x in (storage.k, storage.v, storage.k_scales, storage.v_scales):
        assert torch.equal(x[:, [5, 1]], x[:, [0, 3]])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_backends_without_kernels_for_it_refuse_it_by_name(backend: str) -> None:
    reason = why_unavailable(backend, torch.device("cpu"), format="int16")
    assert reason == "it serves the format int8, not 'int16'"
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot serve .* it serves the format int8, not 'int16'"):
        alloc_paged_int8_layer(4, 16, 2, 64, backend=backend, format="int16")
    # A storage that was made for the reference: its rows would be read as something else.
    order = load_backend(backend).TILE_ORDER
    whole = layer()
    storage = KvCacheQuant(whole.k, whole.v, whole.k_scales, whole.v_scales, backend, order, format="int16")
    lens = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"backend '{backend}' reads format 'int8', not 'int16'"):
        int8_kv_append_paged(
            torch.ones(1, 2, 1, 64), torch.ones(1, 2, 1, 32), storage, torch.zeros(1, 1, dtype=torch.int32), lens
        )


def test_unknown_and_taken_names() -> None:
    with pytest.raises(ValueError, match="unknown format 'int4'; choose one of int8, int16"):
        alloc_paged_int8_layer(4, 16, 2, 64, format="int4")
    with pytest.raises(ValueError, match="another format is called 'int16' already"):
        register_format(Int16())


@pytest.mark.parametrize("kind", [{}, {"max_batch_size": 1, "max_cache_len": 64}], ids=["growing", "preallocated"])
def test_a_cache_takes_it_by_its_name(kind: dict[str, Any]) -> None:
    """Attention from 16-bit rows is that of the unquantized model, 256 times as close as int8's."""
    model = tiny_model("llama")
    ids = random_ids(1, 30)
    off = {}
    for name in ("int16", "int8"):
        cache = PagedInt8Cache(model.config, format=name, backend="reference", **kind)
        steps: list[Any] = [DynamicCache(config=model.config), cache]
        logits = []
        for each, implementation in zip(steps, ("sdpa", "int8_paged")):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                model(ids[:, :29], past_key_values=each)
                logits.append(model(ids[:, 29:], past_key_values=each).logits)
        off[name] = float((logits[0] - logits[1]).abs().max())
        assert cache.layers[0].storage.format == name
    assert off["int16"] < off["int8"] / 30


@pytest.mark.parametrize(("options", "error"), [({"format": "int4"}, ValueError), ({"format": 16}, TypeError)])
def test_a_cache_refuses_a_format_that_is_none(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="format"):
        PagedInt8Cache(tiny_model("llama").config, **options)


def test_a_cache_says_which_backend_cannot_serve_it() -> None:
    with pytest.raises(ValueError, match="serves the format int8, not 'int16'"):
        PagedInt8Cache(tiny_model("llama").config, format="int16", backend="cpu", device="cpu")
