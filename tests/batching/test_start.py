"""What would stop the engine when it starts is known before: `check_start`, and a model that is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import cache as engine_cache
from transformers.generation.continuous_batching import offloading_manager

from hf_int8_paged.batching import PagedInt8BatchingManager
from hf_int8_paged.batching.entry import check_start

from .models import batching_model, manager_for, prompts

LLAMA, HYBRID = "llama: full attention", "gemma3: most layers windows"


def with_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    breakdown = (torch.device("cpu"), available, 0, 0)
    monkeypatch.setattr(engine_cache, "get_device_and_memory_breakdown", lambda: breakdown)


@pytest.mark.parametrize("architecture", [LLAMA, HYBRID])
def test_as_many_blocks_as_the_message_says_have_room_and_no_more(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = batching_model(architecture)
    with_memory(monkeypatch, 2**24)
    sizes: dict[str, Any] = {"page_size": 16, "max_batch_tokens": 64, "max_memory_percent": 0.5}
    with pytest.raises(MemoryError, match=r"8 MiB may be used, max_memory_percent=0.5") as refusal:
        check_start(model, ContinuousBatchingConfig(num_blocks=10**6, **sizes))
    most = int(str(refusal.value).split("at most ")[1].split()[0])
    for start in (check_start, started):
        start(model, ContinuousBatchingConfig(num_blocks=most, **sizes))
        with pytest.raises(MemoryError, match=f"num_blocks={most + 8}"):
            start(model, ContinuousBatchingConfig(num_blocks=most + 8, **sizes))
        assert model.config._attn_implementation == "int8_paged"


def started(model: Any, config: ContinuousBatchingConfig) -> None:
    manager = PagedInt8BatchingManager(model, GenerationConfig(eos_token_id=-1), config)
    manager.start()
    manager.stop()


def test_checking_allocates_a_block_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = batching_model(LLAMA), []
    zeros = torch.zeros

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = zeros(*args, **kwargs)
        sizes.append(made.nbytes)
        return made

    config = ContinuousBatchingConfig(page_size=16, num_blocks=4000, max_batch_tokens=64)
    monkeypatch.setattr(engine_cache.torch, "zeros", counted)
    check_start(model, config)
    monkeypatch.undo()
    assert config.num_blocks == 4000
    with manager_for(model, page_size=16, num_blocks=4000) as manager:
        assert max(sizes) < manager.cache.cache_tensor.nbytes / 100


def test_checking_allocates_nothing_to_offload_to(monkeypatch: pytest.MonkeyPatch) -> None:
    spaces, make = [], offloading_manager.OffloadingManager._compute_num_cpu_sectors

    def asked(self: Any, space: float | None, threshold: float) -> int:
        spaces.append(space)
        return make(self, 0.0, threshold)

    monkeypatch.setattr(offloading_manager.OffloadingManager, "_compute_num_cpu_sectors", asked)
    config = ContinuousBatchingConfig(page_size=16, num_blocks=40, cpu_offload_space=1.0)
    check_start(batching_model(LLAMA), config)
    assert spaces == [0.0]
    assert config.cpu_offload_space == 1.0


@pytest.mark.parametrize("end", ["destroy", "stop"])
@pytest.mark.parametrize("warm", [False, True], ids=["without blocks", "with blocks"])
def test_a_manager_that_was_never_started_leaves_the_model_as_it_was(end: str, warm: bool) -> None:
    model = batching_model(LLAMA)
    manager = PagedInt8BatchingManager(model, GenerationConfig(eos_token_id=-1), ContinuousBatchingConfig(num_blocks=9))
    if warm:
        manager.warmup()
    getattr(manager, end)()
    assert model.config._attn_implementation == "int8_paged"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_requests_per_batch": 0}, "expected a value >= 1"),
        ({"safety_margin": -1.0}, r"expected a value in \[0, 1\]"),
        ({"max_memory_percent": 0.0}, "a share between 0 and 1"),
        ({"page_size": 8}, "multiple of 16"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_that_a_start_refuses_are_refused_before(options: dict[str, Any], said: str) -> None:
    model = batching_model(LLAMA)
    for start in (check_start, started):
        with pytest.raises(ValueError, match=said):
            start(model, ContinuousBatchingConfig(**{"num_blocks": 40, "page_size": 16} | options))
        assert model.config._attn_implementation == "int8_paged"


def test_a_manager_that_cannot_be_made_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = batching_model(LLAMA)

    def refuse(_: GenerationConfig) -> None:
        raise ValueError("this generation config has no processors")

    monkeypatch.setattr(type(model), "_get_logits_processor", staticmethod(refuse))
    with pytest.raises(ValueError, match="has no processors"):
        PagedInt8BatchingManager(model)
    assert model.config._attn_implementation == "int8_paged"
    monkeypatch.undo()
    with manager_for(model) as manager:
        manager.add_request(prompts(1)[0])
        manager.start()
        result = manager.get_result(timeout=3600)
        manager.stop()
    assert result is not None
    assert len(result.generated_tokens) == 10
