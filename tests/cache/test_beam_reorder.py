"""What reordering beams costs: not more for a long prompt than for a short one."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from hf_int8_paged import PagedInt8Cache
from tests.models import tiny_model

BEAMS, NEW = 8, 40


def beams_over_a_prompt(tokens: int) -> PagedInt8Cache:
    """A cache of beams that share a prompt and have some tokens of their own."""
    cache = PagedInt8Cache(tiny_model("llama").config)
    generator = torch.Generator().manual_seed(0)
    for batch, count in ((1, tokens), (BEAMS, NEW)):
        if cache.get_seq_length():
            cache.batch_repeat_interleave(BEAMS)
        for layer in range(3):
            rows = torch.randn(batch, 2, count, 16, generator=generator)
            cache.update(rows, rows, layer)
    return cache


def reorder(cache: PagedInt8Cache, turns: list[torch.Tensor]) -> None:
    for rows in turns:
        cache.reorder_cache(rows)


@pytest.fixture
def turns() -> list[torch.Tensor]:
    """Permutations: beams neither die nor multiply, so that the cache is the same kind at every turn."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(BEAMS, generator=generator) for _ in range(50)]


@pytest.mark.parametrize("tokens", [1024, 8192], ids=lambda n: f"prompt_of_{n}")
def test_reordering_beams(benchmark, tokens, turns):
    benchmark(reorder, beams_over_a_prompt(tokens), turns)


def test_reordering_beams_takes_no_longer_over_a_long_prompt(turns):
    """8,192 tokens within 1.3 times of 1,024: the median of interleaved rounds, so that both see the same machine."""
    short, long = beams_over_a_prompt(1024), beams_over_a_prompt(8192)
    ratios = []
    for _ in range(41):
        seconds = []
        for cache in (short, long):
            start = time.perf_counter()
            reorder(cache, turns)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    assert statistics.median(ratios) < 1.3
