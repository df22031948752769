"""The server drill: several clients, one that hangs up, one that asks too much, a full pool, and the end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from hf_int8_paged.batching import PagedInt8BatchingManager
from hf_int8_paged.tools import cli
from hf_int8_paged.tools.serve import Server, ServerError, ServerOptions
from tests.processes import HANGS

from .alone import check_nothing_is_held

#: 640 tokens, of which a request may have all.
POOL = {"num_blocks": 40, "page_size": 16, "max_batch_tokens": 256}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def client_of(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=HANGS)


def wait_for(port: int, lives: Callable[[], bool]) -> openai.OpenAI:
    client, end = client_of(port), time.monotonic() + HANGS
    while lives():
        try:
            client.models.list()
            return client
        except openai.APIConnectionError:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.1)
    raise AssertionError("the server ended before it had started")


class Running:
    """A server in this process, in a thread of its own."""

    def __init__(self, folder: Path):
        self.server = Server(ServerOptions(str(folder), "127.0.0.1", 0, "cpu", None, None, POOL))
        self.port = self.server.port
        self.model = str(folder)
        self._thread = threading.Thread(target=self.server.run)
        self._thread.start()
        self.client = wait_for(self.port, self._thread.is_alive)

    @property
    def engine(self) -> Any:
        manager: Any = self.server.state._cb_manager
        return manager._cb

    def stop(self) -> None:
        self.server.uvicorn.should_exit = True
        self._thread.join(HANGS)
        assert not self._thread.is_alive()

    def ask(self, text: str, new: int, client: openai.OpenAI | None = None) -> tuple[str | None, int]:
        """The whole answer to a text, and how many tokens it has."""
        answer: Any = (client or self.client).chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": text}], max_tokens=new, temperature=0
        )
        return answer.choices[0].message.content, answer.usage.completion_tokens

    def stream(self, text: str, new: int, client: openai.OpenAI | None = None) -> Any:
        return (client or self.client).chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": text}],
            max_tokens=new,
            temperature=0,
            stream=True,
        )

    def settle(self) -> None:
        """Wait until no request is left, and check that all blocks are free or kept for their content."""
        end = time.monotonic() + HANGS
        while self.engine.batch_processor.has_pending_requests() or not self.engine.cancel_queue.empty():
            assert time.monotonic() < end, "a request is left"
            time.sleep(0.05)
        check_nothing_is_held(self.engine.cache)
        assert not self.engine.output_router.result_handlers
        assert self.engine.output_router.output_queue.empty()


@pytest.fixture(scope="module")
def running(tiny_model_folder: Path) -> Iterator[Running]:
    server = Running(tiny_model_folder)
    yield server
    server.stop()


def collected(stream: Any) -> tuple[str, str, int]:
    """Text, reason of the end and number of tokens of a stream."""
    text, reason, tokens = "", "", 0
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason or reason
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return text, reason, tokens


def test_it_serves_int8_blocks(running: Running) -> None:
    assert running.ask("hello", 7)[1] == 7
    assert isinstance(running.engine, PagedInt8BatchingManager)
    assert [model.id for model in running.client.models.list()] == [running.model]
    running.settle()


def test_two_clients_stream_at_once(running: Running) -> None:
    texts = ["first " * 5, "second " * 8]
    streams = [running.stream(text, 40, client_of(running.port)) for text in texts]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(collected, streams))
    assert [(reason, tokens) for _, reason, tokens in results] == [("length", 40)] * 2
    assert results[0][0] != results[1][0]
    running.settle()


def test_the_blocks_of_a_client_that_hangs_up_come_back(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of its answer: the engine waits for the client to be gone, and a little later for the server to
    have cancelled the request."""
    assert running.ask("are you there?", 5)[1] == 5
    engine, closed, cancelled, tokens = running.engine, threading.Event(), threading.Event(), []
    deliver, cancel = engine.output_router.deliver, engine.cancel_request

    def delivering(output: Any) -> None:
        tokens.append(len(output.generated_tokens))
        if len(tokens) > 3:
            assert closed.wait(HANGS)
        if len(tokens) > 20:
            assert cancelled.wait(HANGS)
        deliver(output)

    def cancelling(request_id: str) -> None:
        cancel(request_id)
        cancelled.set()

    monkeypatch.setattr(engine.output_router, "deliver", delivering)
    monkeypatch.setattr(engine, "cancel_request", cancelling)
    client = client_of(running.port)
    stream = running.stream("I will not wait for the end. " * 3, 400, client)
    next(stream)
    stream.close()
    client.close()
    closed.set()
    assert cancelled.wait(HANGS)
    running.settle()
    assert max(tokens) < 100
    monkeypatch.undo()
    assert running.ask("are you there?", 5)[1] == 5


@pytest.mark.parametrize(("text", "new"), [("long " * 200, 5), ("short", 1000)], ids=["its prompt", "its answer"])
@pytest.mark.parametrize("streaming", [False, True], ids=["at once", "streamed"])
def test_a_request_that_is_too_long_is_refused_at_once(running: Running, text: str, new: int, streaming: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=r"tokens and may get \d+ new ones, but all blocks") as refusal:
        (running.stream if streaming else running.ask)(text, new)
    assert refusal.value.status_code == 400
    assert refusal.value.code == "context_length_exceeded"
    running.settle()


