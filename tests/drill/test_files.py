"""Samples of the drill of files; ``make drill`` does all of it."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest

from . import files


def failures(found: Counter[str]) -> list[str]:
    return [what for what in found if "failure" in what or "lost" in what or "left behind" in what]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that were forked")
def test_a_save_that_is_killed_leaves_a_complete_file() -> None:
    found = files.kill_drill(12, seed=int(os.environ.get("HF_INT8_PAGED_TEST_SEED", 0)))
    assert not failures(found)
    assert sum(count for what, count in found.items() if what.startswith("complete")) == 12


@pytest.mark.parametrize(("drill", "count"), [(files.damage_drill, 400), (files.forgery_drill, 300)])
def test_a_file_that_is_wrong_is_refused_with_a_sentence(drill, count) -> None:
    found = drill(count, seed=int(os.environ.get("HF_INT8_PAGED_TEST_SEED", 0)))
    assert not failures(found)
    assert found.total() == count
    assert sum(n for what, n in found.items() if "refused" in what) > count // 2


def test_the_drill_would_see_damage_that_loads(monkeypatch) -> None:
    """Without checksums some damage loads, and is counted as a failure."""
    monkeypatch.setattr("zlib.crc32", lambda *_: 0)
    assert failures(files.damage_drill(200))


def test_the_committed_counts_are_of_the_whole_drill() -> None:
    counts = json.loads(files.RESULT.read_text(encoding="utf-8"))
    assert counts["failures"] == 0
    assert sum(n for what, n in counts["kills"].items() if what.startswith("complete")) == 200
    assert sum(counts["damaged"].values()) == 10_000
