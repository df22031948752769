"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_int8_paged
from hf_int8_paged.tools.cli import main
from tests.processes import HANGS


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "import sys; from hf_int8_paged.tools.cli import main; sys.exit(main())", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


# -- the command itself ------------------------------------------------------------------------------------------------


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"hf-int8-paged {hf_int8_paged.__version__}\n"


def test_python_m_is_the_same_command():
    command = [sys.executable, "-m", "hf_int8_paged", "--version"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("hf-int8-paged ")


@pytest.mark.parametrize("arguments", [[], ["abacus"]])
def test_a_missing_or_unknown_command_names_both(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert re.search("demo.*info", capsys.readouterr().err)


# -- demo --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_shows_both_texts_bytes_times_and_agreement_without_a_warning(tiny_model_folder: Path):
    result = run("demo", "--model", str(tiny_model_folder), "--prompt", "hello", "--max-new-tokens", "5", COLUMNS="120")
    assert result.returncode == 0, result.stderr
    for shown in ("DynamicCache, attention sdpa", "PagedInt8Cache, attention int8_paged", "bytes of K and V in use"):
        assert shown in result.stdout
    assert "time per token" in result.stdout
    assert "5 and 5 greedy tokens" in result.stdout
    assert "warn" not in (result.stdout + result.stderr).lower()


def test_demo_json_is_the_only_thing_on_standard_output(tiny_model_folder: Path):
    result = run("demo", "--model", str(tiny_model_folder), "--max-new-tokens", "3", "--dtype", "bfloat16", "--json")
    shown = json.loads(result.stdout)
    assert shown["dtype"] == "bfloat16"
    assert shown["prompt_tokens"] > 2000, "the default prompt, one token per byte"
    assert len(shown["int8"]["tokens"]) == 3
    assert shown["bytes_ratio"] == shown["int8"]["bytes_in_use"] / shown["dynamic"]["bytes_in_use"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-new-tokens", "0"], "at least 1, got '0'"),
        (["--max-new-tokens", "many"], "got 'many'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_demo_refuses_wrong_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/folder"], "cannot load '/no/such/folder' as a causal language model"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--device", ""], "device '' cannot be used"),
        (["--prompt", ""], "the prompt is empty"),
        (["--max-new-tokens", "5000"], "exceeds the model's 4096"),
    ],
)
def test_demo_says_in_one_line_what_is_wrong(arguments, message, capsys, tiny_model_folder: Path):
    chosen = [] if "--model" in arguments else ["--model", str(tiny_model_folder)]
    assert main(["demo", *chosen, *arguments]) == 1
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert captured.out == ""


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half a download")


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_weights, "header"),
        (lambda folder: change_config(folder, hidden_size=128), "mismatched"),
        (lambda folder: change_config(folder, model_type="abacus"), "abacus"),
        (lambda folder: change_config(folder, model_type="vit"), "AutoModelForCausalLM"),
    ],
    ids=["damaged weights", "other sizes", "an unknown architecture", "no language model"],
)
def test_demo_says_in_a_few_lines_why_a_folder_cannot_be_loaded(
    spoil, message, capsys, tmp_path: Path, tiny_model_folder: Path
):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    spoil(folder)
    assert main(["demo", "--model", str(folder)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"hf-int8-paged: error: cannot load '{folder}'")
    assert message in said
    assert len(said) - len(str(folder)) < 600


# -- info --------------------------------------------------------------------------------------------------------------


def test_info_names_versions_and_the_backend_of_each_device():
    result = run("info", "--json")
    info = json.loads(result.stdout)
    assert all(info["versions"][name] for name in ("python", "hf-int8-paged", "torch", "transformers", "accelerate"))
    cpu, accelerator = info["devices"]
    assert cpu["type"] == "cpu"
    assert cpu["backend"] in ("cpu", "reference")
    assert accelerator["type"] != "cpu"
    for device in info["devices"]:
        named = {device["backend"], *device["unavailable"], *device["on_request"]}
        assert named == {"reference", "cpu", "triton"}


def test_info_as_text_says_the_same():
    shown = run("info").stdout
    assert "served by" in shown
    assert "not by 'triton'" in shown
    assert "torch " in shown


def test_info_survives_an_instruction_set_that_the_processor_lacks():
    result = run("info", HF_INT8_PAGED_CPU_ISA="abacus")
    assert result.returncode == 0, result.stderr
    assert "abacus" in result.stdout.partition("missing:")[2]


def test_info_says_what_is_missing_and_how_to_get_it():
    code = """
import importlib.metadata, importlib.util, pathlib, sys
from hf_int8_paged.kernels.cpu import library as cpu_library
cpu_library.PATH = pathlib.Path("/nowhere/lib.so")
sys.modules["triton"] = None
found, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name: None if name == "gguf" else found(name)
def hidden(name):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = hidden
from hf_int8_paged.tools.cli import main
main(["info"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    missing = result.stdout.partition("missing:")[2]
    assert "C kernels" in missing
    assert "-> install GCC or Clang" in missing
    assert "gguf" in missing
    assert "hf-int8-paged[demo]" in missing
    if sys.platform == "linux":
        assert "pip install 'triton" in missing
    assert "cpu" in result.stdout
    assert "served by 'reference'" in result.stdout
