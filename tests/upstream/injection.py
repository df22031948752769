"""Lets `generate` use a cache of our choice wherever it would make a `DynamicCache` by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedConfig


@contextmanager
def generating_with(make: Callable[[PreTrainedConfig], Cache]) -> Iterator[list[Cache]]:
    """Within this context `generate` uses what ``make`` returns in place of every `DynamicCache` it would make.

    Args:
        make: called with the decoder's config; for an encoder-decoder model twice, for the cache of the sequence itself
            and then for that of cross-attention.

    Yields:
        The caches made, in order; that of an assistant model is among them.
    """
    prepare = GenerationMixin._prepare_cache_for_generation
    made: list[Cache] = []

    def replaced(cache: Cache, config: PreTrainedConfig) -> Cache:
        if isinstance(cache, EncoderDecoderCache):
            return EncoderDecoderCache(
                replaced(cache.self_attention_cache, config), replaced(cache.cross_attention_cache, config)
            )
        if type(cache) is not DynamicCache:
            return cache
        made.append(make(config))
        return made[-1]

    def prepare_ours(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = {name for name, value in model_kwargs.items() if isinstance(value, Cache)}
        result = prepare(self, generation_config, model_kwargs, *args, **kwargs)
        for name, cache in model_kwargs.items():
            if isinstance(cache, Cache) and name not in given:
                model_kwargs[name] = replaced(cache, self.config.get_text_config(decoder=True))
                if generation_config.is_assistant:
                    model_kwargs[name].activate_past_recording()
        return result

    GenerationMixin._prepare_cache_for_generation = prepare_ours  # type: ignore[method-assign]
    try:
        yield made
    finally:
        GenerationMixin._prepare_cache_for_generation = prepare  # type: ignore[method-assign]
