"""The server: transformers' tests of its endpoints with continuous batching, with int8 blocks and a tiny model."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import HANGS

from ..test_server import Running, collected


@pytest.fixture(scope="module")
def running(tiny_model_folder: Path) -> Iterator[Running]:
    server = Running(tiny_model_folder)
    yield server
    server.stop()


def ended(text: str) -> str:
    """A text without a last letter of which some bytes are missing; streams hold it back."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}") or "nothing but broken letters"


def test_a_chat_answer_is_one_object(running: Running) -> None:
    answer: Any = running.client.chat.completions.create(
        model=running.model, messages=[{"role": "user", "content": "hello"}], max_tokens=5, temperature=0
    )
    assert answer.id
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert isinstance(choice.message.content, str)
    assert choice.finish_reason == "length"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    running.settle()


def test_a_streamed_chat_is_the_whole_one_in_pieces(running: Running) -> None:
    whole, tokens = running.ask("tell me what you can do", 30)
    text, reason, streamed = collected(running.stream("tell me what you can do", 30))
    assert (ended(text), reason, streamed, tokens) == (ended(str(whole)), "length", 30, 30)
    running.settle()


def turns() -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "my name is Alice"},
        {"role": "assistant", "content": "nice to meet you"},
        {"role": "user", "content": "what is my name?"},
    ]


@pytest.mark.parametrize("way", ["chat", "responses"])
def test_all_turns_of_a_conversation_are_in_the_prompt(running: Running, way: str) -> None:
    """The tiny model knows no names, but each letter of its chat template and of what was said is a token."""
    client: Any = running.client
    if way == "chat":
        said = client.chat.completions.create(model=running.model, messages=turns(), max_tokens=20, temperature=0)
        counts = (said.usage.prompt_tokens, said.usage.completion_tokens)
    else:
        sizes = {"max_output_tokens": 20, "temperature": 0}
        said = client.responses.create(model=running.model, input=turns(), stream=False, **sizes)
        counts = (said.usage.input_tokens, said.usage.output_tokens)
    letters = sum(len(f"<{turn['role']}>{turn['content']}</>") for turn in turns())
    assert counts == (letters + len("<assistant>"), 20)
    running.settle()


def test_a_text_is_completed_whole_and_in_pieces(running: Running) -> None:
    client: Any = running.client
    asked = {"model": running.model, "prompt": "the capital of France is", "max_tokens": 10, "temperature": 0}
    whole = client.completions.create(**asked)
    pieces = list(client.completions.create(**asked, stream=True))
    assert whole.choices[0].finish_reason == pieces[-1].choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 10
    assert ended("".join(piece.choices[0].text for piece in pieces)) == ended(whole.choices[0].text) != ""
    running.settle()


def test_a_response_is_given_whole_and_in_pieces(running: Running) -> None:
    client: Any = running.client
    asked = {"model": running.model, "input": "say hello in a sentence", "max_output_tokens": 15, "temperature": 0}
    whole = client.responses.create(**asked, stream=False)
    events = list(client.responses.create(**asked, stream=True))
    assert whole.status == "completed"
    assert whole.usage.output_tokens == 15
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert ended(text) == ended(whole.output[0].content[0].text) != ""
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    running.settle()


def ask_server(port: int, method: str, path: str, **sent: Any) -> http.client.HTTPResponse:
    """The answer of which nothing is read yet; closing it closes the connection.

    Args:
        port: of the server.
        method: such as ``"POST"``.
        path: likewise.
        sent: a body, and headers.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANGS)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    connection.request(method, path, json.dumps(sent.get("body")), headers | sent.get("headers", {}))
    return connection.getresponse()


@pytest.mark.parametrize("way", ["chat/completions", "responses"])
def test_a_stream_that_is_closed_is_cancelled_by_its_name(running: Running, way: str) -> None:
    """Which the client gives. The next request is served, and no block is held."""
    running.ask("are you there?", 2)
    body: dict[str, Any] = {"model": running.model, "stream": True, "temperature": 0}
    if way == "responses":
        body |= {"input": "count slowly", "max_output_tokens": 500}
    else:
        body |= {"messages": [{"role": "user", "content": "count slowly"}], "max_tokens": 500}
    cancelled: list[str] = []
    engine: Any = running.engine
    cancel, deliver = engine.cancel_request, engine.output_router.deliver

    def delivering(output: Any) -> None:
        if len(output.generated_tokens) > 20:  # so that the answer does not end before
            end = time.monotonic() + HANGS
            while not cancelled and time.monotonic() < end:
                time.sleep(0.001)
        deliver(output)

    engine.output_router.deliver = delivering

    def cancelling(name: str) -> None:
        cancelled.append(name)
        cancel(name)

    engine.cancel_request = cancelling
    try:
        headers = {"X-Request-ID": f"mine {way}"}
        with ask_server(running.port, "POST", f"/v1/{way}", headers=headers, body=body) as answer:
            assert answer.status == 200
            for _ in range(3):
                assert answer.readline()
        end = time.monotonic() + HANGS
        while not cancelled:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert cancelled == [f"mine {way}"]
    finally:
        del engine.cancel_request, engine.output_router.deliver
    assert running.ask("are you there?", 5)[1] == 5
    running.settle()


def test_a_server_whose_engine_has_died_says_so(tiny_model_folder: Path) -> None:
    """503 with the cause for all that come later, and in `/health`. The engine notes its own death just after it has
    failed the request that it died of, so this one may get a 500."""
    server = Running(tiny_model_folder)
    try:
        with ask_server(server.port, "GET", "/health") as answer:
            assert answer.status == 200
        server.ask("are you there?", 2)

        def die() -> None:
            raise RuntimeError("an illegal access to memory")

        server.engine._generation_step = die
        body = {"model": server.model, "messages": turns(), "max_tokens": 2}
        with ask_server(server.port, "POST", "/v1/chat/completions", body=body) as answer:
            assert answer.status in (500, 503)
        server.engine._generation_thread.join(HANGS)
        for _ in range(2):
            with ask_server(server.port, "POST", "/v1/chat/completions", body=body) as answer:
                assert answer.status == 503
                assert "an illegal access to memory" in json.loads(answer.read())["error"]
        with ask_server(server.port, "GET", "/health") as answer:
            assert (answer.status, json.loads(answer.read())["reason"]) == (503, "cb_worker_dead")
    finally:
        server.stop()
