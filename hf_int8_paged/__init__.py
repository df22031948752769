"""A paged INT8 KV cache for Hugging Face Transformers."""

__all__: list[str] = []
__version__ = "0.1.0"
