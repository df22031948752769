"""Counts of what the ways to generate came to, at the end of the run."""

from __future__ import annotations

from collections import Counter
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    outcomes: Counter = Counter()
    reasons: Counter = Counter()
    for report in terminalreporter.getreports("passed"):
        properties = dict(report.user_properties)
        if report.when == "call" and "outcome" in properties:
            outcomes[properties["outcome"]] += 1
            if "reason" in properties:
                reasons[f"{properties['outcome']}: {properties['reason']}"] += 1
    if not outcomes:
        return
    terminalreporter.section("generation, compared with transformers' own cache")
    failures = sum(report.when == "call" for report in terminalreporter.getreports("failed"))
    for outcome, count in sorted((outcomes | Counter({"failures of ours": failures})).items()):
        terminalreporter.write_line(f"{count:5}  {outcome}")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:5}  {reason}")
