"""What a request must be, known before the engine has it: one that it cannot serve would stop it, and all others."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any


class RequestTooLongError(ValueError):
    """A request that can never be served: it has more tokens than it may, or than all blocks hold."""


class PromptError(ValueError):
    """A prompt without tokens, or with something else than the model's."""


class RequestIdTakenError(ValueError):
    """A request with the id of one that is under way, or whose results nobody has taken."""

    def __init__(self, request_id: str):
        super().__init__(
            f"a request with the id {request_id!r} is under way; wait for its end and take its results, cancel it and "
            "wait for the engine's next steps, or give another id"
        )


def token_ids(prompt: Iterable[Any], vocabulary: int, called: str = "the prompt") -> list[int]:
    """A prompt's tokens as the engine takes them.

    Args:
        prompt: whole numbers, ``[tokens]``: a list, an array or a tensor.
        vocabulary: how many tokens the model knows.
        called: how an error names the prompt.

    Raises:
        PromptError: no tokens, or something else than tokens of the model.
    """
    shape = getattr(prompt, "shape", None)
    if shape is not None and len(shape) != 1:
        raise PromptError(f"{called} has the shape {list(shape)}; each prompt must be token ids in one dimension")
    try:
        ids = [operator.index(token) for token in (prompt if shape is None else prompt.tolist())]  # type: ignore[attr-defined]
    except TypeError as error:
        raise PromptError(f"{called} must be token ids, a list of whole numbers: {error}") from error
    if not ids:
        raise PromptError(f"{called} is empty; a request needs at least one token")
    for wrong in (min(ids), max(ids)):
        if not 0 <= wrong < vocabulary:
            raise PromptError(f"{called} has the token id {wrong}; the model knows 0 to {vocabulary - 1}")
    return ids


def check_most(max_request_tokens: Any) -> None:
    """Raise ``ValueError`` unless this is None, or as many tokens as a request has at least: one, and a new one."""
    if max_request_tokens is None:
        return
    whole = isinstance(max_request_tokens, int) and not isinstance(max_request_tokens, bool)
    if not whole or max_request_tokens < 2:
        raise ValueError(
            f"max_request_tokens must be a whole number of at least 2, for one token and a new one, or None; got "
            f"{max_request_tokens!r}"
        )


def children(request_id: str, count: int) -> list[str]:
    """The ids that the engine gives to the other sequences of a request, ``count`` of them."""
    return [f"{request_id}__child#{i}" for i in range(count)]
