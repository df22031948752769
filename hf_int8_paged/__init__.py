"""A paged INT8 KV cache for Hugging Face Transformers.

Importing the package registers the attention implementation ``"int8_paged"`` with transformers, lets its
``"flex_attention"`` read the cache's lazy views, and changes nothing else.
"""

from .cache import PagedInt8Cache
from .pool import CacheFullError, PagedInt8Pool
from .seam.attention import register as _register

__all__ = ["CacheFullError", "PagedInt8Cache", "PagedInt8Pool"]
__version__ = "0.1.0"

_register()
