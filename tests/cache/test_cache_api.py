"""Every public name of transformers' caches and layers: decided about in docs/cache_api.md, and each decision true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval import cache_api
from eval._cache_api_rows import DIFFERS, SAME, Row

ROWS = [(surface, name) for surface in cache_api.SURFACES for name in sorted(surface.decisions)]


@pytest.mark.parametrize("surface", cache_api.SURFACES, ids=lambda surface: surface.title)
def test_every_public_name_of_the_installed_transformers_is_decided_about(surface):
    undecided = cache_api.public_names(surface) - set(surface.decisions)
    assert not undecided, f"add rows for {sorted(undecided)} to eval/_cache_api_rows.py and run `make cache-api`"


@pytest.mark.parametrize(("surface", "name"), ROWS, ids=lambda x: x if isinstance(x, str) else x.title)
def test_the_decision_about_a_name_is_true(surface, name):
    if name not in cache_api.public_names(surface):
        pytest.skip("the installed transformers does not have it")
    assert cache_api.is_true(surface, name), surface.decisions[name]


def test_the_document_is_up_to_date():
    path = Path(__file__).parents[2] / "docs" / "cache_api.md"
    assert path.read_text(encoding="utf-8") == cache_api.markdown(), "run `make cache-api`"


@pytest.mark.parametrize(
    "row",
    [
        Row(lambda x: type(x).__name__),
        Row(lambda x: torch.randn(2) if "Paged" in type(x).__name__ else torch.zeros(2)),
        Row(lambda x: x.no_such_name),
        Row(lambda x: [1], verdict="refused", note="never"),
        Row(lambda x: 1, verdict=DIFFERS, holds=lambda ours, theirs: ours != theirs),
        Row(lambda x: 1 if "Paged" in type(x).__name__ else x.no_such_name, verdict=SAME),
    ],
)
def test_an_untrue_decision_is_noticed(row):
    surface = cache_api.SURFACES[0]._replace(decisions={"x": row})
    assert not cache_api.is_true(surface, "x")
