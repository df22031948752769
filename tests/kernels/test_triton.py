"""Triton without a GPU: its kernels interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_int8_paged.kernels import FirstTokens, KvCacheQuant, Scoring, Tokens

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "eval"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def in_another_python(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Run Python from the repository's root, output shown as this test's own."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    print(result.stdout, result.stderr)
    return result


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this process interprets the kernels itself")
def test_interpreted_kernels() -> None:
    """The shared grid for the Triton backend, and what only Triton can get wrong, under TRITON_INTERPRET=1."""
    grid = ["test_append.py", "test_append_edges.py", "test_conditioning.py", "test_decode.py", "test_gather_copy.py"]
    grid += ["interpreted_triton.py", "triton_extend.py", "triton_long_chunks.py", "triton_schedule.py"]
    grid.append("triton_dequantize.py")
    paths = [f"tests/kernels/{file}" for file in grid]
    paths.append("tests/cache/triton_long_chunks.py")
    run = in_another_python(["-m", "pytest", "-q", "-k", "triton", *paths], TRITON_INTERPRET="1")
    assert run.returncode == 0
    assert " passed" in run.stdout


def test_imports_where_triton_is_not_installed() -> None:
    code = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch
from hf_int8_paged.kernels import alloc_paged_int8_layer, why_unavailable
assert "triton" in why_unavailable("triton", torch.device("cuda"))
try:
    alloc_paged_int8_layer(2, 16, 1, 64, backend="triton")
except ValueError as error:
    assert "reference" in str(error), error
else:
    raise AssertionError("allocated for a backend that cannot be imported")
alloc_paged_int8_layer(2, 16, 1, 64, backend="reference")
"""
    assert in_another_python(["-c", code]).returncode == 0


def test_the_cpu_is_refused_without_the_interpreter() -> None:
    code = """
import torch
from hf_int8_paged.kernels import why_unavailable
assert "TRITON_INTERPRET=1" in why_unavailable("triton", torch.device("cpu"))
"""
    assert in_another_python(["-c", code], TRITON_INTERPRET="0").returncode == 0


def test_rows_too_wide_for_int32_products_are_refused() -> None:
    from hf_int8_paged.kernels import why_unavailable

    cuda = torch.device("cuda")
    assert why_unavailable("triton", cuda, 16, 256, 256) is None
    assert "256" in (why_unavailable("triton", cuda, 16, 512, 256) or "")
    assert "256" in (why_unavailable("triton", cuda, 16, 64, 257) or "")


def layer(head_dim: int, v_head_dim: int, block_size: int, rotation: str | None) -> KvCacheQuant:
    slots = (2, 40, block_size)
    return KvCacheQuant(
        k=torch.empty(*slots, head_dim, dtype=torch.int8),
        v=torch.empty(*slots, v_head_dim, dtype=torch.int8),
        k_scales=torch.empty(slots, dtype=torch.float16),
        v_scales=torch.empty(slots, dtype=torch.float16),
        backend="triton",
        tile_order="v_transposed",
        rotation=rotation,
        key_center=torch.zeros(2, head_dim),
    )


def records(table: torch.Tensor, lens: torch.Tensor, options: dict[str, Any]) -> tuple[Tokens, Scoring]:
    tokens = Tokens(table, lens, lens, options.get("window"), options.get("kv_start"))
    return tokens, Scoring(0.1, *(options.get(name) for name in ("softcap", "sink_logits", "key_mask")))


#: head_dim, v_head_dim, block_size, rotation, query heads, q_len, dtype, options
VARIANTS: dict[str, tuple[Any, ...]] = {
    "plain": (128, 128, 16, "hadamard", 8, 1, torch.bfloat16, {}),
    "every_option": (
        96, 80, 32, None, 18, 3, torch.float16,
        dict(
            kv_start=torch.zeros(2, dtype=torch.int32), key_mask=torch.ones(2, 300, dtype=torch.bool), window=99,
            softcap=30.0, sink_logits=torch.zeros(18),
        ),
    ),
}  # fmt: skip


