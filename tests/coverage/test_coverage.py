"""The coverage table: what it must say, and some of its rows measured again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from eval._coverage_table import markdown, summary
from eval.coverage import architectures, run

TABLE = Path(__file__).parents[2] / "docs" / "coverage.md"
#: One architecture for each way in which models differ.
SAMPLE = {
    "llama": "full attention",
    "gemma3_text": "sliding windows between full layers",
    "gemma4_text": "keys shared between layers, rows of 512 elements",
    "deepseek_v3": "keys and values of unlike width",
    "deepseek_v32": "sparse attention, which hands over the chosen keys",
    "kimi_linear": "linear attention and latents of 512 elements",
    "falcon_h1": "a recurrent state beside keys and values",
    "moshi": "windows in the cache, of which the model's masks know nothing",
    "mllama": "cross-attention layers in the same cache",
    "bloom": "attention of its own, which views keys in other shapes",
    "pegasus_x": "attention of its own, which adds masks to scores",
    "olmoe": "experts, of which rounding picks others now and then",
    "inkling2_text": "a position bias, and sinks of each row",
    "t5gemma": "a cross-attention cache that the model makes anew",
}


def rows() -> list[list[str]]:
    """Cells of the table's rows."""
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if re.match(r"\| [a-z0-9]", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if not line.startswith("| archi")]


@pytest.mark.skipif(
    f"\ntransformers {transformers.__version__}," not in TABLE.read_text(encoding="utf-8"),
    reason="the table is of another release of transformers, which has other architectures",
)
def test_the_committed_table_lists_every_architecture_once() -> None:
    assert sorted((cells[0], cells[1]) for cells in rows()) == sorted((name, kind) for kind, name, _ in architectures())


def test_the_committed_table_has_no_wrong_architecture_and_95_percent_right_ones() -> None:
    results = [cells[5] for cells in rows() if len(cells) > 3]
    assert not [result for result in results if result.startswith("failed")]
    assert results.count("ok") >= 0.95 * len(results)


def test_a_failure_and_a_refusal_are_told_apart_from_what_does_not_generate_at_all() -> None:
    common: dict[str, Any] = {"architecture": "x", "mapping": "causal"}
    results = [
        common
        | {"status": "ok", "layers": {"full_attention": 2}, "routes": ["kernel"], "eager": 0.0, "int8_paged": 0.1},
        common | {"status": "refused", "reason": "no such | layer"},
        common | {"status": "failed", "reason": "wrong"},
        common | {"status": "apart", "reason": "no cache"},
    ]
    assert summary(results).startswith("1 of 3 architectures")
    text = markdown(results)
    assert "| x | causal | 2 full |  | kernel | ok |" in text
    assert "refused: no such \\| layer" in text
    assert text.endswith("| x | causal | no cache |\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_one_architecture_of_each_kind_is_right(name: str) -> None:
    (result,) = run([one for one in architectures() if one[1] == name][:1], workers=1)
    assert result["status"] == "ok", result.get("traceback", result.get("reason"))
