"""A sample of the drill; ``make drill`` injects everywhere."""

from __future__ import annotations

import os
import random
import time

import pytest
import torch

from hf_int8_paged.kernels import why_unavailable

from .drill import drill, injections

#: Every run takes other points; the seed is printed where one of them fails.
SEED = int(os.environ.get("HF_INT8_PAGED_TEST_SEED", time.time_ns() % 10**9))


@pytest.mark.skipif(
    why_unavailable("cpu", torch.device("cpu")) is not None, reason="needs the native CPU backend (a C compiler)"
)
@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_an_exception_at_any_line_leaves_a_cache_that_can_be_used(count: int) -> None:
    chosen = random.Random(SEED).sample(list(injections()), count)
    print(f"HF_INT8_PAGED_TEST_SEED={SEED}")
    outcomes, failures = drill(chosen, show=3)
    print(dict(outcomes))
    assert not failures
    assert outcomes.total() == count