def test_a_prompt_without_tokens_is_refused(running: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="the prompt is empty") as refusal:
        running.client.completions.create(model=running.model, prompt="", max_tokens=5, temperature=0)
    assert refusal.value.code == "invalid_prompt"
    running.settle()


def test_a_number_of_tokens_that_no_request_has_is_refused_before_the_start(tiny_model_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"max_request_tokens must be a whole number of at least 2, .* got 0"):
        Server(ServerOptions(str(tiny_model_folder), "127.0.0.1", 0, "cpu", None, 0, POOL))


@pytest.mark.parametrize("first", ["at once", "streamed"])
@pytest.mark.parametrize("second", ["at once", "streamed"])
def test_two_requests_at_once_with_the_id_of_a_client(
    running: Running, first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is refused, and the first one gets its whole answer; then the id can be given again."""
    assert running.ask("are you there?", 5)[1] == 5
    engine, has_begun, go_on = running.engine, threading.Event(), threading.Event()
    step = engine._generation_step

    def held() -> None:
        has_begun.set()
        assert go_on.wait(HANGS)
        step()

    monkeypatch.setattr(engine, "_generation_step", held)
    mine = client_of(running.port).with_options(default_headers={"X-Request-Id": "mine"})

    def asked(how: str) -> int:
        if how == "streamed":
            return collected(running.stream("one", 30, mine))[2]
        return running.ask("one", 30, mine)[1]

    with ThreadPoolExecutor(1) as pool:
        try:
            answer = pool.submit(asked, first)
            assert has_begun.wait(HANGS)
            with pytest.raises(openai.ConflictError, match="a request with the id 'mine' is under way") as refusal:
                asked(second)
            assert refusal.value.code == "request_id_taken"
        finally:
            go_on.set()
        assert answer.result(HANGS) == 30
    assert asked(second) == 30
    running.settle()


def test_what_cannot_be_served_is_refused_before_the_start(tiny_model_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        Server(ServerOptions(str(tiny_model_folder), "127.0.0.1", taken.getsockname()[1], "cpu", None, None, POOL))
    with pytest.raises(ValueError, match="page_size must be a multiple of 16"):
        Server(ServerOptions(str(tiny_model_folder), "127.0.0.1", 0, "cpu", None, None, {"page_size": 24}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-blocks", "1000000000"], r"num_blocks=1000000000: .* have no room: .* ask for at most \d+ blocks"),
        (["--max-batch-tokens", "1000000000000"], "make max_batch_tokens smaller or that share larger"),
        (["--max-memory-percent", "0.000000001"], "max_memory_percent=1e-09"),
        (["--max-memory-percent", "60"], "max_memory_percent must be a share between 0 and 1, got 60"),
    ],
    ids=["more blocks than there is memory", "steps that leave no memory", "no share", "percent for a share"],
)
def test_the_command_ends_at_once_where_the_engine_could_not_start(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    """And not with the first request; nothing of the memory is taken."""
    assert cli.main(["serve", str(tiny_model_folder), "--port", "0", "--device", "cpu", *options]) == 1
    assert re.search(said, capsys.readouterr().err)


def test_what_the_scheduler_refuses_is_told_before_the_start(tiny_model_folder: Path) -> None:
    options = ServerOptions(str(tiny_model_folder), "127.0.0.1", 0, "cpu", None, None, POOL | {"safety_margin": 3})
    with pytest.raises(ServerError, match=r"cannot be served: Got safety_margin = 3"):
        Server(options)


def test_a_full_pool_lets_requests_wait_and_loses_none(running: Running) -> None:
    """Twelve requests of 350 tokens share room for 640: each gets its whole answer."""
    texts = [f"{i} bottles of milk, " * 8 for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda text: running.ask(text, 150, client_of(running.port)), texts))
    assert [tokens for _, tokens in together] == [150] * 12
    running.settle()


def test_sigterm_lets_open_answers_end_and_takes_no_more(tiny_model_folder: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "hf_int8_paged", "serve", str(tiny_model_folder), "--port", str(port)]
    options = ["--num-blocks", "40", "--page-size", "16", "--max-batch-tokens", "256"]
    server = subprocess.Popen(
        [*command, *options], env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, text=True
    )
    try:
        client = wait_for(port, lambda: server.poll() is None)
        stream = client.chat.completions.create(
            model=str(tiny_model_folder),
            messages=[{"role": "user", "content": "count"}],
            max_tokens=400,
            temperature=0,
            stream=True,
        )
        next(iter(stream))
        server.send_signal(signal.SIGTERM)
        _, reason, tokens = collected(stream)
        assert (reason, tokens) == ("length", 400)
        server.wait(HANGS)
        assert server.returncode == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
    finally:
        server.kill()
        server.communicate()
