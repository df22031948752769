"""``hf-int8-paged serve``: transformers' own server, OpenAI-compatible, with continuous batching over int8 blocks."""

from __future__ import annotations

import copy
import inspect
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from ..batching import PromptError, RequestIdTakenError, RequestTooLongError, int8_batching
from ..batching.engine import check_engine_options
from ..batching.entry import check_start
from ..batching.refusals import check_most


class ServerError(RuntimeError):
    """The server cannot start; the message says what is missing."""


@dataclass
class ServerOptions:
    """What the command takes.

    Attributes:
        model: name on the hub, or folder.
        host: address to listen on.
        port: likewise; 0 takes a free one.
        device: such as ``"cpu"``; None: transformers' choice.
        dtype: name of the weights' dtype; None: the checkpoint's.
        max_request_tokens: most tokens of a request, new ones included; None: the model's context.
        batching: options of the engine, as `ContinuousBatchingConfig` names them; None counts as not given.
    """

    model: str
    host: str
    port: int
    device: str | None
    dtype: str | None
    max_request_tokens: int | None
    batching: dict[str, Any]


class Server:
    """A server and its model, loaded.

    Args:
        options: of the command.

    Attributes:
        port: that clients connect to; they wait until `run` answers.

    Raises:
        ServerError: the packages of ``hf-int8-paged[serve]`` are missing, or the engine could not start: there is no
            room for its blocks, say.
        OSError: the port is taken, or the model cannot be loaded.
        ValueError: an option of the engine that int8 blocks cannot honour, or the model cannot be loaded.
    """

    def __init__(self, options: ServerOptions):
        try:
            import uvicorn
            from transformers.cli.serving.model_manager import ModelManager
            from transformers.cli.serving.server import build_server
            from transformers.cli.serving.utils import GenerationState
        except ImportError as error:
            raise ServerError(f"{error}; install what the server needs: pip install 'hf-int8-paged[serve]'") from error
        given = {name: value for name, value in options.batching.items() if value is not None}
        engine = ContinuousBatchingConfig(**given)
        check_engine_options(engine)
        check_most(options.max_request_tokens)
        self._socket = socket.create_server((options.host, options.port), family=_family(options.host))
        self.port = self._socket.getsockname()[1]
        self.state = GenerationState(continuous_batching=True, cb_config=engine)
        manager = ModelManager(
            device=options.device or "auto", dtype=options.dtype or "auto", force_model=options.model
        )
        self.model, _ = manager.load_model_and_processor(manager.process_model_name(options.model))
        try:
            check_start(self.model, engine, _sampling(self.model))
        except (ValueError, MemoryError, NotImplementedError) as error:
            self._socket.close()
            raise ServerError(f"{options.model} cannot be served: {error}") from error
        self._limit = _context(self.model) if options.max_request_tokens is None else options.max_request_tokens
        # transformers lists what the hub's cache holds; this server has one model.
        manager.get_gen_models = lambda *_: [{"id": options.model, "object": "model"}]  # type: ignore[assignment]
        handlers = _handlers(inspect.signature(build_server).parameters, manager, self.state)
        app = build_server(manager, generation_state=self.state, **handlers)
        for kind in _REFUSALS:
            app.add_exception_handler(kind, _refused)
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="warning"))

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Then no connection is taken any more, and those that are open get all of their
        answers."""
        with _no_second_signal(), int8_batching(self.model, max_request_tokens=self._limit):
            try:
                self.uvicorn.run(sockets=[self._socket])
            finally:
                self.state.shutdown()
                self._socket.close()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@contextmanager
def _no_second_signal() -> Iterator[None]:
    """uvicorn raises a signal that it has caught once more when it is done, which would end the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _handlers(parameters: Any, manager: Any, state: Any) -> dict[str, Any]:
    """The handlers that the installed release's server asks for, by the names of its parameters."""
    from transformers.cli.serving import chat_completion, completion, response, transcription

    kinds = {
        "chat_handler": chat_completion.ChatCompletionHandler,
        "completion_handler": completion.CompletionHandler,
        "response_handler": response.ResponseHandler,
        "transcription_handler": transcription.TranscriptionHandler,
    }
    if "systemone_handler" in parameters:
        from transformers.cli.serving import systemone

        kinds["systemone_handler"] = systemone.SystemOneHandler
    return {name: kind(manager, state) for name, kind in kinds.items()}


#: Status and code of what a request is refused with. OpenAI's clients try again a little later after a 409.
_REFUSALS: dict[type[Exception], tuple[int, str]] = {
    PromptError: (400, "invalid_prompt"),
    RequestIdTakenError: (409, "request_id_taken"),
    RequestTooLongError: (400, "context_length_exceeded"),
}


async def _refused(_request: Any, error: Exception) -> Any:
    """A refusal in the form in which OpenAI's clients expect it."""
    from fastapi.responses import JSONResponse

    status, code = _REFUSALS[type(error)]
    said = {"message": str(error), "type": "invalid_request_error", "code": code}
    return JSONResponse({"error": said}, status_code=status)


def _sampling(model: PreTrainedModel) -> GenerationConfig:
    """What a request may ask for: the engine leaves more memory free for those that sample."""
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    config.update(do_sample=True, temperature=0.5)
    return config


def _context(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
