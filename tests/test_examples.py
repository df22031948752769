"""The examples and the README's code run as they stand, on a tiny model."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    PreTrainedConfig,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_int8_paged import PagedInt8Cache, kernels
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from tests.processes import HANGS

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_the_script_generates_and_shows_the_bytes(tiny_model_folder: Path):
    command = [sys.executable, str(ROOT / "examples" / "generate.py"), str(tiny_model_folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    assert re.search(r"\d+ tokens in [\d,]+ bytes", result.stdout)


def test_the_prompt_store_finds_in_another_process_what_one_has_stored(tiny_model_folder: Path, tmp_path: Path):
    command = [sys.executable, str(ROOT / "examples" / "prompt_store.py"), str(tiny_model_folder), str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    known = []
    for _ in range(2):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
        assert result.returncode == 0, result.stderr
        known += [tuple(map(int, found)) for found in re.findall(r"(\d+) of (\d+) tokens were stored", result.stdout)]
        assert re.search(r"sequences +4 of", result.stdout)
    (nothing, first), (shared, second), (again, _), (as_well, _) = known
    assert nothing == 0
    assert 0 < shared < second  # the text, but not the question
    assert again >= first - 16
    assert as_well >= second - 16
    assert (tmp_path / "blocks.png").read_bytes().startswith(b"\x89PNG")


def test_the_code_of_the_readme_for_offloading_runs(tiny_model_folder: Path):
    model = LlamaForCausalLM.from_pretrained(tiny_model_folder, attn_implementation="int8_paged")
    scope: dict[str, Any] = {
        "model": model, "inputs": {"input_ids": torch.arange(1, 61)[None]}, "PagedInt8Cache": PagedInt8Cache
    }  # fmt: skip
    exec(readme_blocks()[3], scope)
    assert scope["output"].shape == (1, 100)
    assert scope["cache"].offloading


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc/self/pagemap")
def test_the_script_for_offloading_measures_and_draws(tiny_model_folder: Path, tmp_path: Path):
    picture = tmp_path / "offloading.png"
    command = [sys.executable, str(ROOT / "examples" / "offloading.py"), str(tiny_model_folder), str(picture), "600"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    kept, _, offloaded = re.findall(r": ([\d.]+) MiB of [\d.]+ MiB in memory", result.stdout)
    assert float(offloaded) <= 0.6 * float(kept)  # one of two layers
    assert "all three went on alike" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_code_of_the_readme_for_stored_prompts_runs(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tiny_model_folder, attn_implementation="int8_paged")
    scope: dict[str, Any] = {"model": model, "ids": torch.arange(1, 61)[None]}
    for known in (0, 48):
        exec(readme_blocks()[2], scope)
        assert scope["known"] == known
    assert len(scope["store"]) == 1


def test_the_script_for_many_requests_shares_their_beginning(tiny_model_folder: Path):
    command = [sys.executable, str(ROOT / "examples" / "many_requests.py"), str(tiny_model_folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    assert all(question in result.stdout for question in ("trilobites eat?", "hollow bones?", "What is amber?"))
    kept = re.search(r"(\d+) full blocks are kept", result.stdout)
    assert kept
    assert int(kept[1]) >= 10


def test_the_code_of_the_readme_for_many_requests_runs(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]):
    (code,) = [block for block in all_blocks() if "generate_batch" in block]
    name = re.search(r'name = "([^"]+)"', code)
    assert name, "the block names its model"
    exec(code.replace(name[1], str(tiny_model_folder)), {})
    assert len(capsys.readouterr().out.splitlines()) >= 3


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


def all_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def readme_blocks() -> list[str]:
    """The README's Python blocks with a cache, its argument as the installed transformers calls it."""
    blocks = [block for block in all_blocks() if "generate_batch" not in block]
    assert all(block.count(" cache=cache,") == 1 for block in blocks), "written for the newest transformers"
    return [block.replace(" cache=cache,", f" {CACHE_ARGUMENT}=cache,") for block in blocks]


def test_the_first_code_of_the_readme_runs_without_a_word_of_deprecation(tiny_model_folder: Path):
    code = readme_blocks()[0]
    name = re.search(r'name = "([^"]+)"', code)
    assert name, "the block names its model"
    code = code.replace(name[1], str(tiny_model_folder))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "deprecated" not in result.stderr


_DECODER: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2}
_DECODER |= {"decoder_ffn_dim": 32}
_ENCODER: dict[str, Any] = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
#: name -> (model class, config)
ENCODER_DECODERS: dict[str, tuple[Any, PreTrainedConfig]] = {
    "bart": (BartForConditionalGeneration, BartConfig(**_DECODER, **_ENCODER, **_TOKENS, forced_eos_token_id=None)),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, **_TOKENS),
    ),
    "whisper": (
        WhisperForConditionalGeneration,
        WhisperConfig(**_DECODER, **_ENCODER, **_TOKENS, num_mel_bins=8, max_source_positions=20),
    ),
}
ENCODER_TOKENS = 20


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_the_code_of_the_readme_for_encoder_decoder_models_runs(name: str):
    model_class, config = ENCODER_DECODERS[name]
    torch.manual_seed(0)
    model = model_class(config).eval()
    model.set_attn_implementation("int8_paged")
    model.generation_config.eos_token_id = None  # a random model may end at once
    if name == "whisper":
        inputs = {"input_features": torch.randn(1, 8, 2 * ENCODER_TOKENS)}
    else:
        inputs = {"input_ids": torch.randint(3, 64, (1, ENCODER_TOKENS))}
    scope: dict[str, Any] = {"model": model, "inputs": inputs, "PagedInt8Cache": PagedInt8Cache}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        exec(readme_blocks()[1], scope)
    cache, output = scope["cache"], scope["output"]
    generated = 40
    # Whisper's own `generate` leaves the start token out of its answer.
    assert output.shape[1] in (generated, generated + 1)
    assert cache.self_attention_cache.get_seq_length() == generated  # with the start token, without the last one
    assert cache.cross_attention_cache.get_seq_length() == ENCODER_TOKENS
    assert cache.self_attention_cache.nbytes_used > 0
    assert cache.cross_attention_cache.nbytes_used > 0


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
