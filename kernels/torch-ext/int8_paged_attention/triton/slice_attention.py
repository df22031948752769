"""Attention over a slice of dense keys and values, and the logarithm of its weights' sum, by PyTorch's kernels."""

from __future__ import annotations

import functools
import inspect

import torch
from torch.backends.cuda import is_flash_attention_available
from torch.nn.attention import varlen


@functools.cache
def flash_attention_serves(device: torch.device) -> bool:
    """Whether this PyTorch's flash attention takes sequences whose lengths are on the device."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and {"seqused_k", "return_aux"} <= inspect.signature(varlen.varlen_attn).parameters.keys()
    )


def attend_slice(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, stop: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all rows over places ``first`` to ``stop`` of a slice, each sequence's own.

    Args:
        rows: queries, scale included, ``[batch, rows, num_kv_heads, head_dim]``.
        keys: ``[batch, places, num_kv_heads, head_dim]`` of the same dtype, without NaN where no token is.
        values: the same.
        first: int32 ``[batch]``.
        stop: int32 ``[batch]``, at least ``first``.

    Returns:
        Means of values, of the rows' shape and dtype, and float32 ``[batch, rows, num_kv_heads]`` logarithms of the
        sums of weights; 0 and -inf where ``first == stop``.
    """
    attend = in_flash_attention if rows.device.type == "cuda" else on_the_cpu
    means, logs = attend(rows, keys, values, first, stop)
    empty = (first == stop).view(-1, 1, 1)
    return means.masked_fill(empty.unsqueeze(-1), 0.0), logs.masked_fill(empty, -torch.inf)


def in_flash_attention(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, stop: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_slice` on a GPU, but for sequences that see nothing."""
    (batch, count, heads, _), places = rows.shape, keys.shape[1]
    steps = torch.arange(batch + 1, dtype=torch.int32, device=rows.device)
    means, logs = varlen.varlen_attn(
        rows.flatten(0, 1),
        keys.flatten(0, 1),
        values.flatten(0, 1),
        steps * count,
        steps * places + torch.nn.functional.pad(first, (0, 1)),
        count,
        places,
        return_aux=varlen.AuxRequest(lse=True),
        scale=1.0,
        seqused_k=stop - first,
    )
    # Heads come first in the kernel's answer, last in PyTorch's documentation of it; rows are far more than heads.
    logs = logs.t() if len(logs) == heads else logs
    return means.view(rows.shape), logs.reshape(batch, count, heads)


def on_the_cpu(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, stop: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_slice` beside interpreted kernels, but for sequences that see nothing."""
    (batch, count, heads, _), places = rows.shape, keys.shape[1]
    place = torch.arange(places, device=rows.device)
    seen = (place >= first.unsqueeze(1)) & (place < stop.unsqueeze(1))
    bias = torch.zeros(seen.shape, dtype=rows.dtype).masked_fill(~seen, -torch.inf)
    means, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (rows, keys, values)),
        attn_mask=bias.view(batch, 1, 1, places).expand(-1, heads, count, -1),
        scale=1.0,
    )
    return means.transpose(1, 2), logs.transpose(1, 2)
