"""Numbers of tokens and of copies: integers of any library, and what is none is refused before anything changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .test_errors import contents, filled, llama

PREALLOCATED = {"max_batch_size": 4, "max_cache_len": 40}


@pytest.mark.parametrize("options", [{}, PREALLOCATED], ids=["growing", "preallocated"])
@pytest.mark.parametrize("operation", ["crop", "batch_repeat_interleave"])
@pytest.mark.parametrize("number", [-5.0, None, "2", torch.tensor(1.0)], ids=str)
def test_numbers_that_are_no_integers(operation: str, number: object, options: dict[str, Any]):
    cache = filled(llama(), **options)
    before = contents(cache)
    with pytest.raises(TypeError, match=rf"must be an integer, got {re.escape(repr(number))}"):
        getattr(cache, operation)(number)
    assert all(map(torch.equal, contents(cache), before))


def test_a_negative_number_of_copies():
    cache = filled(llama())
    before = contents(cache)
    with pytest.raises(RuntimeError, match="at least 0, got -1"):
        cache.batch_repeat_interleave(-1)
    assert all(map(torch.equal, contents(cache), before))


@pytest.mark.parametrize("options", [{}, PREALLOCATED], ids=["growing", "preallocated"])
def test_integers_of_other_libraries(options: dict[str, Any], tmp_path: Path):
    cache, expected = filled(llama(), **options), filled(llama(), **options)
    removed: Any = (np.int64(-3), torch.tensor(-2))
    copies: Any = np.int32(2)
    for number in removed:
        cache.crop(number)
    cache.batch_repeat_interleave(copies)
    expected.crop(-5)
    expected.batch_repeat_interleave(2)
    assert all(map(torch.equal, contents(cache), contents(expected)))
    cache.save(tmp_path / "cache")
