"""What the evaluations share: the model, the text, and what a result file says about where it was made."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_int8_paged.kernels import load_backend, why_unavailable
from hf_int8_paged.tools.demo_model import HUB_ID, demo_model_folder, quiet_transformers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_VERSIONS_OF = ("hf-int8-paged", "torch", "transformers", "triton", "accelerate", "datasets")
#: Characters read per wanted token when a corpus is streamed; English text has about 4.5.
_CHARACTERS_PER_TOKEN = 12


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=HUB_ID, help="name on the hub, or a folder (default: %(default)s)")
    group.add_argument("--gguf-file", help="GGUF file inside the model's folder")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    group.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one)")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    group.add_argument("--dataset", default="Salesforce/wikitext", help="for `datasets` (default: %(default)s)")
    group.add_argument("--config", default="wikitext-2-raw-v1", help="its configuration (default: %(default)s)")
    group.add_argument("--split", default="test", help="its split (default: %(default)s)")
    group.add_argument("--column", default="text", help="its column of text (default: %(default)s)")
    group.add_argument("--streaming", action="store_true", help="read no more of the dataset than --max-tokens need")
    group.add_argument("--text-file", type=Path, help="a UTF-8 file instead of a dataset")
    group.add_argument("--max-tokens", type=positive, help="use the first so many tokens of the text")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def device_called(name: str | None) -> torch.device:
    """The device of this name, or without one the accelerator if there is one; the program ends if there is no GPU."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"no GPU was found: torch {torch.__version__} sees no CUDA device, so nothing was measured")
    return device


def load_model(args: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode, and its tokenizer. The demo model needs no hub: see `demo_model_folder`."""
    source = demo_model_folder() if args.model == HUB_ID else args.model
    extra = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[args.dtype], device_map=device, **extra)
        return model.eval(), AutoTokenizer.from_pretrained(source, **extra)


def load_tokens(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids ``[tokens]`` of the text, at most ``--max-tokens``, without special tokens."""
    text = args.text_file.read_text(encoding="utf-8") if args.text_file else dataset_text(args)
    with quiet_transformers():  # the text is longer than any model's context, and that is meant
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids[: args.max_tokens]


def dataset_text(args: argparse.Namespace) -> str:
    from datasets import load_dataset

    rows: Iterable[dict[str, Any]] = load_dataset(
        args.dataset, args.config or None, split=args.split, streaming=args.streaming
    )
    wanted = args.max_tokens * _CHARACTERS_PER_TOKEN if args.streaming and args.max_tokens else None
    lines, characters = [], 0
    for row in rows:
        lines.append(row[args.column])
        characters += len(lines[-1])
        if wanted is not None and characters >= wanted:
            break
    # Joined as in transformers' guide to the perplexity of fixed-length models.
    return "\n\n".join(lines)


def provenance(device: torch.device, *, timed: bool = False) -> dict[str, Any]:
    """Machine, versions and command, for a result file. Where times are measured also the load of the machine: to be
    asked before, and `write_json` adds what it is after."""
    on_cpu = device.type == "cpu" and why_unavailable("cpu", device) is None
    return {
        "command": shlex.join(["python", *(word.removeprefix(f"{Path.cwd()}/") for word in sys.argv)]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "system": platform.platform(),
            **({"instruction_set": load_backend("cpu").selected_isa()} if on_cpu else {}),
        },
        **({"load_average_before": load_average()} if timed else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS_OF}},
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def load_average() -> list[float] | None:
    """Of the last 1, 5 and 15 minutes; None where the system does not tell."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a result file, with the machine's load now where `provenance` has told that before."""
    if "load_average_before" in content:
        content = content | {"load_average_after": load_average()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
