"""``hf-int8-paged chat``: a conversation with a server, or with a model in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Protocol

from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from ..batching import PagedInt8BatchingManager

#: Tokens of all turns that a conversation in this process may have.
_CONTEXT = 8192


class ChatError(RuntimeError):
    """There is no one to talk to; the message says why."""


class Partner(Protocol):
    """Whoever answers."""

    def reply(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """Pieces of the answer to a conversation, as they come."""


def converse(partner: Partner) -> int:
    """Read turns from standard input and print answers, until the input ends. Returns the exit status, 0."""
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        answer = ""
        for piece in partner.reply(messages):
            answer += piece
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


class OverHttp:
    """A server with OpenAI's interface.

    Args:
        url: its address, with ``/v1``.
        model: name of the model there; None: the only one.
        max_new_tokens: of an answer.

    Raises:
        ChatError: the package openai is missing, or no server answers.
    """

    def __init__(self, url: str, model: str | None, max_new_tokens: int):
        try:
            import openai
        except ImportError as error:
            raise ChatError(
                f"{error}; install what chat with a server needs: pip install 'hf-int8-paged[serve]'"
            ) from error
        self._error: type[Exception] = openai.APIError
        self._client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        self._model, self._most, self._url = model, max_new_tokens, url

    def reply(self, messages: list[dict[str, str]]) -> Iterator[str]:
        chosen = {} if self._model is None else {"model": self._model}
        extra: Any = {"stream": True, "max_tokens": self._most, "messages": messages}
        try:
            # The server knows its model; the client's signature wants a name.
            for chunk in self._client.chat.completions.create(**({"model": None} | chosen | extra)):
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content
        except self._error as error:
            raise ChatError(f"{self._url}: {error}") from error


class InProcess:
    """A model in this process, whose earlier turns stay in its blocks: each answer reads only what is new.

    Args:
        model: name on the hub, or folder; None: the demo's.
        device: such as ``"cpu"``; None: the accelerator if there is one.
        dtype: name of the weights' dtype; None: the checkpoint's.
        max_new_tokens: of an answer.
    """

    def __init__(self, model: str | None, device: str | None, dtype: str | None, max_new_tokens: int):
        from .demo_model import demo_model_folder

        source = model or demo_model_folder()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", device_map=device or "auto")
        context = min(_CONTEXT, getattr(loaded.config.get_text_config(), "max_position_embeddings", _CONTEXT))
        page = 64
        self._manager = PagedInt8BatchingManager(
            loaded,
            GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=_end(loaded)),
            ContinuousBatchingConfig(
                page_size=page, num_blocks=-(-context // page), max_batch_tokens=512, max_requests_per_batch=1
            ),
            max_request_tokens=context,
        )
        self._most = max_new_tokens

    def __enter__(self) -> InProcess:
        self._manager.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.stop(hard_stop=True)
        self._manager.destroy()

    def reply(self, messages: list[dict[str, str]]) -> Iterator[str]:
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids
        name = self._manager.add_request(ids, streaming=True, max_new_tokens=self._most)
        assert name is not None, "the engine runs until the conversation ends"
        shown = ""
        for result in self._manager.request_id_iter(name):
            if result.error is not None:
                raise ChatError(result.error)
            text = self._tokenizer.decode(result.generated_tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd") or result.is_finished():  # a character that is not whole yet
                yield text[len(shown) :]
                shown = text


def _end(model: Any) -> int | list[int]:
    end = model.generation_config.eos_token_id
    return -1 if end is None else end
