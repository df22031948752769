"""What `make test-gpu` adds to the kernels' own tests. Without a GPU these are left out; asking for them fails."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu" and not INTERPRETED and not torch.cuda.is_available():
        pytest.exit(f"no GPU was found: torch {torch.__version__} sees no CUDA device, so nothing was tested", 1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED or torch.cuda.is_available():
        return
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing:
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in set(needing)]
