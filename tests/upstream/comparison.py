"""What is compared, and how far apart it may be: the tolerances, one by one.

=============  ========================================================================================================
name           what may differ by how much, and why
=============  ========================================================================================================
``exact``      Logits under ``eager`` and ``sdpa``, from those of the fake-quantized dense cache under the same
               attention: both hand the same float32 numbers to the same function. 1e-5 of the largest logit, float32
               rounding summed over the layers, as for the coverage table.
``kernel``     Logits under ``int8_paged``, from those of the fake-quantized dense cache under the dense attention. The
               kernels round queries and softmax weights too, and what comes out of one layer may tip the rounding of a
               key in the next. Half of quantization's own effect, as for the coverage table: what a kernel's rounding
               does is small beside what storing in int8 does.
``tipped``     Logits of a preallocated cache under ``eager`` and ``sdpa``. Attention runs over all its positions, the
               oracle's over those that hold something: sums in another order, whose float32 rounding may tip the
               rounding of a key in the next layer by one step. As ``kernel``: one step of one number is small beside
               half a step in all of them.
``router``     As ``kernel``, for mixtures of experts whose router chose another expert for a score that differs that
               little, which changes all that follows. Then the reference kernels, which round as the oracle does, must
               be within ``kernel``.
``candidates`` Logits under ``int8_paged`` of guess-and-verify generation. A rounding may change a guess, and with it
               how tokens are cut into passes; tokens of the first pass are seen in full precision, later ones as
               stored. So a logit lies anywhere between its value with all keys stored and with none: twice the effect.
``score``      The score of a sequence that beam search returns, from the mean of its tokens' log-probabilities with the
               fake-quantized cache. If logits differ by at most b, log-softmax differs by at most 2 b, and so does the
               mean. Which sequences win is not compared where scores may tie.
=============  ========================================================================================================

One shape may differ: how many positions a preallocated layer with a window shows. `StaticCache` shows its ring, of as
many positions as the window; ours shows the positions of the whole sequence, of which it holds the window's.

Tokens need no tolerance of their own. Logits of a row are compared at every step up to the first at which its tokens
differ, that one included: until then both saw the same tokens. If the two logits there are within b, the tokens chosen
from them were within 2 b of each other: a tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.utils import ModelOutput

#: New tokens per sequence. No model has an end-of-sequence token here, so all sequences get as many.
NEW_TOKENS = 8


@dataclass
class Result:
    """What `generate` returned.

    Attributes:
        output: all of it.
        relation: what must hold besides: the result of another call that should be the same.
        in_rows: whether logits of row i belong to sequence i at every step, which beams do not keep.
    """

    output: Any
    relation: Result | None = None
    in_rows: bool = True

    @property
    def tokens(self) -> torch.Tensor:
        """New tokens, ``[rows, NEW_TOKENS]``."""
        return self.output.sequences[:, -NEW_TOKENS:]

    @property
    def logits(self) -> torch.Tensor:
        """``[rows, NEW_TOKENS, vocabulary]``."""
        return torch.stack([step.float() for step in self.output.logits], dim=1)

    @property
    def scores(self) -> torch.Tensor:
        """Of beams, ``[rows]``: the mean of their tokens' log-probabilities."""
        return self.output.sequences_scores


def structure(x: Any) -> Any:
    """Everything about a result but its values: names, lengths, shapes, dtypes, and what a cache holds."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape)
    if isinstance(x, EncoderDecoderCache):
        return structure(x.self_attention_cache), structure(x.cross_attention_cache)
    if isinstance(x, Cache):
        return int(x.get_seq_length()), [_layer_structure(layer) for layer in x.layers]
    if isinstance(x, ModelOutput):
        return {name: structure(value) for name, value in x.items()}
    if isinstance(x, tuple | list):
        return [structure(one) for one in x]
    return x if x is None else type(x).__name__


def _layer_structure(layer: Any) -> Any:
    keys: Any = getattr(layer, "keys", None)
    values: Any = getattr(layer, "values", None)
    if keys is None or not keys.numel():
        return isinstance(layer, LinearAttentionCacheLayerMixin)
    return [(str(x.dtype), *x.shape[:2], layer.is_compileable or x.shape[2], x.shape[3]) for x in (keys, values)]


def largest_difference(ours: Result, oracle: Result) -> float:
    """Of two results that had the same prompts: the largest difference of their logits while a row's tokens are the
    same."""
    same = (ours.tokens == oracle.tokens).long().cumprod(dim=1).bool()
    compared = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], dim=1)
    a, b = ours.logits[compared], oracle.logits[compared]
    # Processors and models set logits to minus infinity, the same in both.
    assert torch.equal(a.isfinite(), b.isfinite()), "not the same logits are finite"
    finite = a.isfinite()
    return (a[finite] - b[finite]).abs().max().item()


def mean_log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``[rows]``, of logits ``[rows, steps, vocabulary]`` and tokens ``[rows, steps]``."""
    return logits.log_softmax(dim=-1).gather(2, tokens[:, :, None])[:, :, 0].mean(dim=1)
