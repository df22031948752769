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
from transformers import ContinuousBatchingConfig

from .pages import BLOCK_SIZE

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


def check_engine_options(config: ContinuousBatchingConfig) -> None:
    """Raise ``ValueError`` for options that int8 blocks cannot honour: other pages than whole blocks of the kernels,
    more than all memory, and steps that are recorded or compiled, as the host makes block tables anew for each."""
    if config.page_size % BLOCK_SIZE:
        raise ValueError(f"page_size must be a multiple of {BLOCK_SIZE} for int8 blocks, got {config.page_size}")
    if config.max_memory_percent is not None and not 0 < config.max_memory_percent <= 1:
        raise ValueError(f"max_memory_percent must be a share between 0 and 1, got {config.max_memory_percent}")
    graphs = config.use_cuda_graph
    asked = {
        "use_cuda_graph": any(graphs) if isinstance(graphs, tuple) else graphs,
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
        "default_compile_level": config.default_compile_level,
        "q_padding_interval_size": config.q_padding_interval_size,
        "kv_padding_interval_size": config.kv_padding_interval_size,
    }
    for name, value in asked.items():
        if value:
            raise ValueError(
                f"{name}={getattr(config, name)!r}: int8 continuous batching makes block tables on the host at every "
                "step, which no graph can hold; leave it out"
            )
