"""Few blocks, offloading, settings per request, memory: transformers' tests of these features, with our manager. What
needs graphs or compilation is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig, LlamaConfig
from transformers.generation.continuous_batching import cache as engine_cache
from transformers.generation.continuous_batching import offloading_manager

from hf_int8_paged.batching import PagedInt8BatchingManager
from hf_int8_paged.batching.memory import Int8Memory
from tests.models import tipped_roundings
from tests.processes import HANGS

from ..alone import Steps, check_nothing_is_held, difference, run
from ..models import batching_model, manager_for, prompts, random_ids

LLAMA, HYBRID = "llama: full attention", "gemma3: most layers windows"


@pytest.mark.parametrize("moved", [None, 0.0, 0.01], ids=["by default", "offloading switched off", "moved to the host"])
def test_too_few_blocks_for_all_change_no_token(moved: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times four equal prompts of 40 tokens, and room for three answers: requests lose their blocks and begin
    anew, or come back from the host's memory, which the engine pins only for an accelerator."""
    asked = [random_ids(40, seed=i % 4).tolist() for i in range(16)]
    options: dict[str, Any] = {} if moved is None else {"cpu_offload_space": moved}
    empty = torch.empty
    monkeypatch.setattr(
        offloading_manager.torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)
    )
    model = batching_model(LLAMA)
    with manager_for(model, {"max_new_tokens": 24}, num_blocks=12, safety_margin=0.0, **options) as manager:
        assert manager.batch_processor is not None
        offloading: Any = manager.batch_processor.offloading_manager
        asked_to, to_host = offloading.offload_requests, offloading._offload_to_cpu
        calls: list[str] = []
        monkeypatch.undo()
        offloading.offload_requests = lambda: _noted(calls, asked_to())
        offloading._offload_to_cpu = lambda *args: _moved(calls, to_host(*args))
        steps = Steps(manager.cache)
        results, names = run(manager, asked)
        check_nothing_is_held(manager.cache)
    assert calls.count("asked") > 2
    assert ("moved" in calls) == (moved == 0.01)
    margins = [difference(model, p, results[n], steps.lives[n], manager).margin for p, n in zip(asked, names)]
    assert max(margins) < tipped_roundings(model)
    assert sum(margin > 0 for margin in margins) <= 2


def _noted(calls: list[str], answer: bool) -> bool:
    calls.append("asked")
    return answer


def _moved(calls: list[str], requests: set[str]) -> set[str]:
    calls.extend("moved" for _ in requests)
    return requests


def test_each_request_has_its_own_settings_and_their_probabilities() -> None:
    """Greedy tokens after temperature, top_k and top_p of each request: log probabilities are those of the prompt's
    plain logits, scaled and cut."""
    prompt = random_ids(30, seed=8).tolist()
    settings = [(0.5, 10, 0.9), (2.0, 50, 0.99), (1.5, 3, 0.7)]
    generation = {"do_sample": True, "temperature": 3.0, "top_k": 60, "top_p": 0.5, "max_new_tokens": 1}
    model = batching_model(LLAMA)
    with manager_for(model, generation, max_batch_tokens=128, per_request_processors=True) as manager:
        manager.generation_config.do_sample = False
        manager.batch_processor = None
        manager.start()
        names = [
            manager.add_request(prompt, temperature=temperature, top_k=top_k, top_p=top_p)
            for temperature, top_k, top_p in settings
        ]
        results = {}
        for _ in names:
            result = manager.get_result(timeout=HANGS)
            assert result is not None
            assert result.error is None, result.error
            results[result.request_id] = result
        manager.stop()
    logits = plain_logits(model, prompt)
    for name, (temperature, top_k, top_p) in zip(names, settings):
        assert name is not None
        scores, order = (logits / temperature).sort(descending=True)
        scores[top_k:] = -math.inf
        shares = scores.softmax(dim=0)
        scores[shares.cumsum(dim=0) - shares >= top_p] = -math.inf
        result = results[name]
        assert result.generated_tokens == [int(order[0])]
        assert result.logprobs == pytest.approx([float(scores.log_softmax(dim=0)[0])], abs=1e-4)
    assert len({results[str(name)].logprobs[0] for name in names}) == 3


