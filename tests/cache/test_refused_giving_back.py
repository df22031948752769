"""Memory refused at every operation of a step that has a pool give memory back: the cache stays what it was."""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from hf_int8_paged import CacheFullError, PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.pool_giving_back import PoolGivingBack
from tests.drill.drill import contents
from tests.drill.refusals import run
from tests.drill.scenarios import CONFIG, Step

from .offloaded import WAYS, choose


def do(cache: PagedInt8Cache, tokens: int, batch: int) -> None:
    world: Any = SimpleNamespace(main=cache)
    Step(tokens, batch)(world)


def full_and_reset(pool: PagedInt8Pool) -> PagedInt8Cache:
    """A cache without tokens, whose pool has no room but what it gives back."""
    cache = PagedInt8Cache(CONFIG, pool=pool)
    with suppress(CacheFullError):
        while True:
            do(cache, 60, 1)
    cache.reset()
    return cache


def pool_of(way: str) -> PagedInt8Pool:
    options: dict[str, Any] = {"max_bytes": 60_000 if way == "copied" else 40_000}
    if way == "near":
        return PagedInt8Pool(**options)
    return choose(PagedInt8Pool(offloading=True, offload_only_non_sliding=False, **options), way)


@pytest.mark.parametrize("way", ["near", *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS)])
def test_memory_refused_anywhere(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gave: list[bool] = []
    give_back = PoolGivingBack._give_back_unused

    def counted(pool: PoolGivingBack) -> bool:
        gave.append(give_back(pool))
        return gave[-1]

    monkeypatch.setattr(PoolGivingBack, "_give_back_unused", counted)
    cache = full_and_reset(pool_of(way))
    gave.clear()
    do(cache, 16, 8)
    assert gave == [True]
    expected, refused = contents(cache), 0
    for number in count():
        cache = full_and_reset(pool_of(way))
        before = contents(cache)
        lines, raised = run(lambda cache=cache: do(cache, 16, 8), number)  # type: ignore[misc]
        if isinstance(raised, CacheFullError):
            refused += 1
            assert contents(cache) == before
            do(cache, 16, 8)
        if raised is None or isinstance(raised, CacheFullError):  # else it was refused to the caller's own operation
            assert contents(cache) == expected
        if number >= len(lines):
            break
    assert refused > 20
