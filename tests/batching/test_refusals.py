"""What cannot be served is refused with a sentence before anything starts, and takes no other request with it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_int8_paged.batching import PagedInt8BatchingManager, RequestTooLongError, generate_batch
from tests.processes import HANGS

from .models import VOCABULARY, batching_model, manager_for
from .test_entry import options

LLAMA = "llama: full attention"
GOOD = [1, 2, 3]

PROMPTS: dict[str, tuple[Any, str]] = {
    "empty": ([], "prompt 1 is empty"),
    "a text": ("hello", "prompt 1 must be token ids, a list of whole numbers: 'str'"),
    "a number": (5, "prompt 1 must be token ids, a list of whole numbers: 'int'"),
    "fractions": ([1.0, 2.5], "prompt 1 must be token ids, a list of whole numbers: 'float'"),
    "a row in a row": (torch.ones(1, 5, dtype=torch.long), r"prompt 1 has the shape \[1, 5\]"),
    "a row in a list": ([[1, 2]], "prompt 1 must be token ids, a list of whole numbers: 'list'"),
    "no token of the model": ([1, VOCABULARY], f"prompt 1 has the token id {VOCABULARY}; the model knows 0 to"),
    "a negative token": ([-1, 2], "prompt 1 has the token id -1; the model knows 0 to"),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_that_is_none_is_refused_before_anything_starts(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, (prompt, said) = batching_model(LLAMA), PROMPTS[kind]
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=said):
        generate_batch(model, [GOOD, prompt], *options())
    with manager_for(model) as manager:
        with pytest.raises(ValueError, match=said):
            manager.add_requests([GOOD, prompt])
        with pytest.raises(ValueError, match=said.replace("prompt 1", "the prompt")):
            manager.add_request(prompt, request_id="bad")
        assert manager.input_queue.empty()
        assert manager.output_router.are_free({"bad", "req_0", "req_1"})
        manager.start()
        manager.add_request(GOOD)
        assert manager.get_result(timeout=HANGS).error is None  # type: ignore[union-attr]
        manager.stop()
    assert not caplog.records


@pytest.mark.parametrize("asked", [{}, {"max_new_tokens": 955}], ids=["its prompt", "its answer"])
def test_a_prompt_that_the_blocks_cannot_hold_is_refused_before_anything_starts(
    asked: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = batching_model(LLAMA)
    long = GOOD * (2 if asked else 330)
    with caplog.at_level(logging.ERROR), pytest.raises(RequestTooLongError, match="all blocks together hold 960"):
        generate_batch(model, [GOOD, long], *options(), **asked)
    assert not caplog.records
    assert model.config._attn_implementation == "int8_paged"
    assert "init_continuous_batching" not in vars(model)
    assert len(generate_batch(model, [GOOD], *options())) == 1


@pytest.mark.parametrize("kind", ["tensors", "arrays", "lists of the numbers of arrays"])
def test_prompts_may_be_tensors_or_arrays_of_different_lengths(kind: str) -> None:
    asked = [[5, 6, 7], [8], [9, 10]]
    given: list[Any] = [np.array(prompt) for prompt in asked]
    if kind == "tensors":
        given = [torch.tensor(prompt) for prompt in asked]
    elif kind.startswith("lists"):
        given = [list(prompt) for prompt in given]
    model = batching_model(LLAMA)
    plain, results = (generate_batch(model, inputs, *options()) for inputs in (asked, given))
    assert [result.prompt_ids for result in results.values()] == asked
    assert [x.generated_tokens for x in results.values()] == [x.generated_tokens for x in plain.values()]


def test_no_prompts_have_no_results() -> None:
    assert generate_batch(batching_model(LLAMA), [], *options()) == {}


def test_what_is_raised_inside_the_engines_own_call_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError("no room for a list")

    monkeypatch.setattr(PagedInt8BatchingManager, "add_requests", full)
    model = batching_model(LLAMA)
    with pytest.raises(RuntimeError, match="the engine gave no prompt a result"):
        generate_batch(model, [GOOD], *options())
    assert model.config._attn_implementation == "int8_paged"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "centers: a number": ({"centers": 3}, r"centers must be what key_centers\(model\) returns.*got int"),
    "centers: a list": ({"centers": [1]}, "centers must be what .* got list"),
    "centers: no such layer": ({"centers": {9: torch.zeros(2, 64)}}, "centers has the layer 9; the model has 0 to 2"),
    "centers: a name": ({"centers": {"0": torch.zeros(2, 64)}}, "centers has the layer '0'"),
    "centers: no tensor": ({"centers": {0: [0.0]}}, r"centers\[0\] must be a tensor of floating point .* got list"),
    "centers: whole numbers": ({"centers": {0: torch.ones(2, 64, dtype=torch.long)}}, "got torch.int64 tensor"),
    "centers: another shape": (
        {"centers": {0: torch.zeros(7, 5)}},
        r"centers\[0\] has the shape \[7, 5\], but .* keys",
    ),
    "no tokens": ({"max_request_tokens": 0}, "max_request_tokens must be a whole number of at least 2, .* got 0"),
    "no new token": ({"max_request_tokens": 1}, "max_request_tokens must be .* got 1"),
    "fewer than none": ({"max_request_tokens": -5}, "max_request_tokens must be .* got -5"),
    "a text": ({"max_request_tokens": "a"}, "max_request_tokens must be .* got 'a'"),
    "a fraction": ({"max_request_tokens": 5.5}, "max_request_tokens must be .* got 5.5"),
    "rotation": ({"rotation": 3}, 'rotation must be "hadamard" or None, got 3'),
    "sink_tokens": ({"sink_tokens": None}, "sink_tokens must be 0 or 1 in continuous batching, got None"),
    "backend": ({"backend": "abacus"}, "abacus"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_option_out_of_range_is_refused_before_the_engine_runs(kind: str) -> None:
    model, (given, said) = batching_model(LLAMA), WRONG[kind]
    with pytest.raises(ValueError, match=said):
        generate_batch(model, [GOOD], *options(), int8_options=given)
    with pytest.raises(ValueError, match=said):
        started(model, given)
    assert model.config._attn_implementation == "int8_paged"


def started(model: Any, given: dict[str, Any]) -> None:
    config = ContinuousBatchingConfig(num_blocks=9)
    PagedInt8BatchingManager(model, GenerationConfig(eos_token_id=-1), config, **given).start()
    raise AssertionError("the engine runs")
