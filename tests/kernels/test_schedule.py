"""The programs of decode attention on GPUs finish together, whatever the lengths are: counted on a model of the cut,
which triton_schedule.py compares with what the kernels compute."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "eval"))
from _schedule_model import chunks_of, least_makespan, makespan, segments_of_programs

#: Two programs on each multiprocessor of an A100, an H100 and a B200, and three of an H100.
PROGRAMS = (216, 264, 296, 396)


def one_long(rng: np.random.Generator, batch: int, longest: int) -> np.ndarray:
    return np.where(np.arange(batch) == rng.integers(batch), longest, 1000)


def equal(rng: np.random.Generator, batch: int, longest: int) -> np.ndarray:
    return np.full(batch, longest)


def spread_evenly_by_logarithm(rng: np.random.Generator, batch: int, longest: int) -> np.ndarray:
    return np.exp(rng.uniform(np.log(1000), np.log(longest + 1), batch)).astype(np.int64)


def a_third_empty(rng: np.random.Generator, batch: int, longest: int) -> np.ndarray:
    lengths = spread_evenly_by_logarithm(rng, batch, longest)
    lengths[rng.random(batch) < 1 / 3] = 0
    return lengths


@pytest.mark.parametrize(
    "trace", [one_long, equal, spread_evenly_by_logarithm, a_third_empty], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("longest", [1_000, 8_000, 131_072, 1_000_000])
def test_programs_finish_together(trace, longest: int) -> None:
    """Within 1.15 of the least time, or one chunk more where that is less than eight chunks."""
    rng = np.random.default_rng(longest)
    for batch in (1, 2, 3, 8, 31, 64, 150, 256):
        for kv_heads in (1, 4, 8):
            for programs in PROGRAMS:
                chunks = chunks_of(trace(rng, batch, longest))
                if not chunks.any():
                    continue
                made, least = makespan(chunks, kv_heads, programs), least_makespan(chunks, kv_heads, programs)
                assert made <= max(1.15 * least, least + 1), (batch, kv_heads, programs, made, least)


def test_one_long_sequence_beside_many_short_ones() -> None:
    """One program for each head of each sequence would read the longest for the time of 513 chunks."""
    chunks = chunks_of(np.array([131_072] + [1_000] * 31))
    assert makespan(chunks, 8, 264) == 22
    assert least_makespan(chunks, 8, 264) == 21


def test_every_chunk_is_read_once() -> None:
    rng = np.random.default_rng(0)
    for programs in (1, 3, 264):
        chunks = chunks_of(rng.integers(0, 5000, 17))
        segments = segments_of_programs(chunks, 6, programs)
        assert len(segments) == programs
        assert sum(map(sum, segments)) == 6 * chunks.sum()


@pytest.mark.parametrize(
    ("chunks", "units", "programs", "expected"),
    [
        ([4], 2, 4, [[2], [2], [2], [2]]),
        ([3], 2, 4, [[2], [1], [2], [1]]),
        ([3, 1], 2, 4, [[2], [1, 1], [2], [1, 1]]),
        ([0, 5], 1, 2, [[3], [2]]),
        ([1], 2, 4, [[1], [1], [], []]),
    ],
    ids=["even", "rounded_up_per_unit", "a_position_before_each_unit", "an_empty_sequence", "idle_programs"],
)
def test_cuts_made_by_hand(chunks: list[int], units: int, programs: int, expected: list[list[int]]) -> None:
    assert segments_of_programs(np.array(chunks), units, programs) == expected
