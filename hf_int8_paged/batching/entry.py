"""The shortest ways in: one call, and a context in which the model's own methods take int8 blocks; and what would be
refused there, known before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.requests import GenerationOutput

from .cache import PagedInt8AttentionCache
from .manager import PagedInt8BatchingManager
from .refusals import token_ids

_METHOD = "init_continuous_batching"
_KEPT = "_cached_continuous_batching_manager"


def generate_batch(
    model: PreTrainedModel,
    inputs: list[list[int]],
    generation_config: GenerationConfig | None = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    *,
    int8_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, GenerationOutput]:
    """``model.generate_batch`` over int8 blocks: the same arguments and results. Where one of the prompts cannot be
    served, none is begun.

    Args:
        model: a causal language model.
        inputs: token ids of each prompt: lists, arrays or tensors in one dimension.
        generation_config: default the model's own.
        continuous_batching_config: the engine's options, such as ``num_blocks`` or ``max_memory_percent``.
        int8_options: keyword arguments of `PagedInt8BatchingManager`, such as ``centers``.
        kwargs: what ``model.generate_batch`` takes beside these, such as ``max_new_tokens``; not
            ``persistent_manager``, which needs `int8_batching`.

    Returns:
        Of each request's id its result, in the order of ``inputs``.

    Raises:
        ValueError: an option.
        PromptError: a prompt that is empty, or holds other tokens than the model's.
        RequestTooLongError: a prompt that the blocks cannot hold with its new tokens.
        RuntimeError: the engine died before it had a result.

    Example:

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_int8_paged.batching import generate_batch

    >>> config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=2, eos_token_id=None)
    >>> model = LlamaForCausalLM(config).eval()
    >>> results = generate_batch(model, [[1, 2, 3], [4, 5]], max_new_tokens=5)
    >>> [len(result.generated_tokens) for result in results.values()]
    [5, 5]

    ```
    """
    if kwargs.get("persistent_manager"):
        raise ValueError(
            "persistent_manager=True keeps the blocks for the next call; use it inside int8_batching(model)"
        )
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [token_ids(prompt, vocabulary, f"prompt {i}") for i, prompt in enumerate(inputs)]
    with int8_batching(model, **(int8_options or {})):
        init: _Init = vars(model)[_METHOD]
        init.prompts, init.max_new_tokens = prompts, kwargs.get("max_new_tokens")
        generate: Any = model.generate_batch
        results = generate(prompts, generation_config, continuous_batching_config, **kwargs)
        if prompts and not results:  # the engine's generate_batch logs what was raised in it, and goes on
            fault = None if init.manager is None else init.manager.background_thread_status.fatal_error
            raise RuntimeError("the engine gave no prompt a result; its log says why") from fault
        return results


@contextmanager
def int8_batching(model: PreTrainedModel, **int8_options: Any) -> Iterator[PreTrainedModel]:
    """Within this context the model's ``generate_batch``, ``continuous_batching_context_manager`` and
    ``init_continuous_batching`` use int8 blocks. Only this one object is changed, and only until the context ends, when
    a manager that was kept (``persistent_manager=True``) is destroyed too.

    Args:
        model: a causal language model.
        int8_options: keyword arguments of `PagedInt8BatchingManager`, such as ``centers``.

    Raises:
        ValueError: the model keeps a manager with 16-bit pages, or is within such a context already.
    """
    if isinstance(vars(model).get(_METHOD), _Init):
        raise ValueError("the model is within int8_batching already")
    if getattr(model, _KEPT, None) is not None:
        raise ValueError(
            "the model keeps a manager of its own; destroy it with model.destroy_cached_continuous_batching_manager()"
        )
    object.__setattr__(model, _METHOD, _Init(model, int8_options))
    try:
        yield model
    finally:
        object.__delattr__(model, _METHOD)
        destroy: Any = model.destroy_cached_continuous_batching_manager
        destroy()


class _Init:
    """``init_continuous_batching`` of a model within `int8_batching`.

    Attributes:
        prompts: what the manager will be asked first, if that is known: it is refused before anything starts.
        max_new_tokens: of these prompts, or None: what the generation config says.
        manager: that was made.
    """

    def __init__(self, model: PreTrainedModel, int8_options: dict[str, Any]):
        self.model, self.int8_options = model, int8_options
        self.prompts: list[list[int]] = []
        self.max_new_tokens: int | None = None
        self.manager: PagedInt8BatchingManager | None = None

    def __call__(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
    ) -> PagedInt8BatchingManager:
        model = self.model
        kept = getattr(model, _KEPT, None)
        if isinstance(kept, PagedInt8BatchingManager):
            kept.switch_to_cb_friendly_attn(model)
            return kept
        config = model.generation_config if generation_config is None else generation_config
        if config.eos_token_id is None:
            config.eos_token_id = -1  # as the engine does: no token ends a text
        manager = PagedInt8BatchingManager(
            model, config, continuous_batching_config, workload_hints, **self.int8_options
        )
        if self.prompts:
            try:
                manager.warmup()  # how long they may be the blocks say
                for prompt in self.prompts:
                    manager.check_length(len(prompt), self.max_new_tokens)
            except BaseException:
                manager.destroy()
                raise
        self.manager = manager
        return manager


def check_start(
    model: PreTrainedModel, config: ContinuousBatchingConfig, generation_config: GenerationConfig | None = None
) -> None:
    """Raise what `PagedInt8BatchingManager` and its `start` would raise, but allocate only one block, and nothing of
    ``cpu_offload_space``, which the engine fits to the host's memory by itself.

    Args:
        model: as it will be served; its key centres are worked out, and remembered.
        config: the engine's options.
        generation_config: default the model's own.

    Raises:
        MemoryError: the blocks have no room.
        ValueError: an option is out of range, or the model has layers that cannot be served.
    """

    def measured(**arguments: Any) -> PagedInt8AttentionCache:
        PagedInt8AttentionCache.check_room(**arguments)
        arguments["continuous_batching_config"] = replace(arguments["continuous_batching_config"], num_blocks=1)
        return PagedInt8AttentionCache(**arguments)

    manager = PagedInt8BatchingManager(model, generation_config, replace(config, cpu_offload_space=0.0))
    try:
        manager._create_batch_processor(measured)
    finally:
        manager.destroy()
