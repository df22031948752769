"""Rows of first tokens: a row that is marked as written holds the token that it is marked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_int8_paged.batching.first_tokens import KEPT, FirstTokenRows

from .alone import run
from .models import batching_model, manager_for, prompts


def test_a_row_that_was_given_away_meanwhile_is_not_written() -> None:
    """A step writes a token's row; before it is over the row becomes another's, and the token gets a new one."""
    rows = FirstTokenRows([0], 1, 8, torch.float32, torch.device("cpu"))
    for token in range(KEPT - 1):
        rows.hold(f"request {token}", token)
    rows.hold("short", 1000)
    assert rows.to_write(["short"], [0], [0])[1] == [0]
    rows.release("short")
    rows.hold("evicts", 2000)
    rows.hold("again", 1000)
    rows.written()
    assert 1000 not in rows
    assert rows.to_write(["again", "evicts"], [0, 0], [0, 7])[1] == [0, 7]
    rows.written()
    assert 1000 in rows
    assert 2000 in rows


def test_forks_hold_their_row_before_they_are_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it stays where it is, although the request that they were forked from may end first."""
    model = batching_model("llama: full attention")
    held: list[int] = []
    with manager_for(model, {"num_return_sequences": 3, "do_sample": True}, num_blocks=60) as manager:
        prepare, rows = manager.cache.prepare_fork_request, manager.cache.first_rows
        assert rows is not None

        def preparing(*arguments: Any) -> list[str]:
            forked = prepare(*arguments)
            held.extend(rows.rows([arguments[0].request_id, *forked]))
            return forked

        monkeypatch.setattr(manager.cache, "prepare_fork_request", preparing)
        run(manager, prompts(1))
    assert len(held) == 3
    assert len(set(held)) == 1
