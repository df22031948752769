"""A sample of the drill; ``make drill`` injects everywhere."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch

from hf_int8_paged.kernels import why_unavailable

from . import refusals
from .drill import drill, injections, one_at_each_line

#: Another seed takes other points.
SEED = int(os.environ.get("HF_INT8_PAGED_TEST_SEED", 0))


@pytest.mark.skipif(
    why_unavailable("cpu", torch.device("cpu")) is not None, reason="needs the native CPU backend (a C compiler)"
)
@pytest.mark.parametrize("every_line", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["100", "every line"])
def test_an_exception_at_any_line_leaves_a_cache_that_can_be_used(
    every_line: bool, record_property: Callable[[str, str], None]
) -> None:
    everywhere = list(injections())
    chosen = one_at_each_line(everywhere, SEED) if every_line else random.Random(SEED).sample(everywhere, 100)
    outcomes, failures = drill(chosen, show=3)
    record_property("counted", f"drill, HF_INT8_PAGED_TEST_SEED={SEED}: {dict(outcomes)}")
    assert not failures
    assert outcomes.total() == len(chosen) > (2000 if every_line else 99)


@pytest.mark.skipif(
    why_unavailable("cpu", torch.device("cpu")) is not None, reason="needs the native CPU backend (a C compiler)"
)
@pytest.mark.parametrize("every_line", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["60", "every line"])
def test_memory_refused_anywhere_is_a_full_cache_that_goes_on(
    every_line: bool, record_property: Callable[[str, str], None]
) -> None:
    everywhere = list(refusals.refusals())
    chosen = refusals.one_at_each_line(everywhere, SEED) if every_line else random.Random(SEED).sample(everywhere, 60)
    outcomes, failures = refusals.drill(chosen)
    record_property("counted", f"{len(chosen)} of {len(everywhere)} refusals: {dict(outcomes)}")
    assert not failures
    assert outcomes.total() == len(chosen) > (400 if every_line else 59)
    assert sum(n for what, n in outcomes.items() if what.startswith("CacheFullError, same")) > len(chosen) // 3
