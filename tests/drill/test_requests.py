"""Samples of the drill of threads and of the soak; ``make drill`` and ``make soak`` do all of it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable

import pytest

from . import requests, soak, threads


@pytest.mark.parametrize("max_tokens", [None, 400])
def test_threads_of_one_pool_get_the_right_tokens(
    max_tokens: int | None, record_property: Callable[[str, str], None]
) -> None:
    found = threads.drill(8, 64, max_tokens=max_tokens)
    record_property("counted", f"8 threads, max_tokens={max_tokens}: {dict(found)}")
    assert not [what for what in found if what.startswith("failure")]
    assert found["right"] + found["refused as the pool was full"] == 64
    assert found["right"] > 8
    assert bool(found["refused as the pool was full"]) == (max_tokens is not None)


def test_the_drill_would_see_a_wrong_token_and_a_block_that_is_held() -> None:
    model = requests.model()
    right = requests.right_answers(model)
    pool = requests.PagedInt8Pool(**requests.OPTIONS)
    right[3][0][0] += 1
    found: Counter[str] = Counter()
    requests.serve_checked(model, 3, right, pool, found)
    assert found["failure: other tokens"] == 1
    assert not requests.check_empty(pool)
    pool.allocators["full_attention"].allocate(1)
    assert len(requests.check_empty(pool)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_memory_is_flat_and_the_pool_empty_at_the_end(
    seconds: int, record_property: Callable[[str, str], None]
) -> None:
    result = soak.soak(seconds)
    record_property("counted", f"soak of {seconds} s: {result}")
    assert not result["failures"], result["counts"]
    assert result["counts"]["right"] > 0
