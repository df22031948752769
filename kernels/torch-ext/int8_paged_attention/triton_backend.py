"""The Triton backend: NVIDIA and AMD GPUs, Intel GPUs by Triton's own support, and any device under TRITON_INTERPRET=1.

Append and decode are kernels of their own. Gather and copy are torch's, as in the reference: they serve the paths
that are not taken per token.
"""

from __future__ import annotations

import functools

import torch
import triton

from .conditioning import condition_keys, condition_query, condition_values, restore_output
from .reference import copy, empty, gather
from .storage import KvCacheQuant
from .triton_append import launch_append
from .triton_decode import launch_decode

__all__ = ["NAME", "TILE_ORDER", "append", "copy", "decode", "empty", "gather", "unavailable"]

NAME = "triton"
TILE_ORDER = "v_transposed"
OLDEST_TRITON = (3, 6)
#: Triton decides when a kernel is defined whether it will be interpreted.
INTERPRETED = triton.knobs.runtime.interpret


def unavailable(device: torch.device, block_size: int, head_dim: int, v_head_dim: int) -> str | None:
    """Why this backend cannot serve such a layer, or None if it can."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if device.type == "cpu" and not INTERPRETED:
        return "triton has no compiler for the CPU; TRITON_INTERPRET=1 interprets the kernels, slowly"
    return None


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter has one."""
    if INTERPRETED:
        return 1
    module = torch.get_device_module(device)
    return module.get_device_properties(device).multi_processor_count


def append(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    cache: KvCacheQuant,
    block_table: torch.Tensor,
    context_lens_before: torch.Tensor,
) -> None:
    if not k_new.numel() or not block_table.shape[1]:
        return
    if cache.rotation or cache.key_center is not None:
        k_new = condition_keys(k_new.to(torch.float32), cache)
        v_new = condition_values(v_new.to(torch.float32), cache)
    launch_append(k_new, v_new, cache, block_table, context_lens_before)


def decode(
    out: torch.Tensor,
    q: torch.Tensor,
    cache: KvCacheQuant,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    kv_start: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    key_mask_start: int,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    if not out.numel():
        return
    if not cache.num_blocks or not block_table.shape[1]:
        out.zero_()
        return
    bias = None
    if cache.key_center is not None and (softcap is not None or sinks is not None):
        # Elsewhere the keys' centre moves all scores of a row alike, and softmax does not see it.
        heads = q.to(torch.float32).reshape(q.shape[0], cache.num_kv_heads, -1, *q.shape[2:])
        bias = (scale * (heads @ cache.key_center[:, None, :, None])).reshape(q.shape[:3])
    weighted = out
    if cache.rotation:
        q = condition_query(q.to(torch.float32), cache)
    if cache.rotation or (INTERPRETED and out.dtype == torch.bfloat16):  # the interpreter truncates to bfloat16
        weighted = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    launch_decode(
        weighted, q, cache, block_table, context_lens, scale, kv_start, key_mask, key_mask_start, window, softcap,
        sinks, bias, processors(out.device),
    )  # fmt: skip
    if weighted is not out:
        out.copy_(restore_output(weighted, cache))
