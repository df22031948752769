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

#: The folders and modules of the package, lowest first: each may import those before it. Modules that import nothing of
#: the package are anyone's.
ORDER = (
    "kernels",
    "layer_checks",
    "one_thread",
    "seam",
    "block_allocator",
    "pool_access",
    "offloading",
    "options",
    "pool_centring",
    "pool_giving_back",
    "pool_budget",
    "pool",
    "sequences",
    "layer_reader",
    "assignment",
    "whole_cache",
    "layer",
    "static_layer",
    "hybrid",
    "layer_types",
    "geometry",
    "batch_rows",
    "cache_operations",
    "description",
    "block_picture",
    "look_inside",
    "persistence",
    "absent_names",
    "generate_limits",
    "cache",
    "prompt_store",
)
#: Within folders.
SEAM = ("read_only", "views", "padding", "masks", "once", "dense_attention", "mask_function", "operators", "attention")
SEQUENCES = (
    "block_table", "first_tokens", "state", "group", "prompts", "memory", "room", "growing_room",
    "recovery", "growing", "preallocated_budget", "preallocated_room", "preallocated", "device_step",
)  # fmt: skip
#: Most positional parameters of a function.
MAX_POSITIONAL = 8


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


def imports_inside(path: Path) -> set[Path]:
    """Files of the package that a module imports when it is imported, or within a function."""
    found = set()
    for level, name in imports(path):
        parts = name.split(".")
        if level == 0 and parts[0] != "hf_int8_paged":
            continue
        folder = PACKAGE if level == 0 else [path.parent, *path.parent.parents][level - 1]
        parts = parts[1:] if level == 0 else parts
        if parts[:1] == ["kernels"]:  # lies elsewhere, and imports nothing of the package
            continue
        while parts and not (folder.joinpath(*parts).with_suffix(".py").exists() or folder.joinpath(*parts).is_dir()):
            parts = parts[:-1]
        target = folder.joinpath(*parts)
        found.add(target.with_suffix(".py") if target.with_suffix(".py").exists() else target / "__init__.py")
    return {target for target in found if target.is_relative_to(PACKAGE)}


def place(path: Path) -> str:
    """The folder or module of the core that a file is, or is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("module", [name for name in ORDER if name != "kernels"])
def test_the_core_imports_downwards_only(module: str) -> None:
    allowed = {*ORDER[: ORDER.index(module)], module}
    paths = [PACKAGE / f"{module}.py"] if (PACKAGE / f"{module}.py").exists() else (PACKAGE / module).glob("*.py")
    for path in paths:
        wrong = {
            target
            for target in imports_inside(path)
            if place(target) not in allowed and (place(target) in ORDER or imports_inside(target))
        }
        assert not wrong, f"{path.name} must not import {wrong}; a new module of the core belongs into ORDER"


@pytest.mark.parametrize(("folder", "order"), [("seam", SEAM), ("sequences", SEQUENCES)])
def test_folders_import_downwards_inside(folder: str, order: tuple[str, ...]) -> None:
    files = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
    assert files == set(order), "every module of the folder has a place in the order"
    for i, name in enumerate(order):
        inside = {target.stem for target in imports_inside(PACKAGE / folder / f"{name}.py") if place(target) == folder}
        assert inside <= set(order[:i]), f"{folder}/{name}.py must not import {inside - set(order[:i])}"


def test_no_import_goes_round_in_a_circle() -> None:
    """Of the package, the kernels and the evaluation, also where types alone are imported within the kernels."""
    graph = {path: imports_inside(path) for path in PACKAGE.rglob("*.py")}
    for folder in (ROOT / "eval", KERNELS):
        names = {path.stem: path for path in folder.rglob("*.py") if path.stem not in ("__init__", "backend")}
        for path in folder.rglob("*.py"):
            own = {name.split(".")[-1] for level, name in imports(path) if level or name.startswith("eval")}
            graph[path] = {names[name] for name in own if name in names and names[name] != path}
    left = dict(graph)
    while left:
        leaves = {path for path, targets in left.items() if not (targets & left.keys()) - {path}}
        assert leaves, f"a circle among {sorted(str(path.relative_to(ROOT)) for path in left)}"
        left = {path: targets for path, targets in left.items() if path not in leaves}


def test_no_signature_is_a_list_of_arguments() -> None:
    """Kernels of Triton take pointers one by one; everything else takes records."""
    long = []
    for path in (*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py"), *(ROOT / "eval").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                if len(node.args.posonlyargs + node.args.args) > MAX_POSITIONAL and not jitted:
                    long.append(f"{path.name}:{node.name}")
    assert not long


@pytest.mark.parametrize("folder", ["hf_int8_paged", "kernels", "tests", "eval", "examples"])
def test_no_file_is_longer_than_300_lines(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".c", ".h", ".sh")]
    assert files
    assert not [path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 300]


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


def test_without_the_import_transformers_says_what_the_readme_explains() -> None:
    """The name of the attention function is known once the package is imported."""
    run_python(
        """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
try:
    LlamaForCausalLM._from_config(config, attn_implementation="int8_paged")
except ValueError as error:
    said = str(error)
readme = " ".join(Path("../README.md").read_text(encoding="utf-8").split())
assert 'attn_implementation="int8_paged"` is not supported' in said, said
assert '**transformers says that `attn_implementation="int8_paged"` is not supported.**' in readme
import hf_int8_paged
LlamaForCausalLM._from_config(config, attn_implementation="int8_paged")
"""
    )
