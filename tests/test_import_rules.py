"""Who may import whom (DESIGN.md section 8), and what importing the package does to the process."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import HANGS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_int8_paged"
KERNELS = ROOT / "kernels" / "torch-ext" / "int8_paged_attention"

#: The core, lowest first: each module may import those before it, and modules that import nothing of the package.
ORDER = (
    "kernels",
    "layer_checks",
    "compiled_ops",
    "one_thread",
    "read_only",
    "views",
    "block_allocator",
    "block_table",
    "pool_access",
    "options",
    "pool",
    "sink_places",
    "layer_group",
    "sequence_state",
    "sequence_recovery",
    "sequences",
    "layer_reader",
    "assignment",
    "whole_cache",
    "layers",
    "static_sinks",
    "static_memory",
    "static_sequences",
    "static_step",
    "static_reader",
    "static_layers",
    "hybrid",
    "layer_types",
    "batch_rows",
    "cache_operations",
    "absent_names",
    "generate_limits",
    "cache",
)
#: What the attention function may know of the core.
SEEN_BY_ATTENTION = {"kernels", "compiled_ops", "views", "mask_function"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(relative level, dotted name) of each import that runs; those under ``if TYPE_CHECKING`` do not."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.name)
def test_kernels_import_only_themselves_torch_triton_and_the_standard_library(path: Path) -> None:
    for level, name in imports(path):
        top = name.split(".")[0]
        assert level <= len(path.relative_to(KERNELS).parts), f"{path.name} imports from outside the kernels: {name}"
        if level == 0:
            assert top in {"torch", "triton", *sys.stdlib_module_names}, f"{path.name} imports {name}"
            assert top != "triton" or path.parent.name == "triton", f"{path.name} imports triton"


def imports_inside(module: str) -> set[str]:
    """Modules of the package that a module imports."""
    path = PACKAGE / f"{module}.py"
    if not path.exists():  # the kernels, or a name that the package itself defines
        return set()
    return {
        name.removeprefix("hf_int8_paged.").split(".")[0]
        for level, name in imports(path)
        if level or name.split(".")[0] == "hf_int8_paged"
    }


@pytest.mark.parametrize("module", [*ORDER[1:], "attention"])
def test_the_core_imports_downwards_only(module: str) -> None:
    allowed = SEEN_BY_ATTENTION if module == "attention" else set(ORDER[: ORDER.index(module)])
    wrong = {name for name in imports_inside(module) - allowed if name in ORDER or imports_inside(name)}
    assert not wrong, f"{module}.py must not import {sorted(wrong)}; a new module of the core belongs into ORDER"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_the_package_leaves_triton_to_the_kernels(path: Path) -> None:
    assert not [name for _, name in imports(path) if name.split(".")[0] in ("triton", "tests", "eval", "examples")]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_the_cache_does_not_know_the_command(path: Path) -> None:
    known = {name.split(".")[0] for level, name in imports(path) if level == 1}
    assert "tools" not in known or path.name == "__main__.py"


@pytest.mark.parametrize("folder", [PACKAGE, KERNELS], ids=["package", "kernels"])
def test_the_plan_in_design_names_every_module(folder: Path) -> None:
    design = (ROOT / "DESIGN.md").read_text(encoding="utf-8")
    plan = design[design.index(f"\n{'hf_int8_paged/' if folder == PACKAGE else 'kernels/torch-ext/'}") :]
    plan = plan[: plan.index("```")]
    modules = [path.name for path in folder.rglob("*.py") if path.name != "__init__.py"]
    assert not [name for name in modules if not re.search(rf"(?<!\w){re.escape(name)}", plan)]


def test_the_kernels_folder_is_no_package() -> None:
    """With the repository root on sys.path it would shadow PyPI's `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "torch-ext" / "__init__.py").exists()


def run_python(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_package_works_where_triton_is_not_installed() -> None:
    run_python(
        """
import sys
sys.modules["triton"] = None
import hf_int8_paged, torch
from hf_int8_paged.kernels import alloc_paged_int8_layer, why_unavailable
alloc_paged_int8_layer(2, 16, 1, 64)
assert "triton" in why_unavailable("triton", torch.device("cuda"))
"""
    )


def test_importing_the_package_changes_nothing_but_registered_names() -> None:
    """Every attribute of every loaded transformers and torch module, and of transformers' classes, before and after.

    Two names are new. Flex attention is transformers' own behind a function that turns our views into tensors, and so
    are those of continuous batching behind one that refuses views.
    """
    run_python(
        """
import sys, types
import torch, transformers
import transformers.cache_utils, transformers.generation.utils, transformers.masking_utils, transformers.modeling_utils
import transformers.models.llama.modeling_llama
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def namespaces():
    for name, module in sorted(sys.modules.items()):
        if isinstance(module, types.ModuleType) and name.split(".")[0] in ("transformers", "torch"):
            yield name, vars(module)
            for key, value in list(vars(module).items()):
                if isinstance(value, type) and name.startswith("transformers") and value.__module__ == name:
                    yield f"{name}.{key}", vars(value)

before = {name: dict(namespace) for name, namespace in namespaces()}
attention, masks = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)
import hf_int8_paged

new_attention, new_masks = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)
assert callable(new_attention.pop("int8_paged")) and callable(new_masks.pop("int8_paged"))
wrapped = ["flex_attention", *(name for name in attention if name.startswith("paged|"))]
assert all(new_attention.pop(name).__wrapped__ is attention.pop(name) for name in wrapped)
assert (new_attention, new_masks) == (attention, masks)
after = {name: dict(namespace) for name, namespace in namespaces()}
changed = [
    f"{name}.{key}"
    for name, namespace in before.items()
    for key, value in namespace.items()
    if after[name].get(key) is not value
]
assert not changed, changed
"""
    )
