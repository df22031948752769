"""Options of the decode kernel: the committed table, and tuning, with a stub for the timer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_int8_paged.kernels.triton import decode as triton_decode
from hf_int8_paged.kernels.triton import tuning as triton_tuning
from hf_int8_paged.kernels.triton.layouts import Rows
from hf_int8_paged.kernels.triton.tuning import Chip, Config, config_for

CHIP = Chip("sm_90", 132)


class Timer:
    """A timer by which ``best`` is the fastest."""

    def __init__(self, best: Config) -> None:
        self.best = best
        self.asked: list[Config] = []

    def __call__(self, config: Config) -> float:
        self.asked.append(config)
        return 1.0 if config == self.best else 2.0


@pytest.fixture(autouse=True)
def tuned_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return triton_tuning.tuned_file()


@pytest.mark.parametrize(("asked_for", "gpu"), [(None, True), ("0", True), ("1", False)])
def test_nothing_is_tuned_unless_asked_for_and_possible(
    monkeypatch: pytest.MonkeyPatch, tuned_file: Path, asked_for: str | None, gpu: bool
) -> None:
    monkeypatch.delenv("HF_INT8_PAGED_TUNE", raising=False)
    if asked_for is not None:
        monkeypatch.setenv("HF_INT8_PAGED_TUNE", asked_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    timer = Timer(Config(128, 2))
    assert config_for(CHIP, 200, False, 16, 4, timer) == Config(248)
    assert config_for(CHIP, 256, False, 32, 8, timer) == Config(244)
    assert config_for(Chip("sm_100", 148), 256, False, 64, 8, timer) == Config(232)
    assert config_for(CHIP, 128, False, 16, 4, timer) == Config()
    assert config_for(Chip("gfx942", 304), 128, True, 16, 1, timer) == Config()
    assert not timer.asked
    assert not tuned_file.exists()


def test_the_fastest_is_found_once_and_kept(monkeypatch: pytest.MonkeyPatch, tuned_file: Path) -> None:
    monkeypatch.setenv("HF_INT8_PAGED_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    timer = Timer(Config(128, 2))
    for _ in range(2):
        assert config_for(CHIP, 128, False, 16, 4, timer) == Config(128, 2)
    assert Config() in timer.asked
    assert len(timer.asked) == len(set(timer.asked)) == 16
    # Another kind is tuned on its own; a file that cannot be read counts as none.
    other = Timer(Config(None, 6))
    assert config_for(CHIP, 128, False, 16, 8, other) == Config(None, 6)
    assert len(json.loads(tuned_file.read_text())) == 2
    tuned_file.write_text("{")
    assert config_for(CHIP, 128, False, 16, 8, timer) == Config(128, 2)
    assert list(tuned_file.parent.iterdir()) == [tuned_file]
    # Registers are NVIDIA's option.
    amd = Timer(Config(None, 4))
    assert config_for(Chip("gfx942", 304), 128, False, 16, 8, amd) == Config(None, 4)
    assert {config.max_registers for config in amd.asked} == {None}


def test_a_capture_is_not_disturbed(monkeypatch: pytest.MonkeyPatch, tuned_file: Path) -> None:
    monkeypatch.setenv("HF_INT8_PAGED_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    timer = Timer(Config(128, 2))
    assert config_for(CHIP, 128, False, 16, 4, timer) == Config()
    assert not timer.asked


def test_what_is_timed_is_a_launch_with_the_options_in_question(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    launches = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: launches.append((self.__name__, options)))
    monkeypatch.setattr(triton_decode.triton.testing, "do_bench", lambda call, return_mode: call() or 0.5)
    config = Config(128, 2)
    time = triton_decode.time_decode(CHIP, Rows(96, 80, 16, True), 4, True, config, device="cpu", sizes=(2, 2, 64))
    assert time == 0.5
    assert [name for name, _ in launches] == ["decode_kernel", "reduce_kernel"]
    assert launches[0][1]["maxnreg"] == 128
    assert launches[0][1]["grid"] == (4,)  # two heads of two sequences, whose 64 tokens are one chunk
