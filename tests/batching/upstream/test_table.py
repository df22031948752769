"""The table of transformers' tests says what is so: its sums, and that our tests of these names are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parents[1]


def test_the_table_names_tests_that_exist_and_adds_up() -> None:
    text = (FOLDER / "UPSTREAM.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|*]+) \| (\d+) \| (\d+) \| (.+) \|$", text, re.MULTILINE)
    reasons = re.findall(r"^\| ([^|*]+) \| (\d+) \|$", text, re.MULTILINE)
    cases, tested = (sum(int(row[i]) for row in rows) for i in (1, 2))
    said = re.search(r"(\d+) cases of (\d+) functions: (\d+) cases are tested here, (\d+) are left out", text)
    assert said is not None
    assert [int(x) for x in said.groups()] == [cases, len(rows), tested, cases - tested]
    assert sum(int(count) for _, count in reasons) == cases - tested
    known = {
        node.name
        for path in FOLDER.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 40
    assert named <= known
    assert all(int(row[2]) == 0 or "`test_" in row[3] for row in rows)
