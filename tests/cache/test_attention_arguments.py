"""What models hand to their attention function, found in the sources of the installed transformers."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import logging
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.seam import once
from hf_int8_paged.seam.attention import int8_paged_attention
from tests.models import random_ids, tiny_model

#: Names that models pass, and why `int8_paged_attention` need not look at them.
WITHOUT_EFFECT = {
    "sliding_window": "the mask and the cache's layer hold the window",
    "cu_seq_lens_q": "packed sequences of flash kernels; other implementations get the sequences one by one, or a mask",
    "cu_seq_lens_k": "like cu_seq_lens_q",
    "max_length_q": "like cu_seq_lens_q",
    "max_length_k": "like cu_seq_lens_q",
    "deterministic": "of the backward pass of flash kernels",
}
#: The first arguments, which come by position, under whatever name a model's own eager attention gives them.
BY_POSITION = {"query_states": "query", "key_states": "key", "value_states": "value"}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def attention_calls(function: ast.FunctionDef) -> list[ast.Call]:
    """Calls of what ``ALL_ATTENTION_FUNCTIONS`` gave."""
    from_interface = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value)
    }
    return [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in from_interface
    ]


def written_into(function: ast.FunctionDef, dictionary: str) -> set[str]:
    """Constant keys that a function puts into a dictionary by assignment or ``update``."""
    names: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Subscript) and ast.unparse(target.value) == dictionary:
                    names.add(ast.literal_eval(target.slice))
                elif ast.unparse(target) == dictionary and isinstance(node.value, ast.Dict):
                    names |= {ast.literal_eval(key) for key in node.value.keys if key is not None}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == f"{dictionary}.update":
            names |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return names


def taken_by_eager(function: ast.FunctionDef) -> set[str]:
    """Parameters of a model's own eager attention, and what it takes out of its ``kwargs``."""
    names = {BY_POSITION.get(x.arg, x.arg) for x in (*function.args.args, *function.args.kwonlyargs)}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("kwargs.get", "kwargs.pop"):
            names.add(ast.literal_eval(node.args[0]))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "kwargs":
            names.add(ast.literal_eval(node.slice))
    return names


@cache
def names_that_models_use() -> tuple[dict[str, set[str]], int]:
    """name -> models that pass it to the attention function or whose eager attention takes it; and how many calls."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    used: dict[str, set[str]] = defaultdict(set)
    calls = 0
    for path in sorted(Path(spec.origin).parent.glob("models/*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "ALL_ATTENTION_FUNCTIONS" not in source:
            continue
        lines = source.splitlines()
        for function in functions(ast.parse(source)):
            names: set[str] = set()
            text = lines[function.lineno - 1 : function.end_lineno]
            if function.name.endswith("eager_attention_forward"):
                names |= taken_by_eager(function)
            for call in attention_calls(function) if any("ALL_ATTENTION_FUNCTIONS" in line for line in text) else ():
                calls += 1
                for keyword in call.keywords:
                    if keyword.arg is None:
                        names |= written_into(function, ast.unparse(keyword.value))
                    else:
                        names.add(keyword.arg)
            for name in names - {"module"}:
                used[name].add(path.parent.name)
    return used, calls


def test_every_name_that_a_model_uses_is_taken_or_known_to_be_without_effect() -> None:
    """Over all models of transformers, those of the coverage table among them."""
    used, calls = names_that_models_use()
    assert calls > 400, "the calls of the attention functions look otherwise now: this test no longer finds them"
    assert {"position_bias", "s_aux", "softcap", "indices", "block_indices", "sinks"} & set(used)
    taken = set(inspect.signature(int8_paged_attention).parameters)
    new = {name: sorted(models) for name, models in used.items() if name not in taken and name not in WITHOUT_EFFECT}
    assert not new, f"decide what int8_paged_attention does with {new}"


class Module(torch.nn.Module):
    is_causal = True
    num_key_value_groups = 2


def tensors(q_len: int = 5, kv_len: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, n, 16, generator=generator) for heads, n in ((4, q_len), (2, kv_len), (2, kv_len))]


def a_row_over_a_past() -> Any:
    return Module(), *tensors(1, 9), None


def test_what_a_caller_carries_along_changes_nothing() -> None:
    arguments: Any = (Module(), *tensors(), None)
    expected, _ = int8_paged_attention(*arguments)
    carried: dict[str, Any] = {"num_items_in_batch": torch.tensor(7), "labels": torch.ones(2, 5), "use_cache": True}
    assert torch.equal(int8_paged_attention(*arguments, **carried)[0], expected)


def test_continuous_batching_is_refused() -> None:
    q, k, v = tensors()
    with pytest.raises(NotImplementedError, match=r"continuous batching.*object.*hf_int8_paged.batching"):
        int8_paged_attention(Module(), q, k, v, None, cache=object())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of a process that has said nothing yet."""
    monkeypatch.setattr(once, "_said", set())
    caplog.set_level(logging.INFO)
    return caplog


def test_asked_for_weights_it_says_once_who_has_them(said: pytest.LogCaptureFixture) -> None:
    for tokens in (5, 1):
        arguments: Any = (Module(), *tensors(tokens), None)
        asked: Any = {"output_attentions": True}
        assert int8_paged_attention(*arguments, **asked)[1] is None
    assert [record.name for record in said.records] == ["hf_int8_paged"]
    assert 'set_attn_implementation("eager")' in said.messages[0]
    assert "sdpa" not in said.text


def run(model, cache) -> None:
    with torch.no_grad():
        for ids in (random_ids(2, 20), random_ids(2, 1), random_ids(2, 3)):
            model(ids, past_key_values=cache, use_cache=cache is not None)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_another_cache_is_named_once(kind: str, said: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("int8_paged")
    for _ in range(2):
        run(model, DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, 40))
    hints = [message for message in said.messages if "another cache" in message]
    assert len(hints) == 1
    assert "PagedInt8Cache(model.config)" in hints[0]


@pytest.mark.parametrize("ours", [True, False])
def test_a_wrapped_cache_is_seen(ours: bool, said: pytest.LogCaptureFixture) -> None:
    """The hint looks at the variables of the module that calls; here they are this function's."""
    config = tiny_model("llama").config
    past = EncoderDecoderCache(PagedInt8Cache(config) if ours else DynamicCache(config=config), DynamicCache())
    int8_paged_attention(*a_row_over_a_past())
    assert past is not None
    assert ("another cache" in said.text) is not ours


def test_no_hint_where_there_is_no_other_cache(said: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("int8_paged")
    config = model.config
    run(model, None)
    run(model, PagedInt8Cache(config))
    run(model, PagedInt8Cache(config, max_batch_size=2, max_cache_len=40))
    # Dense keys of ours, while something is learned; and keys that are no cache's, as those of an image.
    model(random_ids(2, 20), past_key_values=(ours := PagedInt8Cache(config)))
    model(random_ids(2, 20), past_key_values=ours)
    int8_paged_attention(*a_row_over_a_past())
    assert "another cache" not in said.text
