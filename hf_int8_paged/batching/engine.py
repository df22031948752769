"""What this package takes from transformers' engine for continuous batching, in every release that is supported.

The engine makes its cache, and the cache its allocators, by names of their modules. To have other ones made, this
package runs the installed release's own functions with these names bound to its classes: nothing of transformers is
copied or changed.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import transformers

#: Releases whose engine was read and tested.
TESTED = "5.18 to 5.24"


def seeing(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """A copy of a function that sees other objects under global names of its module.

    Args:
        function: a plain function of transformers.
        names: global names that it uses, and what they mean to the copy.

    Raises:
        NotImplementedError: the function does not use one of the names.
    """
    missing = sorted(set(names) - set(getattr(getattr(function, "__code__", None), "co_names", ())))
    if missing:
        raise NotImplementedError(
            f"transformers {transformers.__version__}: {function.__qualname__} does not use {', '.join(missing)}; "
            f"int8 continuous batching was made for {TESTED}"
        )
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
