"""Refuse a generation that cannot fit before its first forward pass.

transformers tells a cache that a user passed nothing of how long the generation will be. It does mark that cache, in
``GenerationMixin._prepare_cache_for_generation``, which has the number of tokens to hold among its arguments; they are
read there. Where a release marks its caches elsewhere, nothing is refused early, and the step that does not fit raises.
"""

from __future__ import annotations

import sys
from typing import Any

from .full import CacheFullError


class UserDefinedMark:
    """The attribute ``_is_user_defined`` that ``generate`` sets on a cache that it was given.

    Setting it raises `CacheFullError` if the cache has a ``max_cache_len`` that is less than what is to be generated.
    """

    def __get__(self, cache: Any, owner: type | None = None) -> bool:
        return cache is not None and cache.__dict__.get("_marked_as_user_defined", False)

    def __set__(self, cache: Any, value: bool) -> None:
        if value:
            caller = sys._getframe(1)
            if caller.f_code.co_name == "_prepare_cache_for_generation":
                drafts = getattr(caller.f_locals.get("generation_config"), "prompt_lookup_num_tokens", None)
                check_room(cache._sequences.max_cache_len, caller.f_locals.get("max_cache_length"), drafts)
        cache.__dict__["_marked_as_user_defined"] = value


def check_room(max_cache_len: int | None, needed: Any, drafts: int | None) -> None:
    """Raise `CacheFullError` if a generation does not fit.

    Args:
        max_cache_len: tokens that fit, or None for any number.
        needed: tokens of the prompt and of the answer, without the last one, which is never stored.
        drafts: tokens that prompt lookup drafts at a time, or None. Two tokens before the end it drafts as many.
    """
    if not isinstance(needed, int) or max_cache_len is None:
        return
    beyond = max((drafts or 0) - 1, 0)
    total = needed + beyond
    if total > max_cache_len:
        and_drafts = f" and, with prompt_lookup_num_tokens={drafts}, drafts beyond the end" if beyond else ""
        raise CacheFullError(
            f"the prompt and max_new_tokens{and_drafts} need {total} tokens per sequence, but max_cache_len is "
            f"{max_cache_len}; shorten the prompt, lower max_new_tokens by {total - max_cache_len} or "
            "make a longer cache"
        )
