"""The ``int8_paged`` attention function: routing only.

=====================================  =================================================================
keys and values                        route
=====================================  =================================================================
first prompt                           SDPA on the fresh full-precision keys and values
few rows over a context                attention straight from the int8 blocks
long chunk over a context              attention over the int8 blocks and the fresh chunk, if the backend has a kernel
                                       for it (``LONG_CHUNKS``); else SDPA on the dequantized past and the fresh chunk
unusual mask, or not our cache         SDPA on dense keys and values: same answer, slower
=====================================  =================================================================
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..kernels import MAX_DECODE_ROWS, Scoring
from .dense_attention import dense_attention
from .mask_function import Pattern, int8_paged_mask, pattern_of
from .masks import causal_rows, with_bias, with_selected_keys
from .once import hint_at_another_cache, no_weights
from .views import Content, PagedView, layer_of, part_of_the_step, reading_views, refusing_views

#: The name under which both functions are registered: ``attn_implementation="int8_paged"``.
NAME = "int8_paged"


@part_of_the_step
def int8_paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    cache: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for transformers' ``AttentionInterface`` that reads `PagedInt8Cache` without dequantizing it.

    These are the arguments by which the models of transformers change what attention computes. Whatever else comes is
    carried along by a caller of the model, as a trainer's ``num_items_in_batch``, and changes nothing.

    Args:
        module: the model's attention module.
        query: ``[batch, num_q_heads, q_len, head_dim]``, of any float dtype. Under autocast it counts as autocast's.
        key: what the cache returned, ``[batch, num_kv_heads, tokens, head_dim]``: a lazy view or a tensor.
        value: likewise.
        attention_mask: what `int8_paged_mask` returned, or any mask that SDPA takes.
        dropout: dropout probability on the weights; only dense routes apply it.
        scaling: factor on q.k, default ``head_dim ** -0.5``.
        is_causal: whether rows are causal among themselves; default the module's own attribute.
        softcap: bound on the scores.
        s_aux: attention sink logits ``[num_q_heads]``.
        position_bias: additive bias on the scores.
        sinks: attention sink logits of each row, ``[batch, num_q_heads, q_len, 1]``.
        indices: of sparse attention, the keys that each row may see, ``[batch, q_len, selected]``.
        block_indices: likewise, blocks of keys as the module's own indexer numbers them.
        position_ids: positions of the rows; only ``block_indices`` needs them, masks hold all else that they say.
        output_attentions: whether the model is asked for weights. There are none; a warning says so once.
        cache: in continuous batching the cache that the function itself should fill; refused.

    Returns:
        ``[batch, q_len, num_q_heads, v_head_dim]``, and ``None`` for the weights, which are never formed.

    Where it raises, the cache is back at what it held before this forward pass.

    Raises:
        NotImplementedError: continuous batching.
        RuntimeError: the cache has dropped or moved tokens since ``key`` and ``value`` were made; or, where SDPA
            computes, the dtypes of query, keys and values differ.
    """
    if cache is not None and not isinstance(cache, Cache):
        raise NotImplementedError(
            "int8_paged does not serve continuous batching with the engine's own cache "
            f"({type(cache).__name__}); hf_int8_paged.batching.generate_batch brings one of int8 blocks"
        )
    if output_attentions:
        no_weights()
    if _autocasts(query) and query.dtype != torch.float64:
        query = query.to(torch.get_autocast_dtype(query.device.type))
    if indices is not None:
        assert attention_mask is not None, "sparse attention asks for a mask always"
        attention_mask = with_selected_keys(attention_mask, indices)
    if block_indices is not None:
        assert position_ids is not None, "block-sparse attention hands over positions always"
        size = (key.shape[2], query.dtype, query.device)
        build_block_mask: Any = module.indexer.build_block_mask  # type: ignore[union-attr]
        attention_mask = build_block_mask(block_indices, attention_mask, *size, position_ids.expand(len(query), -1))
    window = None
    # Kernels have no gradients.
    learns = torch.is_grad_enabled() and (query.requires_grad or (s_aux is not None and s_aux.requires_grad))
    if torch.compiler.is_compiling():
        if isinstance(key, PagedView):
            # A cache that grows: what reads its block tables is no part of a graph.
            return _attention_outside_graphs(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
                softcap=softcap, s_aux=s_aux, position_bias=position_bias, sinks=sinks,
            )  # fmt: skip
        layer = layer_of(key, value)
        if layer is not None and query.shape[2] > 1 and attention_mask is None:
            attention_mask = layer.rows_that_see(query.shape[2])
        plain = position_bias is None and sinks is None and not dropout and not learns
        if layer is not None and plain and query.shape[2] == 1:
            mask = None if attention_mask is None else attention_mask[:, 0, 0].expand(query.shape[0], -1)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            of_all_heads = attention_mask is None or attention_mask.shape[1] == 1
            if of_all_heads and (mask is None or mask.dtype == torch.bool):
                return layer.attend_on_device(query, Scoring(scale, softcap, s_aux, mask)), None
    elif isinstance(key, PagedView) and isinstance(value, PagedView):
        content = key.content
        window = content.layer.window
        paired = value.content == content and value.is_values > key.is_values
        pattern = pattern_of(attention_mask)
        if paired and position_bias is None and sinks is None and not dropout and not learns:
            causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
            key_mask = _as_key_mask(attention_mask, pattern, query, key, causal)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            if key_mask is not None and content.fresh is None and query.shape[2] <= MAX_DECODE_ROWS:
                content.check_epoch()
                scoring = plain_scoring(scale, softcap)
                if s_aux is not None or key_mask[0] is not None:
                    scoring = Scoring(scale, softcap, s_aux, *key_mask)
                return content.layer.attend(query, scoring, content.stop), None
            if key_mask is not None and content.fresh is not None and _may_extend(content, query):
                content.check_epoch()
                fresh = content.fresh[0].to(query.dtype), content.fresh[1].to(query.dtype)
                scoring = Scoring(scale, softcap, s_aux, *key_mask)
                return content.layer.attend(query, scoring, content.stop, fresh), None
        columns, (key, value) = key.shape[2], (key.tokens(), value.tokens())
        # Of a preallocated cache they go on behind the newest token.
        if attention_mask is not None and attention_mask.shape[-1] == columns:
            attention_mask = attention_mask[..., : key.shape[2]]
        if position_bias is not None and position_bias.shape[-1] == columns:
            position_bias = position_bias[..., : key.shape[2]]
    elif key.shape[2] > query.shape[2]:
        hint_at_another_cache(sys._getframe(2))
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    q_len, kv_len = query.shape[2], key.shape[2]
    # Without a mask a chunk over a past sees what the kernels would let it see, and a first prompt all, as in SDPA.
    if attention_mask is None and causal and 1 < q_len < kv_len:
        attention_mask = causal_rows(q_len, kv_len, query.device, window)
    if softcap is None and s_aux is None and sinks is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
        )
    if position_bias is not None:
        if attention_mask is None and causal and q_len > 1:
            attention_mask = causal_rows(q_len, kv_len, query.device)
        attention_mask = with_bias(attention_mask, position_bias)
    sinks = s_aux if sinks is None else sinks
    out = dense_attention(
        query, key, value, attention_mask,
        dropout=dropout, scaling=scaling, causal=causal, softcap=softcap, sinks=sinks,
    )  # fmt: skip
    return out, None


