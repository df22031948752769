"""What `tests.counting` counts is what happens, the first time that code runs as well as later."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.counting import operators, python_work


def work(turns: int) -> int:
    total = 0
    for i in range(turns):
        total += square(i)
    return total


def square(i: int) -> int:
    return i * i


def test_every_call_and_bytecode_is_counted() -> None:
    first, again, longer = (python_work(partial(work, turns)) for turns in (10, 10, 30))
    assert first == again
    assert first.calls == 1 + 10
    assert longer.calls == 1 + 30
    per_turn = (longer.bytecodes - first.bytecodes) / 20
    assert per_turn == int(per_turn)
    assert 8 <= per_turn <= 30, "two loads, a product, a sum, a call and what belongs to them"


def test_an_error_passes_and_counting_ends() -> None:
    with pytest.raises(ZeroDivisionError):
        python_work(lambda: 1 // 0)
    assert python_work(lambda: work(3)).calls == 5


def test_operators_new_tensors_and_copies_to_a_device() -> None:
    x = torch.ones(4)

    def some() -> None:
        (x + 1).view(2, 2)
        x.mul_(2)
        x.to("meta")

    counted = operators(some)
    assert counted.called == {"add": 1, "view": 1, "mul_": 1, "_to_copy": 1}
    assert counted.tensors_made == 2
    assert counted.host_to_device == 1
