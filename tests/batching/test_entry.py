"""The ways in: one call, and the model's own methods within a context."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import continuous_api

import hf_int8_paged.batching.centers as centers_module
from hf_int8_paged.batching import PagedInt8BatchingManager, generate_batch, int8_batching, key_centers
from hf_int8_paged.batching.engine import seeing

from .models import batching_model, manager_for, prompts, random_ids


def options() -> tuple[GenerationConfig, ContinuousBatchingConfig]:
    """Six greedy tokens, and few blocks."""
    generation = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    return generation, ContinuousBatchingConfig(num_blocks=60, page_size=16, max_batch_tokens=64)


def test_one_call_gives_results_in_the_order_of_the_prompts() -> None:
    model, asked = batching_model("llama: full attention"), prompts(7)
    results = generate_batch(model, asked, *options())
    assert [result.prompt_ids for result in results.values()] == asked
    assert all(len(result.generated_tokens) == 6 and result.error is None for result in results.values())
    assert model.config._attn_implementation == "int8_paged"
    assert "init_continuous_batching" not in vars(model)


def test_within_the_context_the_models_own_methods_take_int8_blocks() -> None:
    model: Any = batching_model("llama: full attention")
    asked = prompts(5)
    alone = generate_batch(model, asked, *options())
    with int8_batching(model) as same:
        assert id(same) == id(model)
        results = model.generate_batch(asked, *options(), persistent_manager=True)
        assert [x.generated_tokens for x in results.values()] == [x.generated_tokens for x in alone.values()]
        kept = model._cached_continuous_batching_manager
        assert isinstance(kept, PagedInt8BatchingManager)
        longest = max(asked, key=len)
        found = kept.cache.search_prefix_match("another", longest)
        kept.cache.free_blocks("another")
        assert found == (len(longest) - 1) // 16 * 16, "blocks of the first call serve the second"
        assert len(model.generate_batch(asked, *options(), persistent_manager=True)) == len(asked)
        assert model._cached_continuous_batching_manager is kept
        with pytest.raises(ValueError, match="within int8_batching already"), int8_batching(model):
            pass
    assert not hasattr(model, "_cached_continuous_batching_manager")
    model.set_attn_implementation("sdpa")
    assert not isinstance(model.init_continuous_batching(), PagedInt8BatchingManager)


def test_nothing_of_transformers_is_changed() -> None:
    before = dict(vars(continuous_api)), dict(vars(continuous_api.ContinuousBatchingManager))
    model: Any = batching_model("llama: full attention")
    other = copy.deepcopy(model)
    with int8_batching(model):
        generate = other.init_continuous_batching
        assert generate.__func__ is type(other).init_continuous_batching
        model.generate_batch(prompts(2), *options())
    assert before == (dict(vars(continuous_api)), dict(vars(continuous_api.ContinuousBatchingManager)))


def test_streaming_gives_every_token_as_it_comes() -> None:
    model = batching_model("llama: full attention")
    with manager_for(model) as manager:
        manager.start()
        name = manager.add_request(prompts(1)[0], streaming=True)
        assert name is not None
        lengths = [len(result.generated_tokens) for result in manager.request_id_iter(name)]
        manager.stop(keep_for_next_session=True)
    assert lengths == list(range(1, 11))


def test_each_request_samples_by_its_own_settings() -> None:
    """At temperature 0.01 all samples are the likeliest token's; at 100 they are not."""
    model, prompt = batching_model("llama: full attention"), prompts(1)[0]
    generation = {"do_sample": True, "temperature": 0.9, "max_new_tokens": 1}
    with manager_for(model, generation, per_request_processors=True, allow_block_sharing=False) as manager:
        manager.start()
        names = {manager.add_request(prompt, temperature=t): t for t in [0.01] * 20 + [100.0] * 20}
        tokens: dict[float, set[int]] = {0.01: set(), 100.0: set()}
        for _ in names:
            result = manager.get_result(timeout=3600)
            assert result is not None
            assert result.error is None, result.error
            tokens[names[result.request_id]].add(result.generated_tokens[0])
        manager.stop(keep_for_next_session=True)
    assert len(tokens[0.01]) == 1
    assert len(tokens[100.0]) > 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_cuda_graph": True}, "use_cuda_graph=True: int8 continuous batching makes block tables"),
        ({"use_cuda_graph": (False, True)}, "use_cuda_graph"),
        ({"varlen_compile_config": CompileConfig()}, "varlen_compile_config"),
        ({"default_compile_level": 1}, "default_compile_level=1"),
        ({"page_size": 24}, "page_size must be a multiple of 16 for int8 blocks, got 24"),
        ({"sink_tokens": 4}, "sink_tokens must be 0 or 1"),
        ({"rotation": "givens"}, 'rotation must be "hadamard" or None'),
        ({"backend": "triton"}, "backend 'triton' cannot serve device 'cpu'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_it_cannot_do_is_refused(options: dict, said: str) -> None:
    model = batching_model("llama: full attention")
    with pytest.raises(ValueError, match=said), manager_for(model, **options):
        pass
    assert model.config._attn_implementation == "int8_paged"


def test_a_refusal_by_the_blocks_leaves_the_model_as_it_was() -> None:
    model = batching_model("llama: full attention")
    with pytest.raises(ValueError, match="backend 'triton' cannot serve"):
        generate_batch(model, [[1, 2]], *options(), int8_options={"backend": "triton"})
    assert model.config._attn_implementation == "int8_paged"
    assert len(generate_batch(model, [[1, 2]], *options())) == 1


def test_another_engine_is_refused_by_its_version() -> None:
    def makes_its_cache_otherwise() -> None: ...

    with pytest.raises(NotImplementedError, match=r"transformers 5\..*does not use PagedAttentionCache.*5.18 to 5.24"):
        seeing(makes_its_cache_otherwise, PagedAttentionCache=None)


def test_the_attention_function_serves_the_engine_alone() -> None:
    model = batching_model("llama: full attention")
    model.set_attn_implementation("int8_paged_batching")
    with pytest.raises(RuntimeError, match="serves continuous batching only"):
        model(random_ids(1, 5))


def test_a_centre_is_worked_out_once_and_can_be_given() -> None:
    model = batching_model("llama: full attention")
    drawn = key_centers(model)
    assert key_centers(model) is drawn
    assert set(drawn) == set(range(3))
    own = key_centers(model, random_ids(40, seed=3))
    assert not own[0].equal(drawn[0])
    with manager_for(model, centers=own) as manager:
        pages: Any = manager.cache.cache_allocators["full_attention"]
        storage = pages.storages[0]
        assert storage.key_center.equal(own[0])
    with pytest.raises(ValueError, match="at least 16 tokens, got 3"):
        key_centers(model, [1, 2, 3])
    assert model in centers_module._known
