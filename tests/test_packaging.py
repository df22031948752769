"""What a wheel says of itself, what a registry's page shows, and what the extras bring."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import hf_int8_paged

ROOT = Path(__file__).parent.parent


@pytest.fixture
def distribution(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The project as setuptools sees it when it makes a wheel; nothing is built."""
    importlib.import_module("setuptools")  # brings distutils, which Python 3.12 and newer lack
    monkeypatch.chdir(ROOT)
    run_setup = importlib.import_module("distutils.core").run_setup
    return run_setup("setup.py", script_args=["bdist_wheel"], stop_after="commandline")


def of_setup() -> Any:
    """setup.py as a module, which sets nothing up."""
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_wheel_serves_every_python_of_a_platform(distribution: Any) -> None:
    """The library in it is loaded with ctypes and knows nothing of Python."""
    command = distribution.get_command_obj("bdist_wheel")
    command.ensure_finalized()
    python, abi, platform = command.get_tag()
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    assert command.root_is_pure is False


def test_a_wheel_has_every_folder_of_the_package(distribution: Any) -> None:
    folders = {"hf_int8_paged": ROOT / "hf_int8_paged"}
    folders["hf_int8_paged.kernels"] = ROOT / "kernels" / "torch-ext" / "int8_paged_attention"
    for name, folder in list(folders.items()):
        for inner in folder.iterdir():
            if (inner / "__init__.py").exists():
                folders[f"{name}.{inner.name}"] = inner
    assert set(distribution.packages) == set(folders)


def test_the_version_is_the_packages(distribution: Any) -> None:
    assert distribution.get_version() == hf_int8_paged.__version__


def test_no_relative_link_is_left_on_a_registrys_page(distribution: Any) -> None:
    page = distribution.metadata.long_description
    assert page.startswith("# hf_int8_paged")
    assert not re.search(r"\]\((?!https?://|#)", page)


def test_every_folder_of_the_package_is_installed(distribution: Any) -> None:
    kernels = ROOT / "kernels" / "torch-ext" / "int8_paged_attention"
    roots = {ROOT / "hf_int8_paged": "hf_int8_paged", kernels: "hf_int8_paged.kernels"}
    folders = {
        ".".join((name, *path.parent.relative_to(root).parts))
        for root, name in roots.items()
        for path in root.rglob("__init__.py")
    }
    assert set(distribution.packages) == folders


@pytest.mark.parametrize(
    ("repository", "page"),
    [
        (
            "https://host/owner/name",
            "![a plot](https://host/owner/name/raw/HEAD/docs/x.png) and "
            "[text](https://host/owner/name/blob/HEAD/docs/x.md), [there](#there), [out](https://elsewhere/y)",
        ),
        ("", "(picture: a plot) and text, [there](#there), [out](https://elsewhere/y)"),
    ],
)
def test_links_of_the_readme_lead_into_the_repository_or_become_text(repository: str, page: str) -> None:
    readme = "![a plot](docs/x.png) and [text](docs/x.md), [there](#there), [out](https://elsewhere/y)"
    assert of_setup().registry_page(readme, repository) == page


def test_the_extra_of_the_examples_brings_what_they_import(distribution: Any) -> None:
    codes = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")]
    for path in (ROOT / "examples").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        codes += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    nodes = [node for code in codes for node in ast.walk(ast.parse(code))]
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    imported = {name.split(".")[0] for name in named} - {*sys.stdlib_module_names, "hf_int8_paged"}
    brought = extra(distribution.extras_require, "examples")
    assert imported <= {"torch", "transformers"} | brought, "an import that the extra does not bring"
    # What fetches the demo model, and a kernel for the notebook.
    assert {"ipykernel", *extra(distribution.extras_require, "demo")} <= brought


def extra(extras: dict[str, list[str]], name: str) -> set[str]:
    """Distributions that an extra of the package asks for, those of the package's extras that it names included."""
    found: set[str] = set()
    for requirement in extras[name]:
        inner = re.match(r"hf-int8-paged\[([^\]]*)\]", requirement)
        if inner is not None:
            found.update(*(extra(extras, one.strip()) for one in inner[1].split(",")))
        else:
            found.add(re.split(r"[^A-Za-z0-9_-]", requirement)[0])
    return found


def test_the_projects_addresses_come_with_its_repository(distribution: Any) -> None:
    """One line of setup.py names the repository; the registry's page then has links to it and to the changelog."""
    setup = of_setup()
    assert distribution.metadata.project_urls == setup.registry_links(setup.REPOSITORY)
    assert setup.registry_links("https://example.org/us/it") == {
        "Repository": "https://example.org/us/it",
        "Changelog": "https://example.org/us/it/blob/HEAD/CHANGELOG.md",
    }


def test_the_readmes_policy_is_what_is_run() -> None:
    """The oldest and the newest release of transformers in README, in the requirements, and in what CI and
    ``make test-matrix`` install."""
    readme, makefile, matrix, project = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("README.md", "Makefile", "tests/matrix.py", "pyproject.toml")
    )
    policy = re.search(
        r"\(today (5\.\d+) to (5\.\d+)\), and of torch the\nnewest and .* \((2\.\d+) to (2\.\d+)\)", readme
    )
    assert policy is not None
    oldest, newest, torch_oldest, _ = policy.groups()
    run = re.search(r"^TRANSFORMERS \?= (.*)$", makefile, re.MULTILINE)
    assert run is not None
    assert [version.rsplit(".", 1)[0] for version in run[1].split()] == [oldest, newest]
    assert f'"transformers>={oldest}"' in project
    assert f'"torch>={torch_oldest}"' in project
    assert f'"torch=={torch_oldest}.0", "transformers=={oldest}.0"' in matrix
