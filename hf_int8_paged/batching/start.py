"""What would stop the engine when it starts, known before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from .cache import PagedInt8AttentionCache
from .manager import PagedInt8BatchingManager


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
