"""Life without the C library: the stated fallback, its one warning, and an installation that goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from hf_int8_paged.kernels import alloc_paged_int8_layer
from hf_int8_paged.kernels.cpu import backend as cpu
from hf_int8_paged.kernels.cpu import library as cpu_library

ROOT = Path(__file__).parent.parent.parent


def test_without_the_library_the_cpu_gets_the_reference_and_one_warning_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu, "_LIBRARY", cpu_library.Library(tmp_path / "nothing.so"))
    cpu._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layers = [alloc_paged_int8_layer(2, 16, 1, 32) for _ in range(3)]
    assert [storage.backend for storage in layers] == ["reference"] * 3
    assert len(caught) == 1
    assert "install GCC or Clang" in str(caught[0].message)
    with pytest.raises(ValueError, match="no compiler was found; install GCC or Clang"):
        alloc_paged_int8_layer(2, 16, 1, 32, backend="cpu")
    cpu._warn_once.cache_clear()


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_text("not a library")
    missing = cpu_library.Library(tmp_path / "broken.so").missing
    assert missing is not None
    assert "broken.so" in missing


def test_installation_without_a_compiler_goes_on(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CFLAGS", "LDSHARED")}
    built = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-base", str(tmp_path)],
        cwd=ROOT, env={**environment, "PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert list(tmp_path.rglob("storage.py"))
    assert not list(tmp_path.rglob("*.so"))
