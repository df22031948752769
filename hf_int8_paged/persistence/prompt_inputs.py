"""What keys depend on beside the ids of the tokens before them, as far as a config or a cache says."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

from ..block_allocator import HOLE
from ..sequences.growing import GrowingSequences
from .fingerprint import rope_kind, ropes

#: Ids that a picture's, a sound's or a film's own embeddings take the place of.
_PICTURE = re.compile(r"\w*(image|video|audio)_token_(id|index)")
#: Parts of a model that read something else than tokens.
_OTHER_PARTS = re.compile(r"\w*(vision|image|video|audio|speech|vq|codec)\w*")


def picture_ids(config: PreTrainedConfig) -> frozenset[int]:
    """Ids that stand for a picture, a sound or a film: the same for all of them.

    Args:
        config: of the whole model.
    """
    names = {*vars(config), *dir(type(config)), *config.attribute_map}
    values = [getattr(config, name, None) for name in names if _PICTURE.fullmatch(name)]
    found = {x for x in values if isinstance(x, int) and not isinstance(x, bool)}
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            found |= picture_ids(part)
    return frozenset(found)


def unsaid(config: PreTrainedConfig) -> str | None:
    """Why ids alone never tell prompts of this model apart, or None if they may.

    Args:
        config: of the whole model.
    """
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return f"keys of a {config.model_type} decoder depend on the encoder's input too"
    parts: Any = getattr(config, "sub_configs", None) or {}
    if any(_OTHER_PARTS.fullmatch(name) for name in parts) and not picture_ids(config):
        return f"a {config.model_type} model reads pictures or sounds, for which no id stands"
    return None


def length_limit(config: PreTrainedConfig) -> int | None:
    """Tokens beyond which all positions are turned by other angles than in a shorter prompt (RoPE that depends on the
    length), or None.

    Args:
        config: of the decoder.
    """
    limits, own = [], getattr(config, "max_position_embeddings", None)
    for rope in ropes(config):
        if rope_kind(rope) == "longrope":
            limits.append(rope.get("original_max_position_embeddings") or own)
        elif rope_kind(rope) == "dynamic":
            limits.append(own)
    return min((limit for limit in limits if limit is not None), default=None)


def check_one_prompt(sequences: Any, length: int, ids: int) -> None:
    """Refuse what is not one sequence of tokens, as far as a cache knows.

    Args:
        sequences: of the cache.
        length: tokens per sequence.
        ids: how many there are.

    Raises:
        ValueError: the cache is preallocated, empty, of several sequences, longer than the ids, or padded: a sequence
            is known to begin with padding, or to have had whole blocks of it.
    """
    if not isinstance(sequences, GrowingSequences):
        raise ValueError("a preallocated cache is not stored; make one without max_batch_size")
    if sequences.batch_size != 1 or not 0 < length <= ids:
        raise ValueError(
            f"the cache holds {sequences.batch_size or 0} sequences of {length} tokens; a prompt is one sequence with "
            f"the first of the {ids} ids"
        )
    places = sequences.first_tokens
    tables = [sequences.books.state.tables[name] for name, group in sequences.groups.items() if group.window is None]
    if (places is not None and places.first.any()) or any((table.ids == HOLE).any() for table in tables):
        raise ValueError(
            "the cache holds padding, which ids do not tell from tokens; compute the prompt without, and store that"
        )
