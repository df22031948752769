"""Messages that a process needs to hear once."""

from __future__ import annotations

import logging
from types import FrameType

from transformers import Cache, EncoderDecoderCache

_said: set[str] = set()


def say_once(level: int, message: str) -> None:
    """Log ``message`` under the package's name, the first time it comes."""
    if message not in _said:
        _said.add(message)
        logging.getLogger("hf_int8_paged").log(level, message)


def dense_read() -> None:
    """Say that another attention implementation reads a dequantized copy."""
    say_once(
        logging.WARNING,
        "PagedInt8Cache is read by another attention implementation, through a dequantized copy: right, but slow. "
        'For the fast path call model.set_attn_implementation("int8_paged").',
    )


def no_weights() -> None:
    """Say that int8_paged has no attention weights to give."""
    say_once(
        logging.WARNING,
        'attn_implementation="int8_paged" never forms attention weights, so output_attentions=True has nothing to '
        'return. Call model.set_attn_implementation("eager") for them: it reads a PagedInt8Cache too, through a '
        "dequantized copy.",
    )


_ANOTHER_CACHE = (
    'attn_implementation="int8_paged" attends to the keys and values of another cache: right, but no memory is saved. '
    "Give generate() or the model a PagedInt8Cache(model.config): past_key_values=..., or cache=... from transformers "
    "5.24 on."
)


def hint_at_another_cache(caller: FrameType) -> None:
    """Say that a cache of another kind is in use, if the attention module that called has one.

    The attention function is not told of the cache. Keys without storage are ours; dense ones with a past may be
    another cache's, but also ours if the module computes on what the cache returned, or no cache's: those of an image,
    or of a prompt of which only the last rows are asked for. The caller's own variables tell.
    """
    if _ANOTHER_CACHE in _said:
        return
    caches = [x for x in caller.f_locals.values() if isinstance(x, Cache)]
    for cache in caches:
        if isinstance(cache, EncoderDecoderCache):
            caches += [cache.self_attention_cache, cache.cross_attention_cache]
    parts = [*caches, *(layer for cache in caches for layer in getattr(cache, "layers", ()))]
    if caches and not any((type(part).__module__ or "").startswith("hf_int8_paged.") for part in parts):
        say_once(logging.WARNING, _ANOTHER_CACHE)
