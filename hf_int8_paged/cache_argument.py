"""What the installed transformers calls the cache among the arguments of ``generate`` and ``forward``."""

from __future__ import annotations

import inspect

from transformers import GenerationMixin

#: ``"cache"`` since transformers 5.24, ``"past_key_values"`` before; the result of ``forward`` has it under the same
#: name. The newer releases take the older name too, with a warning; the older ones refuse the newer name.
CACHE_ARGUMENT: str = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
