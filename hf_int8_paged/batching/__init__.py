"""Many requests at once: transformers' engine for continuous batching over int8 blocks.

Importing this package registers the attention implementation ``"int8_paged_batching"``, which managers set by
themselves.
"""

from .cache import PagedInt8AttentionCache
from .centers import key_centers
from .entry import generate_batch, int8_batching
from .manager import PagedInt8BatchingManager
from .refusals import PromptError, RequestIdTakenError, RequestTooLongError

__all__ = [
    "PagedInt8AttentionCache",
    "PagedInt8BatchingManager",
    "PromptError",
    "RequestIdTakenError",
    "RequestTooLongError",
    "generate_batch",
    "int8_batching",
    "key_centers",
]