@pytest.mark.skipif(
    INTERPRETED, reason="interpreted kernels cannot be compiled; the process without the interpreter does"
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "variant"),
    [
        *((gpu, "every_option") for gpu in ("sm_80", "sm_90", "sm_100", "gfx942")),
        ("sm_90", "plain"),
        ("gfx942", "plain"),
    ],
)
def test_every_kernel_compiles_ahead_of_time(gpu: str, variant: str) -> None:
    from _triton_offline import TARGETS, compiling_for

    from hf_int8_paged.kernels.triton.append import launch_append
    from hf_int8_paged.kernels.triton.decode import launch_decode
    from hf_int8_paged.kernels.triton.extend import launch_extend
    from hf_int8_paged.kernels.triton.tuning import Chip

    head_dim, v_head_dim, block_size, rotation, heads, q_len, dtype, options = VARIANTS[variant]
    storage = layer(head_dim, v_head_dim, block_size, rotation)
    table, lens = torch.zeros(2, 300 // block_size, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    new = [torch.empty(2, 2, q_len, dim, dtype=dtype) for dim in (head_dim, v_head_dim)]
    q, out = (torch.empty(2, heads, q_len, dim, dtype=dtype) for dim in (head_dim, v_head_dim))
    rows = [torch.empty(2, 2, 3, dim, dtype=dtype) for dim in (head_dim, v_head_dim)]
    first_tokens = FirstTokens(*rows, lens, lens, lens, limit=3)
    tokens, scoring = records(table, lens, options)
    with compiling_for(TARGETS[gpu]) as compiled:
        launch_append(*new, storage, tokens)
        for integer in (True, False):
            held = first_tokens if integer else None
            launch_decode(out, q, storage, tokens, scoring, held, chip=Chip(gpu, 100), integer=integer)
        for held in (first_tokens, None):
            launch_extend(out, q, storage, tokens, scoring, (new[0], new[1]), held)
    names = ["append_kernel", *2 * ["decode_kernel", "reduce_kernel"], *2 * ["extend_kernel"]]
    assert [name for name, _ in compiled] == names
    binary = "hsaco" if gpu == "gfx942" else "cubin"
    assert all(kernel.asm[binary] for _, kernel in compiled)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no launches")
@pytest.mark.parametrize("variant", VARIANTS)
def test_launches_read_nothing_from_the_device(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CUDA tensors have shapes and no values: grids and arguments depend on nothing else, so that CUDA graphs can
    capture the launches."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.runtime.jit import JITFunction

    from hf_int8_paged.kernels.triton import backend as triton_backend
    from hf_int8_paged.kernels.triton.tuning import Chip

    launches: list[tuple[str, Any]] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, **_: launches.append((self.__name__, grid)))
    monkeypatch.setattr(triton_backend, "chip_of", lambda device: Chip("sm_90", 132))
    head_dim, v_head_dim, block_size, rotation, heads, q_len, dtype, options = VARIANTS[variant]
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"):
        storage = layer(head_dim, v_head_dim, block_size, rotation)
        table, lens = torch.zeros(2, 300 // block_size, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        new = [torch.empty(2, 2, q_len, dim, dtype=dtype) for dim in (head_dim, v_head_dim)]
        q, out = (torch.empty(2, heads, q_len, dim, dtype=dtype) for dim in (head_dim, v_head_dim))
        fake = {
            n: torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) else x for n, x in options.items()
        }
        tokens, scoring = records(table, lens, fake)
        assert out.device.type == "cuda"
        triton_backend.append(*new, storage, tokens)
        rows = [torch.empty(2, 2, 3, dim, dtype=dtype) for dim in (head_dim, v_head_dim)]
        held = FirstTokens(*rows, lens, lens, lens, limit=3)
        triton_backend.attend(out, q, storage, tokens, scoring, None, held)
        triton_backend.attend(out, q, storage, tokens, scoring, (new[0], new[1]), held)
    assert [name for name, _ in launches] == ["append_kernel", "decode_kernel", "reduce_kernel", "extend_kernel"]
    assert all(type(size) is int for _, grid in launches for size in grid)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no launches")
def test_a_long_chunk_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its past is dequantized in slices whose number depends on the block table's width."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.runtime.jit import JITFunction

    from hf_int8_paged.kernels.triton import backend as triton_backend
    from hf_int8_paged.kernels.triton import long_chunks

    launches: list[tuple[str, Any]] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, **_: launches.append((self.__name__, grid)))
    monkeypatch.setattr(long_chunks, "flash_attention_serves", lambda device: True)
    batch, heads, chunk, dim = 2, 2, 257, 128
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"):
        storage = layer(dim, dim, 16, "hadamard")
        table, lens = torch.zeros(batch, 100, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
        tokens, scoring = records(table, lens, {"kv_start": lens})
        q, new = (torch.empty(batch, count, chunk, dim, dtype=torch.bfloat16) for count in (8, heads))
        rows = torch.empty(batch, heads, 1, dim, dtype=torch.bfloat16)
        held = FirstTokens(rows, rows, lens, lens, lens, limit=1)
        monkeypatch.setattr(long_chunks, "SCRATCH_BYTES", 2 * 2 * batch * heads * dim * 640)
        triton_backend.attend(torch.empty_like(q), q, storage, tokens, scoring, (new, new), held)
    slices = 3 * [("dequantize_kernel", (640 // 16, heads, batch))]  # 1,600 positions, 640 at a time
    assert launches == [*slices, ("extend_kernel", (-(-4 * chunk // 64), heads, batch))]


def test_a_gpu_and_the_cpu_see_the_same_places_of_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention's arguments, read by what PyTorch's documentation says of them."""
    from hf_int8_paged.kernels.triton import slice_attention

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, seqused_k):
        means, logs = torch.empty_like(q), torch.empty(q.shape[1], len(q))
        for b, used in enumerate(seqused_k.tolist()):
            own, begin = slice(cu_seq_q[b], cu_seq_q[b + 1]), int(cu_seq_k[b])
            assert cu_seq_q[b + 1] - cu_seq_q[b] <= max_q
            assert used <= max_k
            scores = scale * torch.einsum("qhd,khd->hqk", q[own], k[begin : begin + used])
            logs[:, own] = scores.logsumexp(-1)
            means[own] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[begin : begin + used])
        return means, logs

    monkeypatch.setattr(slice_attention.varlen, "varlen_attn", varlen_attn)
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 7, 2, 16, generator=rng)
    keys, values = (torch.randn(3, 32, 2, 16, generator=rng) for _ in range(2))
    first, stop = torch.tensor([0, 5, 31], dtype=torch.int32), torch.tensor([32, 20, 32], dtype=torch.int32)
    on_gpu, on_cpu = (
        attend(rows, keys, values, first, stop)
        for attend in (slice_attention.in_flash_attention, slice_attention.on_the_cpu)
    )
    for ours, wanted in zip(on_gpu, on_cpu, strict=True):
        # Sums of 32 terms of size one.
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