def plain_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    """Of the token behind a prompt that is one step, whose own tokens are seen in full precision."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -1]


@pytest.mark.parametrize("blocks", [0, 2, 16], ids=["none", "fewer than requests", "many"])
def test_the_engines_own_block_tables_are_not_used(blocks: int) -> None:
    """``max_blocks_per_request`` is for kernels that read the engine's tables. These make tables of their own for all
    steps, also where more requests decode than it says."""
    model, asked = batching_model(LLAMA), prompts(8)
    with manager_for(model, max_blocks_per_request=blocks) as manager:
        steps = Steps(manager.cache)
        results, names = run(manager, asked)
    for prompt, name in zip(asked, names):
        assert difference(model, prompt, results[name], steps.lives[name], manager).margin < tipped_roundings(model)


GRAPHS: list[dict[str, Any]] = [
    {"use_cuda_graph": True},
    {"use_cuda_graph": (True, False)},
    {"use_cuda_graph": (False, True)},
    {"default_compile_level": 1},
    {"varlen_compile_config": CompileConfig()},
    {"decode_compile_config": CompileConfig()},
    {"q_padding_interval_size": 16},
    {"kv_padding_interval_size": 64},
]


@pytest.mark.parametrize("option", GRAPHS, ids=str)
def test_graphs_and_compiled_steps_are_refused_by_name(option: dict[str, Any]) -> None:
    model = batching_model(LLAMA)
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* which no graph can hold"):
        PagedInt8BatchingManager(model, continuous_batching_config=ContinuousBatchingConfig(**option))
    assert model.config._attn_implementation == "int8_paged"


# -- memory --

#: What transformers' test predicts: page, KV heads, kinds of layers, layers, logprobs, dtype, asynchronous.
MEMORY = {
    "full attention": (32, 4, ["full_attention"], 22, False, torch.float16, False),
    "long pages": (256, 4, ["full_attention"], 22, False, torch.float16, False),
    "full and windows": (32, 4, ["full_attention", "sliding_attention"], 14, False, torch.bfloat16, False),
    "log probabilities": (32, 2, ["full_attention"], 16, True, torch.float16, False),
    "asynchronous": (32, 2, ["full_attention"], 16, True, torch.float16, True),
}


@pytest.mark.parametrize("case", MEMORY)
def test_the_memory_that_is_predicted_is_that_of_the_tensors(case: str) -> None:
    """Blocks, what a step takes in and gives back, and the larger of what its head and its attention need."""
    page, heads, kinds, layers, logprobs, dtype, twice = MEMORY[case]
    config = LlamaConfig(
        head_dim=64, num_key_value_heads=heads, num_attention_heads=8, hidden_size=512, vocab_size=32000
    )
    config._attn_implementation = "int8_paged_batching"
    engine = ContinuousBatchingConfig(
        page_size=page, num_blocks=4, max_blocks_per_request=0, return_logprobs=logprobs, max_memory_percent=0.9
    )
    engine.use_async_batching = twice
    page_bytes = 2 * heads * (64 + 2) * page
    block = page_bytes * layers // len(kinds)
    sector = math.lcm(block, 128)
    tokens = sector // block * page
    memory = Int8Memory(config, engine, dtype, sector, tokens, page_bytes * layers, kinds)
    sectors = memory.num_sectors_from_config()
    assert sectors is not None
    assert sectors * sector >= 4 * page_bytes * layers
    step, readable = 64, sectors * tokens
    ios = 7 * 4 + (2 if logprobs else 1) * 4 + len(kinds) * 16
    head, attention = 512 * 2 + 32000 * 4, 2 * (512 + 8 * 64 + 2 * heads * 64)
    expected = (sectors + 2) * sector + step * max(head, attention)
    expected += (2 if twice else 1) * (step * ios + readable * len(kinds) * 8)
    assert memory.compute_memory_footprint(step, sectors) == expected


@pytest.mark.parametrize("architecture", [LLAMA, HYBRID])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_no_more_than_the_share_of_the_memory_is_taken(
    architecture: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors that the manager makes before the first step, beside the model."""
    free = 2**24
    made: list[torch.Tensor] = []
    breakdown = (torch.device("cpu"), free, 0, 0)
    monkeypatch.setattr(engine_cache, "get_device_and_memory_breakdown", lambda: breakdown)
    model = batching_model(architecture)
    config = ContinuousBatchingConfig(
        page_size=16, max_batch_tokens=64, max_requests_per_batch=8, max_memory_percent=share
    )
    manager = PagedInt8BatchingManager(model, GenerationConfig(eos_token_id=-1), config)
    for name in ("zeros", "empty"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, make=make, **kwargs: _kept(made, make(*args, **kwargs)))
    manager.warmup()
    monkeypatch.undo()
    taken = sum(tensor.nbytes for tensor in made)
    assert manager.cache.cache_tensor.nbytes <= taken <= share * free
    assert manager.cache.num_sectors * manager.cache.bytes_per_sector >= 0.7 * share * free
    manager.destroy()
    model.set_attn_implementation("int8_paged")


def _kept(made: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    made.append(tensor)
    return tensor
