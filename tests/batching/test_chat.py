"""A conversation in this process, and one with a server."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_int8_paged.tools import chat, cli

from .test_server import Running


def turns(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """What the command prints for two turns."""
    assert cli.main(["chat", str(folder), "--max-new-tokens", "6", *options]) == 0
    return capsys.readouterr().out.split("\n")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand again\n"))


def test_in_this_process_earlier_turns_stay_in_the_blocks(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    create = chat.PagedInt8BatchingManager._create_batch_processor

    def watched(self: chat.PagedInt8BatchingManager) -> Any:
        processor: Any = create(self)
        match = processor.cache.search_prefix_match

        def recorded(*args: Any) -> int:
            found.append(match(*args))
            return found[-1]

        processor.cache.search_prefix_match = recorded
        return processor

    monkeypatch.setattr(chat.PagedInt8BatchingManager, "_create_batch_processor", watched)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello " * 20 + "\n\nand again\n"))
    assert len([line for line in turns(tiny_model_folder, capsys, "--device", "cpu") if line]) >= 2
    assert found[0] == 0
    assert found[-1] >= 64


@pytest.mark.usefixtures("said")
def test_with_a_server(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running = Running(tiny_model_folder)
    try:
        lines = turns(tiny_model_folder, capsys, "--url", f"http://127.0.0.1:{running.port}/v1")
    finally:
        running.stop()
    assert len([line for line in lines if line]) >= 2


@pytest.mark.usefixtures("said")
def test_without_a_server_it_says_so(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", str(tiny_model_folder), "--url", "http://127.0.0.1:9/v1"]) == 1
    assert "http://127.0.0.1:9/v1: Connection error" in capsys.readouterr().err


def test_without_the_servers_packages_it_says_what_to_install(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", str(tiny_model_folder)]) == 1
    assert "pip install 'hf-int8-paged[serve]'" in capsys.readouterr().err
