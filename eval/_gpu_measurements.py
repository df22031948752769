"""The measurements of `gpu_day.py`, each in a process of its own; results are written as they come.

    python eval/_gpu_measurements.py kernels --part kernels.json

``--dry-run`` executes the same lines on the CPU, on little, with events that tell invented times.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import _latency_cuda
import latency_model
import torch
from _common import add_model_arguments, device_called, load_model
from _latency_race import Case
from gpu_predictions import GROUP, HEAD_DIM, KV_HEADS, WORKLOADS
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

PREDICTIONS = Path(__file__).parents[1] / "docs" / "gpu_predictions.json"
ROUNDS = 30
#: Of the last-level cache: bytes that a contestant's calls go through.
LLC_MULTIPLE = 4
MODEL_CONTEXTS = (2048, 8000)


class InventedEvent:
    """``torch.cuda.Event`` of a dry run: from one to the next it takes a millisecond."""

    def __init__(self, enable_timing: bool) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: InventedEvent) -> float:
        return 1.0


def chip_and_cache(device: torch.device) -> tuple[str, int]:
    """The chip's name as in the predictions, and the bytes that make memory cold."""
    if device.type == "cpu":
        return "sm_90", 1 << 16
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}", LLC_MULTIPLE * properties.L2_cache_size


def beside_prediction(result: dict[str, Any], chip: str, case: Case) -> dict[str, Any]:
    """``result`` with what was predicted for the GPU of that chip, if anything was. The device is measured without the
    launch; the prediction is given with and without."""
    predictions = json.loads(PREDICTIONS.read_text(encoding="utf-8"))
    names = {gpu["chip"]: gpu["name"] for gpu in predictions["assumptions"]["gpus"]}
    for row in predictions["predictions"]:
        if (row["gpu"], row["batch"], row["tokens"]) == (names.get(chip), case.batch, case.context):
            measured = 1e3 * result["contestants"]["int8"]["median_ms"]
            kernels = row["split_kernel"] + row["join_kernel"]
            result |= {"prediction": row, "measured_us": measured, "measured_over_predicted": measured / kernels}
    return result


def kernels(device: torch.device, flex: bool) -> Iterator[dict[str, Any]]:
    """Decode attention against a copy of device memory, SDPA and FlashAttention in float16, and flex_attention."""
    chip, cold_bytes = chip_and_cache(device)
    for batch, tokens in WORKLOADS:
        case = Case(batch, KV_HEADS, GROUP, HEAD_DIM, tokens)
        if device.type == "cpu":
            case = Case(min(batch, 2), 1, GROUP, HEAD_DIM, 64)
        result = _latency_cuda.run_case(case, ROUNDS if device.type == "cuda" else 2, cold_bytes, device, flex)
        print(_latency_cuda.report(result), flush=True)
        yield beside_prediction(result, chip, Case(batch, KV_HEADS, GROUP, HEAD_DIM, tokens))


def model(device: torch.device) -> Iterator[dict[str, Any]]:
    """Milliseconds per token of a whole model, eager and in CUDA graphs, for each kind of cache."""
    contestants = latency_model.CONTESTANTS | latency_model.COMPILED
    contestants.pop("QuantizedCache (HQQ)", None)
    dry = device.type == "cpu"
    for context in (32,) if dry else MODEL_CONTEXTS:
        with patch.object(latency_model, "CONTESTANTS", contestants):
            times = latency_model.time_steps(
                tiny_model() if dry else demo_model(device), 1, [context], 2 if dry else 10,
                compile_config=CompileConfig(backend="eager", mode="default") if dry else None,
            )  # fmt: skip
        for (_, name), seconds in times.items():
            yield {"context": context, "cache": name, **latency_model.summary(seconds)}


def demo_model(device: torch.device) -> PreTrainedModel:
    """In float16."""
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return load_model(parser.parse_args(["--dtype", "float16"]), device)[0]


def tiny_model() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


MEASUREMENTS: dict[str, Callable[[torch.device], Iterator[dict[str, Any]]]] = {
    "kernels": lambda device: kernels(device, flex=False),
    "flex": lambda device: kernels(device, flex=True),
    "model": model,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--part", type=Path, required=True, help="write the results here, after each of them")
    parser.add_argument("--dry-run", action="store_true", help="execute the lines on the CPU; nothing is measured")
    arguments = parser.parse_args()
    if arguments.dry_run:
        torch.cuda.Event = InventedEvent  # type: ignore[assignment, misc]
        torch.cuda._sleep = lambda cycles: None
        _latency_cuda.FLEX_BACKEND = "eager"
    device = device_called("cpu" if arguments.dry_run else "cuda")
    torch.manual_seed(0)
    results = []
    for result in MEASUREMENTS[arguments.measurement](device):
        results.append(result)
        arguments.part.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