#: `Scoring` of a factor and a softcap alone: all layers of most models share one.
plain_scoring = functools.lru_cache(maxsize=256)(Scoring)

#: The same for keys and values of a cache that grows, within a compiled forward pass: the graph breaks here.
_attention_outside_graphs = torch.compiler.disable(int8_paged_attention)


#: Devices that have autocast, asked once: torch 2.11 cannot ask inside a graph.
_WITH_AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "xpu") if torch.amp.is_autocast_available(kind))


def _autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device; some devices have none."""
    device_type = x.device.type
    known = device_type in _WITH_AUTOCAST or torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def _as_key_mask(
    mask: torch.Tensor | None, pattern: Pattern | None, query: torch.Tensor, key: PagedView, causal: bool
) -> tuple[torch.Tensor | None, int] | None:
    """The mask over keys, bool ``[batch, columns]`` or None, and the position of its first column, that make the
    kernels obey ``mask``. None if nothing can."""
    batch, _, q_len, _ = query.shape
    if q_len > 1 and not causal:
        return None
    if mask is None:
        return None, 0
    if q_len == 1 and mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1:] == (1, 1, key.shape[2]):
        # Whatever its pattern, the mask of a single row is a mask over keys.
        return mask[:, 0, 0].expand(batch, -1), key.content.start
    # The kernels see the layer's own window. A mask for other rows or keys is SDPA's to refuse.
    if pattern is None or pattern.window != key.content.layer.window or mask.shape[2:] != (q_len, key.shape[2]):
        return None
    return pattern.padding, 0


def _may_extend(content: Content, query: torch.Tensor) -> bool:
    """Whether the rows are the newest tokens, over a past, the layer's backend has a kernel for that, and the dtypes
    are those that SDPA would take."""
    assert content.fresh is not None
    if not query.shape[2] == content.fresh[0].shape[2] < content.stop or not content.layer.long_chunks:
        return False
    return _autocasts(query) or all(x.dtype == query.dtype for x in content.fresh)


def register() -> None:
    """Make ``attn_implementation="int8_paged"`` known to transformers, and let its other functions meet our views.

    Flex attention hands keys and values to a compiled function, which cannot take a tensor that has no storage; it gets
    tensors. Functions of continuous batching rely on masks that only it makes; they refuse views. What either computes
    with tensors stays as it is.
    """
    AttentionInterface.register(NAME, int8_paged_attention)
    AttentionMaskInterface.register(NAME, int8_paged_mask)
    AttentionInterface.register("flex_attention", reading_views(flex_attention_forward))
    for name, function in AttentionInterface._global_mapping.items():
        if name.startswith("paged|"):
            AttentionInterface.register(name, refusing_views(name, function))
