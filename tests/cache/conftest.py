"""Backends for the cache's tests, and attention that a second reader checks."""

from __future__ import annotations

import pytest

from tests.kernels.conftest import INTERPRETED, backends_here

from .two_readers import checked

__all__ = ["backend", "checked"]

#: These tests keep their models on the CPU: Triton runs where it is interpreted.
BACKENDS = [name for name in backends_here() if name != "triton" or INTERPRETED]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend that serves tensors on the CPU here. tests/cache/test_two_readers_on_triton.py runs the Triton
    kernels under the interpreter."""
    return request.param
