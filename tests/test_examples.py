"""The examples and the README's code run as they stand, on a tiny model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from hf_int8_paged import kernels
from tests.processes import HANGS

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_the_script_generates_and_shows_the_bytes(tiny_model_folder: Path):
    command = [sys.executable, str(ROOT / "examples" / "generate.py"), str(tiny_model_folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    assert re.search(r"\d+ tokens in [\d,]+ bytes", result.stdout)


def test_the_notebook_runs(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_INT8_PAGED_MODEL", str(tiny_model_folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=HANGS, startup_timeout=HANGS, kernel_name="python3").execute()
    assert outputs(notebook)


def test_the_notebook_is_stored_with_the_outputs_of_a_clean_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    stored = outputs(notebook)
    assert not [output for output in stored if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in stored), "the plot"


def test_the_code_in_the_readme_runs(tiny_model_folder: Path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    code = blocks[0]
    name = re.search(r'name = "([^"]+)"', code)
    assert name, "the block names its model"
    code = code.replace(name[1], str(tiny_model_folder))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_the_code_of_the_kernel_card_runs() -> None:
    card = (ROOT / "kernels" / "CARD.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    scope: dict[str, Any] = {"kernel": kernels}
    exec(code, scope)
    assert scope["out"].shape == (1, 8, 1, 64)
    assert scope["out"].isfinite().all()


def test_the_kernel_folder_loads_as_a_package_of_another_name(tmp_path: Path):
    """As the kernel hub does: the folder alone, under a name that it does not know."""
    build = (ROOT / "kernels" / "build.toml").read_text(encoding="utf-8")
    (name,) = re.findall(r'^name = "([^"]+)"', build, re.MULTILINE)
    folder = name.replace("-", "_")
    shutil.copytree(ROOT / "kernels" / "torch-ext" / folder, tmp_path / "some_hub_name")
    code = (
        "import sys, some_hub_name as kernel; kernel.alloc_paged_int8_layer(1, 16, 1, 32); "
        "assert 'hf_int8_paged' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=HANGS, check=True)


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
