"""Every test that asks for `backend` runs once for each backend that can serve this machine."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from hf_int8_paged.kernels import why_unavailable

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")

#: Tests of Triton kernels on whatever runs them here: the interpreter, or a GPU.
on_the_device = [] if INTERPRETED else [pytest.mark.gpu]


def backends_here() -> list[str]:
    names = ["reference"]
    # With a compiler at hand a missing native library is a failure, not a reason to test less.
    has_compiler = any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang", "cl"))
    if has_compiler or why_unavailable("cpu", CPU) is None:
        names.append("cpu")
    if INTERPRETED or torch.cuda.is_available():
        names.append("triton")
    return names


@pytest.fixture(params=backends_here())
def backend(request: pytest.FixtureRequest) -> str:
    """Name of the backend under test; `helpers.device_of` tells where its storage lives."""
    name = request.param
    device = torch.device("cuda") if name == "triton" and not INTERPRETED else CPU
    reason = why_unavailable(name, device)
    assert reason is None, f"backend {name!r} should work here: {reason}"
    return name


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "wide: a size that the Triton interpreter would need seconds for")


def backend_of(item: pytest.Item) -> str | None:
    parameters = getattr(item, "callspec", None)
    return parameters.params.get("backend") if parameters is not None else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if backend_of(item) == "triton":
                item.add_marker("gpu")
        return
    slow = [item for item in items if item.get_closest_marker("wide") and backend_of(item) == "triton"]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
