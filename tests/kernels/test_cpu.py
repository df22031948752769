"""What is particular to the CPU backend: instruction sets, threads, memory, direct calls."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf_int8_paged.kernels import (
    KvCacheQuant,
    Scoring,
    Tokens,
    alloc_paged_int8_layer,
    int8_kv_append_paged,
    int8_paged_decode_attention,
)
from hf_int8_paged.kernels.conditioning import hadamard
from hf_int8_paged.kernels.cpu import backend as cpu
from hf_int8_paged.kernels.cpu import library as cpu_library
from hf_int8_paged.kernels.cpu.memory import HUGE_PAGE

from .attention_oracle import assert_close, error_bound
from .conftest import CPU, backends_here
from .helpers import Case, make_case, snapshot

if "cpu" not in backends_here():
    pytest.skip("no C compiler, so no C kernels", allow_module_level=True)

ROOT = Path(__file__).parent.parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="huge pages and /proc are Linux's")


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def attend(case: Case) -> torch.Tensor:
    return int8_paged_decode_attention(*case.arguments, **case.options)


@pytest.mark.slow
@pytest.mark.parametrize("isa", cpu.isas())
def test_the_environment_forces_an_instruction_set(isa: str) -> None:
    code = "from hf_int8_paged.kernels.cpu import backend as cpu; print(cpu.selected_isa())"
    assert run_python(code, HF_INT8_PAGED_CPU_ISA=isa).stdout.strip() == isa


def test_an_instruction_set_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    code = "from hf_int8_paged.kernels import alloc_paged_int8_layer as alloc; alloc(4, 16, 2, 64)"
    result = run_python(code, HF_INT8_PAGED_CPU_ISA="mmx")
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError: there is no instruction set 'mmx'")
    assert all(isa in message for isa in cpu.isas())
    lacking = next(name for name in cpu_library.ISA_NAMES if name not in cpu.isas())
    selected = cpu.selected_isa()
    with pytest.raises(ValueError, match=f"this processor lacks instruction set '{lacking}'"):
        cpu.select_isa(lacking)
    assert cpu.selected_isa() == selected


@pytest.mark.parametrize("isa", cpu.isas())
def test_the_hadamard_transform_has_the_bits_of_the_torch_one(isa: str) -> None:
    selected = cpu.selected_isa()
    cpu.select_isa(isa)
    for dim in range(1, 257):
        x = torch.randn(5, dim)
        assert torch.equal(cpu.hadamard(x), hadamard(x)), dim
    x = torch.randn(4, 64, 3).transpose(1, 2)
    assert torch.equal(cpu.hadamard(x), hadamard(x))
    cpu.select_isa(selected)


@pytest.mark.parametrize("x", [torch.zeros(2, 257), torch.zeros(2, 64).double(), torch.zeros(2, 0)], ids=str)
def test_the_hadamard_transform_refuses_other_rows(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="x must be float32 with at most 256 columns"):
        cpu.hadamard(x)


SPLIT_CASES = {
    "one_long_sequence": dict(lens=(5003,), kv_heads=1, group=3),
    "a_long_one_beside_short_ones": dict(lens=(3000, 1, 0, 500), kv_heads=2, group=2, rotation="hadamard"),
    "options": dict(
        lens=(2100, 1900),
        kv_heads=1,
        group=2,
        q_len=3,
        window=1500,
        sink_logits=True,
        softcap=3.0,
        key_mask=0.5,
        center=True,
    ),
    "more_rows_than_a_row_block": dict(lens=(1300,), kv_heads=1, group=9, q_len=5, head_dim=32),
}


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_any_number_of_threads_gives_the_same_attention(name: str) -> None:
    case = make_case("cpu", **SPLIT_CASES[name])  # type: ignore[arg-type]
    torch.set_num_threads(1)
    alone = attend(case)
    bound = 2 * error_bound(case, alone.double().numpy())
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        together = attend(case)
        # Splits of the context have integer weights of their own: each result is off by its own error.
        assert_close(together, alone.double().numpy(), bound)
        assert torch.equal(attend(case), together), "the same call gives the same bits"


def test_without_torchs_threads_one_thread_does_everything() -> None:
    code = """
