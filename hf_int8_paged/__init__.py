"""A paged INT8 KV cache for Hugging Face Transformers.

Importing the package registers the attention implementation ``"int8_paged"`` with transformers, lets its
``"flex_attention"`` read the cache's lazy views, and changes nothing else.
"""

from .cache import PagedInt8Cache
from .full import CacheFullError
from .persistence.saved import CacheFileError
from .planning import plan
from .pool import PagedInt8Pool
from .prompt_store import PromptStore
from .seam.attention import register as _register
from .version import __version__

__all__ = ["CacheFileError", "CacheFullError", "PagedInt8Cache", "PagedInt8Pool", "PromptStore", "__version__", "plan"]

_register()
