"""Two GPUs, without one: every launch goes to the device that holds the tensors, in its current stream."""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_int8_paged.kernels import FirstTokens, KvCacheQuant, Scoring, Tokens
from hf_int8_paged.kernels.triton import backend as triton_backend
from hf_int8_paged.kernels.triton import device as triton_device

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter knows neither devices nor streams"
)


class Machine:
    """Two different GPUs, and the driver that Triton asks where to launch."""

    def __init__(self) -> None:
        self.current, self.switches = 0, 0
        self.properties = [
            SimpleNamespace(major=8, minor=0, multi_processor_count=108),
            SimpleNamespace(major=9, minor=0, multi_processor_count=132),
        ]
        self.launches: list[tuple[str, int, str]] = []

    def device(self, device: torch.device) -> Any:
        """``torch.cuda.device``."""
        machine = self

        class Switch:
            def __enter__(self) -> None:
                self.before, machine.current = machine.current, device.index
                machine.switches += 1

            def __exit__(self, *error: object) -> None:
                machine.current = self.before

        return Switch()

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> str:
        return f"current stream of {device}"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.properties[self.current].major, 32)

    def launch(self, kernel: JITFunction, *args: Any, **options: Any) -> None:
        """As `JITFunction.run` chooses device and stream."""
        device = driver.active.get_current_device()
        self.launches.append((kernel.__name__, device, driver.active.get_current_stream(device)))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    machine = Machine()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.current)
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: machine.properties[device.index])
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: machine.launch(self, *args, **options))
    monkeypatch.setattr(driver, "_active", machine)
    for cached in (triton_device.chip_of, triton_device.device_count):
        cached.cache_clear()
    yield machine
    for cached in (triton_device.chip_of, triton_device.device_count):
        cached.cache_clear()


def run_a_layer(device: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device(device):
        slots = (2, 5, 16)
        k, v = (torch.empty(*slots, 64, dtype=torch.int8) for _ in range(2))
        k_scales, v_scales = (torch.empty(slots, dtype=torch.float16) for _ in range(2))
        storage = KvCacheQuant(k, v, k_scales, v_scales, "triton", "v_transposed", "hadamard")
        table, lens = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        new, q = torch.empty(2, 2, 3, 64), torch.empty(2, 4, 3, 64)
        out, row = torch.empty_like(q), torch.empty(2, 2, 1, 64)
        held = FirstTokens(row, row, lens, lens, lens, limit=1)
        tokens, scoring = Tokens(table, lens, lens), Scoring(0.1)
        triton_backend.append(new, new, storage, tokens)
        triton_backend.attend(out, q, storage, tokens, scoring, None, held)
        triton_backend.attend(out, q, storage, tokens, scoring, (new, new), held)


KERNELS = ("append_kernel", "decode_kernel", "reduce_kernel", "extend_kernel")


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("index", [0, 1])
def test_every_launch_goes_to_the_device_of_its_tensors(machine: Machine, index: int, current: int) -> None:
    machine.current = current
    run_a_layer(f"cuda:{index}")
    assert machine.launches == [(name, index, f"current stream of {index}") for name in KERNELS]
    assert machine.current == current, "the caller's device is current again"
    assert machine.switches == (0 if index == current else 3), "nothing is switched where nothing must be"


def test_one_device_is_not_even_asked_which_is_current(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked"))
    run_a_layer("cuda:0")
    assert len(machine.launches) == len(KERNELS)


def test_the_chip_is_that_of_the_device_not_of_the_current_one(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    chips = [triton_device.chip_of(torch.device("cuda", index)) for index in range(2)]
    assert [(chip.name, chip.num_processors) for chip in chips] == [("sm_80", 108), ("sm_90", 132)]
    triton_device.chip_of.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    machine.properties[1] = SimpleNamespace(
        major=9, minor=4, multi_processor_count=304, gcnArchName="gfx942:sramecc+:xnack-"
    )
    assert triton_device.chip_of(torch.device("cuda", 1)).name == "gfx942"


def test_a_triton_that_moves_k_and_v_through_shared_memory_is_warned_of_once_per_gpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_device.triton, "__version__", "3.6.0")
    with pytest.warns(UserWarning, match=r"triton 3\.6\.0 decode attention .* torch 2\.12 and newer"):
        assert triton_device.chip_of(torch.device("cuda", 0)).name == "sm_80"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        triton_device.chip_of(torch.device("cuda", 0))
        for kept in ("3.7.0", "3.10.1", "4.0.0"):
            triton_device.chip_of.cache_clear()
            monkeypatch.setattr(triton_device.triton, "__version__", kept)
            triton_device.chip_of(torch.device("cuda", 0))
