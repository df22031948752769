"""Under which name the cache is passed and comes back: ``past_key_values`` before transformers 5.24, then ``cache``."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from tests.models import random_ids, tiny_model

ROOT = Path(__file__).parent.parent


def test_generate_and_forward_take_the_argument_without_a_warning_and_answer_under_its_name() -> None:
    model = tiny_model("llama", attn_implementation="int8_paged")
    ids, cache = random_ids(1, 5), PagedInt8Cache(model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(ids, **{CACHE_ARGUMENT: cache})
        assert out[CACHE_ARGUMENT] is cache
        generate: Any = model.generate
        generated = generate(
            ids,
            **{CACHE_ARGUMENT: PagedInt8Cache(model.config)},
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
        )
    assert CACHE_ARGUMENT in generated
    assert isinstance(generated[CACHE_ARGUMENT], PagedInt8Cache)


def python_sources() -> Iterator[tuple[str, str]]:
    """(path, code) of the package, the evaluations and the examples, notebooks included."""
    for folder in ("hf_int8_paged", "eval", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        yield str(path.relative_to(ROOT)), "\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "code")


@pytest.mark.parametrize(("path", "code"), [pytest.param(*source, id=source[0]) for source in python_sources()])
def test_no_call_writes_the_older_name(path: str, code: str) -> None:
    """It warns with transformers 5.24, and `CACHE_ARGUMENT` is right with all."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert not [ast.unparse(x) for x in calls if any(k.arg == "past_key_values" for k in x.keywords)]
