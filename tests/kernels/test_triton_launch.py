"""Launches of compiled kernels, without a GPU: what a launcher is given, and how much Python runs before."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_int8_paged.kernels import KvCacheQuant, Tokens
from tests.counting import python_work

pytest.importorskip("triton", reason="triton is not installed")
sys.path.append(str(Path(__file__).parents[2] / "eval"))

from triton import knobs
from triton.runtime.jit import JITFunction

from hf_int8_paged.kernels.triton import append, launch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no launches")

#: The grid, the stream, the loaded kernel, its metadata and three places for hooks.
BEFORE_ARGUMENTS = 9


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What the launchers were given."""
    from _triton_offline import TARGETS, launching_nothing

    monkeypatch.setattr(launch, "_COMPILED", {})
    with launching_nothing(TARGETS["sm_90"]) as launched:
        yield launched


@pytest.fixture
def runs(launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that Triton searches for."""
    searched: list[str] = []
    run = JITFunction.run

    def noted(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        searched.append(self.__name__)
        return run(self, *arguments, **options)

    monkeypatch.setattr(JITFunction, "run", noted)
    return searched


def layer(dim: int = 32) -> tuple[KvCacheQuant, Tokens]:
    slots = (2, 5, 16)
    k, v = (torch.empty(*slots, dim, dtype=torch.int8) for _ in range(2))
    scales = [torch.empty(slots, dtype=torch.float16) for _ in range(2)]
    lens = torch.zeros(1, dtype=torch.int32)
    return KvCacheQuant(k, v, *scales, "triton", "v_transposed"), Tokens(
        torch.zeros(1, 5, dtype=torch.int32), lens, lens
    )


def rows(tokens: int = 1, dim: int = 32, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(1, 2, tokens, dim, dtype=dtype)


def same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether two launches were given the same, but for hooks, of which there are none."""
    return len(first) == len(second) and all(
        a is b if isinstance(a, torch.Tensor) else a == b
        for i, (a, b) in enumerate(zip(first, second))
        if not BEFORE_ARGUMENTS - 3 <= i < BEFORE_ARGUMENTS
    )


def test_later_launches_give_the_launcher_what_the_first_gave_it(
    launched: list[tuple[Any, ...]], runs: list[str]
) -> None:
    storage, tokens = layer()
    for count in (1, 40):
        new = rows(count)
        for _ in range(3):
            append.launch_append(new, new, storage, tokens)
    assert runs == ["append_kernel"] * 2
    once, *later, first = launched[:4]
    assert all(same(once, other) for other in later)
    assert not same(once, first)
    assert all(same(first, other) for other in launched[4:])
    assert once[:4] == (1, 2, 1, 0)
    assert first[:4] == (4, 2, 1, 0)


def test_what_triton_compiles_anew_for_is_searched_for(launched: list[tuple[Any, ...]], runs: list[str]) -> None:
    storage, tokens = layer()
    misaligned = rows().new_zeros(65)[1:].view(1, 2, 1, 32)
    assert misaligned.data_ptr() % 16
    for new in (rows(), rows(dtype=torch.float16), misaligned, rows(2)):
        append.launch_append(new, new, storage, tokens)
        searches = len(runs)
        append.launch_append(new, new, storage, tokens)
        assert len(runs) == searches
    assert len(runs) == 4
    centred = KvCacheQuant(*storage.segments[0], "triton", "v_transposed", None, torch.zeros(2, 32))
    append.launch_append(rows(), rows(), centred, tokens)
    assert len(runs) == 5
    functions = [one[4] for one in launched]
    assert functions[:8:2] == functions[1:8:2]
    assert len(set(functions)) == 5


def test_hooks_see_every_launch(launched: list[tuple[Any, ...]], runs: list[str]) -> None:
    storage, tokens = layer()
    new, seen = rows(), []

    def hook(*arguments: Any, **options: Any) -> None:
        seen.append(1)

    append.launch_append(new, new, storage, tokens)
    append.append_kernel.add_pre_run_hook(hook)
    append.launch_append(new, new, storage, tokens)
    append.append_kernel.pre_run_hooks.clear()
    assert (len(seen), len(runs)) == (1, 2)
    knobs.runtime.launch_enter_hook.add(hook)
    append.launch_append(new, new, storage, tokens)
    knobs.runtime.launch_enter_hook.remove(hook)
    assert launched[-1][BEFORE_ARGUMENTS - 2] is knobs.runtime.launch_enter_hook
    append.launch_append(new, new, storage, tokens)
    assert len(runs) == 3


def test_an_unknown_version_launches_by_its_own_means(
    launched: list[tuple[Any, ...]], runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "LAUNCHES_DIRECTLY", False)
    storage, tokens = layer()
    for _ in range(3):
        append.launch_append(rows(), rows(), storage, tokens)
    assert len(runs) == len(launched) == 3


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "by_triton"])
def test_nothing_is_compiled_while_a_graph_is_captured(
    launched: list[tuple[Any, ...]], runs: list[str], direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was launched before can be captured, anything else is refused before it is launched."""
    monkeypatch.setattr(launch, "LAUNCHES_DIRECTLY", direct)
    storage, tokens = layer()
    append.launch_append(rows(), rows(), storage, tokens)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    append.launch_append(rows(), rows(), storage, tokens)
    assert len(launched) == 2
    searched = len(runs)
    with pytest.raises(RuntimeError, match=r"append_kernel has not been compiled .* once before capturing"):
        append.launch_append(rows(40), rows(40), storage, tokens)
    assert (len(launched), len(runs)) == (2, searched)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    append.launch_append(rows(40), rows(40), storage, tokens)
    assert len(launched) == 3


def test_a_direct_launch_runs_little_python(launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what the launcher itself does. The time that this takes is a budget of ``make bench``."""
    storage, tokens = layer()
    new = rows()

    def again() -> None:
        append.launch_append(new, new, storage, tokens)

    again()
    direct = python_work(again)
    monkeypatch.setattr(launch, "LAUNCHES_DIRECTLY", False)
    launch._COMPILED.clear()
    again()
    searched = python_work(again)
    # 1.4 times what Python 3.11 counts, as other versions compile to other bytecodes. Triton 3.9's search
    # takes 56 calls and 2,331 bytecodes.
    assert direct.calls <= 1.4 * 14
    assert direct.bytecodes <= 1.4 * 1209
    assert direct.calls < searched.calls / 2
