"""`PagedInt8Cache` for the lm-evaluation-harness, as its model type ``hf-int8-paged``.

The arguments are those of the harness and of its model type ``hf``, and ``cache=dynamic`` among the model's arguments
measures the same tasks with the unquantized cache:

    python eval/lm_eval_model.py --model hf-int8-paged --model_args pretrained=FOLDER_OR_NAME --tasks lambada_openai
    python eval/lm_eval_model.py --model hf-int8-paged --model_args pretrained=FOLDER_OR_NAME,cache=dynamic --tasks ...

Log likelihoods are computed as decoding would: after the first tokens, every row attends to quantized keys and values
only. That takes a forward pass per 16 tokens, where the harness takes one for all.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import Cache, DynamicCache

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.kernels import MAX_DECODE_ROWS

CACHES = ("int8", "dynamic")
#: First tokens of a text, which attend to each other in full precision as a prompt does.
PROMPT_TOKENS = 16


@register_model("hf-int8-paged")
class PagedInt8LM(HFLM):
    """The harness's Hugging Face model with a quantized cache.

    Args:
        cache: ``"int8"``, or ``"dynamic"`` for the unquantized one.
        kwargs: those of ``HFLM``.

    Raises:
        ValueError: an unknown cache, or a model that is not a causal language model.
    """

    def __init__(self, cache: str = "int8", **kwargs: Any) -> None:
        if cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
        if cache == "int8":
            kwargs.setdefault("attn_implementation", "int8_paged")
        super().__init__(**kwargs)
        if self.backend != "causal":
            raise ValueError(f"hf-int8-paged serves causal language models, not {self.backend}")
        self._cache = cache

    def _new_cache(self) -> Cache:
        return (PagedInt8Cache if self._cache == "int8" else DynamicCache)(config=self.model.config)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        """Logits ``[batch, tokens, vocabulary]`` of ``inps [batch, tokens]``, read through the cache."""
        cache = self._new_cache()
        chunks = [inps[:, :PROMPT_TOKENS]]
        if inps.shape[1] > PROMPT_TOKENS:
            chunks += inps[:, PROMPT_TOKENS:].split(MAX_DECODE_ROWS, dim=1)
        with torch.inference_mode():
            return torch.cat([self.model(chunk, **{CACHE_ARGUMENT: cache}).logits for chunk in chunks], dim=1)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, **{CACHE_ARGUMENT: self._new_cache()}, **options)


if __name__ == "__main__":
    cli_evaluate()
