"""The attention function of continuous batching over int8 blocks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from ..kernels import Scoring
from .cache import PagedInt8AttentionCache

#: The name that models are switched to while a manager serves them. No mask function has it, so that none is made:
#: every row sees the tokens of its own request, up to its own.
NAME = "int8_paged_batching"


def int8_paged_batching_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    cache: Any = None,
    int8_paged_batch: Any = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' ``AttentionInterface`` in a step of `PagedInt8BatchingManager`.

    Args:
        module: the model's attention module.
        query: ``[1, num_q_heads, total_rows, head_dim]``: the rows of all requests one after the other.
        key: ``[1, num_kv_heads, total_rows, head_dim]``, the new tokens'.
        value: likewise.
        attention_mask: must be None.
        dropout: must be 0.
        scaling: factor on q.k, default ``head_dim ** -0.5``.
        softcap: bound on the scores.
        s_aux: attention sink logits ``[num_q_heads]``.
        cache: the engine's cache, before transformers 5.24.
        int8_paged_batch: the same, from 5.24 on.
        others: what masks and lengths say already, and what makes no difference.

    Returns:
        ``[1, total_rows, num_q_heads, head_dim]``, and ``None`` for the weights.

    Raises:
        RuntimeError: not in a step of the manager.
        NotImplementedError: the model changes scores in a way that the kernels do not know.
    """
    cache = cache if int8_paged_batch is None else int8_paged_batch
    if not isinstance(cache, PagedInt8AttentionCache):
        raise RuntimeError(
            f"attn_implementation={NAME!r} serves continuous batching only, and a manager sets it by itself; a model "
            'that is used otherwise takes model.set_attn_implementation("int8_paged"), after the manager has stopped'
        )
    unknown = [name for name in ("position_bias", "sinks", "indices", "block_indices") if others.get(name) is not None]
    if unknown or attention_mask is not None or dropout:
        what = unknown or (["attention_mask"] if attention_mask is not None else ["dropout"])
        raise NotImplementedError(
            f"{type(module).__name__} attends with {', '.join(what)}, which int8 continuous batching does not know; "
            "generate with PagedInt8Cache serves it"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scale, softcap, s_aux)
    return cache.attend(module.layer_idx, query, key, value, scoring), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, int8_paged_batching_attention)
