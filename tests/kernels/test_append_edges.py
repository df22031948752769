"""Append where a rounding or the place of a token is at an edge: every bit of the storage, as in test_append.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .test_append import append_and_check, normal

#: Groups hold 16 positions: sequences that begin on both sides of their boundaries, and inside.
BEGINNINGS = (0, 1, 7, 15, 16, 17, 31, 33)


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("tokens", [2, 8, 15, 16, 17, 18, 31, 32, 33, 34, 49])
def test_chunks_that_begin_and_end_on_both_sides_of_a_group_of_tokens(
    backend: str, tokens: int, block_size: int
) -> None:
    """Their neighbours in the groups at either end are poisoned, and stay so."""
    shape = (len(BEGINNINGS), 1, tokens)
    k, v = normal(*shape, 32), normal(*shape, 24, seed=1)
    append_and_check(backend, k, v, before=BEGINNINGS, block_size=block_size, rotation="hadamard")


def beside_every_half(scales: np.ndarray) -> np.ndarray:
    """Float32 ``[3 * scales, 128]``: rows with these scales, of their products with -126.5, -125.5, ..., 126.5 but one,
    and of the float32 numbers above and below those."""
    halves = np.arange(-126.5, 127, 1.0)
    halves[0] = 127  # the largest, which sets the scale
    halves = np.append(halves[:127], 0.5)
    # Exact: at most 11 by 8 bits.
    exact = (scales.astype(np.float32)[:, None] * halves.astype(np.float32)).astype(np.float32)
    beside = [np.nextafter(exact, np.float32(bound)) for bound in (-np.inf, np.inf)]
    for rows in beside:
        rows[:, 0] = exact[:, 0]
    return np.concatenate([exact, *beside])


@pytest.mark.parametrize(("first", "step"), [(1, 97), pytest.param(1, 1, marks=[pytest.mark.wide, pytest.mark.slow])])
def test_quotients_beside_every_half(backend: str, first: int, step: int) -> None:
    """Rounded to the even integer where they are a half, and to the nearest where they are the next number."""
    bits = np.arange(first, 0x7C00, step, dtype=np.uint16)  # all positive float16 numbers, or some
    rows = torch.from_numpy(beside_every_half(bits.view(np.float16)))[None, None]
    append_and_check(backend, rows, rows.flip(3))


@pytest.mark.parametrize("step", [389, pytest.param(1, marks=[pytest.mark.wide, pytest.mark.slow])])
def test_scales_beside_every_middle_between_two(backend: str, step: int) -> None:
    """Rows whose largest element is 127 times the middle between two float16 numbers, or the next float32 number."""
    bits = np.arange(0, 0x7BFF, step, dtype=np.uint16)
    low, high = bits.view(np.float16).astype(np.float64), (bits + 1).view(np.float16).astype(np.float64)
    largest = (127 * (low + high) / 2).astype(np.float32)  # exact: at most 12 by 7 bits
    largest = np.concatenate([largest, *(np.nextafter(largest, np.float32(bound)) for bound in (0, np.inf))])
    rows = torch.from_numpy(largest)[None, None, :, None] * torch.linspace(-0.75, 1, 16)
    append_and_check(backend, rows, rows.flip(3))
