"""`eval/latency_model.py`: preallocated caches with a compiled step take their turns too."""

from __future__ import annotations

import latency_model
import pytest
import torch
from transformers import CompileConfig

from ..models import tiny_model


@pytest.mark.slow
def test_compiled_steps_are_compiled_once_per_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_model, "CONTESTANTS", latency_model.CONTESTANTS | latency_model.COMPILED)
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")  # type: ignore[arg-type]
    times = latency_model.time_steps(tiny_model("qwen3"), 2, (16, 70), rounds=2, compile_config=config)
    assert set(times) == {(context, name) for context in (16, 70) for name in latency_model.CONTESTANTS}
    assert all(len(seconds) == 2 for seconds in times.values())
    assert torch._dynamo.config.recompile_limit == limit
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 * len(latency_model.COMPILED)
    assert not counters["graph_break"]
