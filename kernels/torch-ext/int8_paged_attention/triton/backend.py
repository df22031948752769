"""The Triton backend: NVIDIA and AMD GPUs, Intel GPUs by Triton's own support, and any device under TRITON_INTERPRET=1.

Append and attention are kernels of their own. Gather and copy are torch's, as in the reference: they serve the paths
that are not taken per token.
"""

from __future__ import annotations

import torch
import triton

from ..calls import Scoring, Tokens
from ..checks import MAX_NATIVE_HEAD_DIM
from ..first_tokens import FirstTokens
from ..formats import INT8
from ..ragged import append_ragged, attend_ragged
from ..reference import attend as attend_in_torch
from ..reference import copy, empty, filled, gather
from ..storage import KvCacheQuant
from .append import launch_append
from .decode import launch_decode
from .device import INTERPRETED, chip_of, launch_on
from .extend import launch_extend
from .layouts import TILE_ORDER
from .tuning import Chip

__all__ = [
    "FORMATS",
    "LONG_CHUNKS",
    "NAME",
    "SEGMENTS",
    "TILE_ORDER",
    "append",
    "attend",
    "copy",
    "empty",
    "filled",
    "gather",
    "unavailable",
]

NAME = "triton"
FORMATS = (INT8.name,)
LONG_CHUNKS = True
SEGMENTS = False
OLDEST_TRITON = (3, 6)
#: Chips whose matrix unit has kept little of its int8 rate: B300.
LITTLE_INT8 = ("sm_103",)
#: 32639 * 127 * 256 < 2**31: the largest product of a query in steps with a key row.
WIDEST_ROW = 256


def unavailable(device: torch.device, block_size: int, head_dim: int, v_head_dim: int) -> str | None:
    """Why this backend cannot serve such a layer, or None if it can."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if device.type == "cpu" and not INTERPRETED:
        return "triton has no compiler for the CPU; TRITON_INTERPRET=1 interprets the kernels, slowly"
    if max(head_dim, v_head_dim) > MAX_NATIVE_HEAD_DIM:
        return f"rows may have at most {MAX_NATIVE_HEAD_DIM} elements, got {max(head_dim, v_head_dim)}"
    return None


def multiplies_int8(chip: Chip) -> bool:
    """Whether the matrix unit takes int8 as this backend wants it: on NVIDIA from Ampere on, but for `LITTLE_INT8`."""
    return not (chip.name.startswith("sm_") and (int(chip.name[3:]) < 80 or chip.name in LITTLE_INT8))


def append(k_new: torch.Tensor, v_new: torch.Tensor, storage: KvCacheQuant, tokens: Tokens) -> None:
    """`reference.append` on a GPU."""
    if tokens.cu_seqlens_q is not None:
        return append_ragged(append, k_new, v_new, storage, tokens)
    if not k_new.numel() or not tokens.block_table.shape[1]:
        return
    launch_on(k_new.device, launch_append, k_new, v_new, storage, tokens)


def attend(
    out: torch.Tensor,
    q: torch.Tensor,
    storage: KvCacheQuant,
    tokens: Tokens,
    scoring: Scoring,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    first_tokens: FirstTokens | None = None,
) -> None:
    """`reference.attend` on a GPU."""
    if tokens.cu_seqlens_q is not None:
        return attend_ragged(attend, out, q, storage, tokens, scoring, fresh, first_tokens)
    if not out.numel():
        return
    if not storage.num_blocks or not tokens.block_table.shape[1]:
        # There is no address to read from, but perhaps there are first tokens or fresh ones.
        return attend_in_torch(out, q, storage, tokens, scoring, fresh, first_tokens)
    exact = out
    if INTERPRETED:
        exact, q = _interpretable(out), _interpretable(q)
    if fresh is not None:
        if INTERPRETED:
            fresh = _interpretable(fresh[0]), _interpretable(fresh[1])
        launch_on(out.device, launch_extend, exact, q, storage, tokens, scoring, fresh, first_tokens)
    else:
        chip = chip_of(out.device)
        launch_on(
            out.device, launch_decode, exact, q, storage, tokens, scoring, first_tokens,
            chip=chip, integer=multiplies_int8(chip),
        )  # fmt: skip
    if exact is not out:
        out.copy_(exact)


def _interpretable(x: torch.Tensor) -> torch.Tensor:
    """``x``, in float32 where the interpreter would fail: it truncates to bfloat16 and cannot multiply it."""
    return x.to(torch.float32) if INTERPRETED and x.dtype == torch.bfloat16 else x
