"""Seconds per generated token of OpenVINO over contexts of several lengths, with its cache in u8 and in f16.

`eval/bench_peers.py` calls it in an environment that has openvino-genai, which reads the GGUF file itself. Measured
are the runtime's forward passes over the model's own states ("u8", "f16"), and the tokens of the pipeline that users
call, whose cache is paged ("u8, GenAI pipeline").
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from _turns import Turn, parse, skip, take_turns, token_ids, versions, write

DEVICE = "CPU"


def options(precision: str, threads: int) -> dict[str, Any]:
    return {"KV_CACHE_PRECISION": precision, "INFERENCE_NUM_THREADS": threads}


class States:
    """The states of one sequence: keys and values of all layers, at first random ones."""

    def __init__(self, compiled: Any, tokens: int) -> None:
        import numpy
        import openvino

        self.request, self.tokens, self.numpy = compiled.create_infer_request(), tokens, numpy
        draw = numpy.random.default_rng(0)
        self._step(1)  # tells the shapes of the states
        for state in self.request.query_state():
            _, heads, _, head_dim = state.state.shape
            state.state = openvino.Tensor(draw.standard_normal((1, heads, tokens, head_dim), numpy.float32))

    def _step(self, length: int) -> None:
        numpy = self.numpy
        self.request.infer(
            {
                "input_ids": numpy.full((1, 1), 1000, numpy.int64),
                "attention_mask": numpy.ones((1, length), numpy.int64),
                "position_ids": numpy.full((1, 1), length - 1, numpy.int64),
                "beam_idx": numpy.zeros(1, numpy.int32),
            }
        )

    def turn(self) -> float:
        self.tokens += 1
        start = time.perf_counter()
        self._step(self.tokens)
        return time.perf_counter() - start


class Pipeline:
    """GenAI's pipeline. It keeps the blocks of a prompt, so that the same prompt again costs next to nothing."""

    def __init__(self, gguf: Path, threads: int, contexts: Sequence[int]) -> None:
        import numpy
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.cache_size = True, 1
        self.genai, self.numpy = openvino_genai, numpy
        self.pipeline = openvino_genai.LLMPipeline(
            str(gguf), DEVICE, scheduler_config=scheduler, ATTENTION_BACKEND="PA", **options("u8", threads)
        )
        self.two_tokens = openvino_genai.GenerationConfig(max_new_tokens=2, ignore_eos=True, do_sample=False)
        self.prompts = {tokens: numpy.array([token_ids(tokens)], numpy.int64) for tokens in contexts}

    def turn(self, tokens: int) -> float:
        """Seconds from the first new token to the second: the first needs what is left of the prompt."""
        from openvino import Tensor

        ids = self.prompts[tokens]
        prompt = self.genai.TokenizedInputs(Tensor(ids), Tensor(self.numpy.ones_like(ids)))
        times = self.pipeline.generate(prompt, self.two_tokens).perf_metrics.raw_metrics.m_durations
        return times[-1] / 1e6


def model_files(genai: Any, gguf: Path, folder: Path) -> Path:
    """The model as OpenVINO writes it beside the GGUF file that it has read."""
    beside = Path(shutil.copy(gguf, folder))
    genai.LLMPipeline(str(beside), DEVICE, enable_save_ov_model=True)
    return folder / "openvino_model.xml"


def main() -> None:
    args = parse(__doc__)
    try:
        import openvino
        import openvino_genai as genai
    except ImportError as error:
        skip(args.json, f"OpenVINO was skipped, as openvino-genai cannot be imported: {error}.")
        return
    core = openvino.Core()
    turns: dict[tuple[str, int], Turn] = {}
    settings: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = core.read_model(model_files(genai, args.gguf, Path(folder)))
        for precision in ("u8", "f16"):
            compiled = core.compile_model(model, DEVICE, options(precision, args.threads))
            settings["inference_precision"] = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
            for context in args.contexts:
                turns[precision, context] = States(compiled, context).turn
        pipeline = Pipeline(args.gguf, args.threads, args.contexts)
        for context in args.contexts:
            turns["u8, GenAI pipeline", context] = partial(pipeline.turn, context)
        times = take_turns(turns, args.rounds)
    write(args.json, {"versions": versions(["openvino", "openvino-genai"]), "settings": settings, "times": times})


if __name__ == "__main__":
    main()