import torch
from hf_int8_paged.kernels.cpu import backend as cpu
from hf_int8_paged.kernels.cpu import library as cpu_library
library = cpu._LIBRARY
torch.set_num_threads(2)
library._c.int8_paged_set_threads(None, None)
from tests.kernels.test_cpu import SPLIT_CASES, attend, make_case
case = make_case("cpu", **SPLIT_CASES["one_long_sequence"])
alone = attend(case)
library._c.int8_paged_set_threads(*cpu_library._torch_threads())
torch.set_num_threads(1)
assert torch.equal(attend(case), alone)
"""
    result = run_python(code, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr


def test_two_python_threads_at_once_get_what_each_gets_alone() -> None:
    cases = [make_case("cpu", lens=(n, 900), kv_heads=2, group=3, rotation="hadamard", seed=n) for n in (2000, 2301)]
    alone = [attend(case) for case in cases]
    wrong: list[str] = []

    def work(i: int) -> None:
        case = cases[i]
        row_k, row_v = torch.randn(2, 2, 1, 64), torch.randn(2, 2, 1, 64)
        before = case.context_lens - 1
        for round_ in range(40):
            int8_kv_append_paged(row_k, row_v, scratch[i], case.block_table, before)
            if not torch.equal(attend(case), alone[i]):
                wrong.append(f"thread {i}, round {round_}")

    scratch = [make_case("cpu", lens=(n, 900), kv_heads=2, seed=n).storage for n in (2000, 2301)]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def layer(num_blocks: int = 8) -> KvCacheQuant:
    storage = alloc_paged_int8_layer(num_blocks, 16, 2, 64, backend="cpu")
    for x in (storage.k, storage.v, storage.k_scales, storage.v_scales):
        x.zero_()
    return storage


@pytest.mark.parametrize(
    ("ids", "length", "message"),
    [
        ([0, 8], 16, "block id 8"),
        ([2**31 - 1, 1], 3, "block id 2147483647"),
        ([0, 1], -1, "got -1"),
        ([0, 1], 32, "got 32"),
    ],
)
def test_direct_calls_check_lengths_and_the_blocks_they_use(ids: list[int], length: int, message: str) -> None:
    storage = layer()
    before = snapshot(storage)
    table, lens = torch.tensor([[3, 4], ids], dtype=torch.int32), torch.tensor([5, length], dtype=torch.int32)
    rows, out = torch.randn(2, 2, 1, 64), torch.zeros(2, 2, 1, 64)
    with pytest.raises(ValueError, match=message):
        cpu.append(rows, rows, storage, Tokens.at(table, lens))
    tokens = Tokens.at(table, lens + 1 if length >= 0 else lens)
    with pytest.raises(ValueError, match=message if length != 32 else "got 33"):
        cpu.attend(out, rows, storage, tokens, Scoring(0.1))
    after = snapshot(storage)
    assert all((before[name] == after[name]).all() for name in before)
    assert not out.any()


def test_tensors_cannot_be_replaced() -> None:
    """The kernels keep their addresses."""
    storage = make_case("cpu", lens=(50,)).storage
    for name in ("k", "v", "k_scales", "v_scales", "key_center"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(storage, name, torch.zeros(1))


@linux
def test_calls_do_not_keep_a_cache_alive() -> None:
    storage = layer(num_blocks=2 * HUGE_PAGE // (2 * 16 * 64))
    table, lens = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    rows = torch.randn(1, 2, 1, 64)
    tokens = Tokens.at(table, lens)
    cpu.append(rows, rows, storage, tokens)
    address = storage.k.data_ptr()
    assert is_mapped(address)
    del storage
    gc.collect()
    assert not is_mapped(address)


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(x, 16) for x in line.split()[0].split("-"))
        if first <= address < last:
            return True
    return False


@linux
@pytest.mark.parametrize("size", [0, 100, HUGE_PAGE - 1, HUGE_PAGE, 5 * HUGE_PAGE + 12345])
def test_large_storage_is_aligned_to_huge_pages(size: int) -> None:
    x = cpu.empty((size, 2), torch.float16, CPU)
    assert x.shape == (size, 2)
    assert x.dtype == torch.float16
    assert x.is_contiguous()
    assert x.nbytes < HUGE_PAGE or x.data_ptr() % HUGE_PAGE == 0
    x.fill_(3)
    assert (x == 3).all()


def resident_bytes(name: str) -> int:
    """``VmRSS``, or ``VmHWM``, its largest value so far."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


@linux
def test_a_long_chunk_makes_no_dense_copy_of_its_past() -> None:
    past, chunk, heads, dim = 1 << 16, 512, 2, 128
    storage = alloc_paged_int8_layer(past // 16, 16, heads, dim, rotation="hadamard", center_keys=True)
    for x in (storage.k, storage.v):
        x.random_(-127, 128)
    for x in (storage.k_scales, storage.v_scales):
        x.fill_(0.01)
    tokens = Tokens.at(torch.arange(past // 16, dtype=torch.int32)[None], torch.tensor([past], dtype=torch.int32))
    q, k, v = (torch.randn(1, n, chunk, dim) for n in (2 * heads, heads, heads))
    out = torch.zeros_like(q).fill_(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = resident_bytes("VmRSS")
        cpu.attend(out, q, storage, tokens, Scoring(dim**-0.5), (k, v))
    finally:
        torch.set_num_threads(threads)
    dense_past = 2 * heads * past * dim * 4
    # A thread's buffers have 0.3 MiB, and Linux counts pages of each processor in batches of some dozen.
    assert resident_bytes("VmHWM") - before <= dense_past / 100
