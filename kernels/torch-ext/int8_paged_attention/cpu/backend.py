"""The CPU backend: C kernels in `src`, called through ctypes.

A call is one packed struct, which `records` makes of tensors whose layout it has checked; what is constant for a
layer, or for a step, is packed once. The C code checks values, for nothing: lengths, the block ids it uses, places of
first tokens.
"""

from __future__ import annotations

import functools
import warnings

import torch

from ..calls import Scoring, Tokens
from ..checks import MAX_NATIVE_HEAD_DIM, check_block_ids, check_first_places, check_lengths
from ..first_tokens import FirstTokens
from ..formats import INT8
from ..ragged import append_ragged, attend_ragged
from ..storage import KvCacheQuant
from . import library
from .memory import empty, filled
from .records import (
    TILE_ORDER,
    append_record,
    copy_arguments,
    decode_record,
    extend_record,
    gather_record,
    hadamard_arguments,
    layer_record,
)

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
    "hadamard",
    "isas",
    "select_isa",
    "selected_isa",
    "unavailable",
]

NAME = "cpu"
FORMATS = (INT8.name,)
#: Under every instruction set: where torch is held to the same one, its attention over a dense past takes longer.
LONG_CHUNKS = True
SEGMENTS = True

_LIBRARY = library.load()
_NO_MEMORY, _BAD_RANGE, _BAD_FIRST_TOKEN = -3, -4, -5


def unavailable(device: torch.device, block_size: int, head_dim: int, v_head_dim: int) -> str | None:
    """Why this backend cannot serve such a layer, or None if it can.

    Warns, once, when the C kernels are missing on a CPU.
    """
    if device.type != "cpu":
        return f"its kernels run on 'cpu', not on {device.type!r}"
    if _LIBRARY.missing is not None:
        _warn_once(_LIBRARY.missing)
        return _LIBRARY.missing
    if block_size % 16:
        return f"block_size must be a multiple of 16, got {block_size}"
    for name, dim in (("head_dim", head_dim), ("v_head_dim", v_head_dim)):
        if dim % 4 or not 4 <= dim <= MAX_NATIVE_HEAD_DIM:
            return f"{name} must be a multiple of 4 up to {MAX_NATIVE_HEAD_DIM}, got {dim}"
    return None


@functools.cache
def _warn_once(missing: str) -> None:
    warnings.warn(f"int8 paged attention on the CPU runs on slow reference code: {missing}", stacklevel=3)


def append(k_new: torch.Tensor, v_new: torch.Tensor, storage: KvCacheQuant, tokens: Tokens) -> None:
    """`reference.append` in C."""
    if tokens.cu_seqlens_q is not None:
        return append_ragged(append, k_new, v_new, storage, tokens)
    layer, layout = storage.notes.get(NAME) or layer_record(storage)
    call, _held = append_record(layout, k_new, v_new, tokens)
    error = _LIBRARY.append(layer, call)
    if error:
        _raise(error, storage, tokens.block_table, tokens.context_lens_before, new_tokens=k_new.shape[2])


def attend(
    out: torch.Tensor,
    q: torch.Tensor,
    storage: KvCacheQuant,
    tokens: Tokens,
    scoring: Scoring,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    first_tokens: FirstTokens | None = None,
) -> None:
    """`reference.attend` in C. ``fresh`` keys and values have q's dtype."""
    if tokens.cu_seqlens_q is not None:
        return attend_ragged(attend, out, q, storage, tokens, scoring, fresh, first_tokens)
    layer, layout = storage.notes.get(NAME) or layer_record(storage)
    lens = tokens.context_lens
    if fresh is None:
        call, _held = decode_record(layout, out, q, tokens, scoring, first_tokens)
        error = _LIBRARY.decode(layer, call)
    else:
        call, _held = extend_record(layout, out, q, tokens, scoring, fresh, first_tokens)
        lens = tokens.context_lens_before
        error = _LIBRARY.extend(layer, call)
    if error:
        _raise(error, storage, tokens.block_table, lens, first_tokens=first_tokens)


def gather(
    storage: KvCacheQuant, tokens: Tokens, start: int, stop: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.gather` in C."""
    layer, layout = storage.notes.get(NAME) or layer_record(storage)
    call, k, v = gather_record(layout, tokens, start, stop, dtype)
    error = _LIBRARY.gather(layer, call)
    if error:
        _raise(error, storage, tokens.block_table, tokens.context_lens)
    return k, v


def copy(storage: KvCacheQuant, src: torch.Tensor, dst: torch.Tensor) -> None:
    """`reference.copy` in C."""
    layer, layout = storage.notes.get(NAME) or layer_record(storage)
    source, destination, count, held = copy_arguments(layout, src, dst)
    if _LIBRARY.copy(layer, source, destination, count):
        raise ValueError(f"src and dst must hold block ids from 0 to {storage.num_blocks - 1}, got {held}")


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """`conditioning.hadamard` in C, to the same bits: float32 ``[..., head_dim]``, head_dim at most 256."""
    *arguments, (out, _) = hadamard_arguments(x)
    _LIBRARY.hadamard(*arguments)
    return out


def isas() -> list[str]:
    """Instruction sets that this processor has and the library serves, the fastest first."""
    return _LIBRARY.isas()


def selected_isa() -> str:
    """The instruction set in use."""
    return _LIBRARY.isa


def select_isa(name: str | None) -> None:
    """Use one instruction set from now on, in the whole process; None: the fastest.

    Raises:
        ValueError: the processor lacks it; the message names what it has.
    """
    _LIBRARY.select_isa(name)


def _raise(
    error: int,
    storage: KvCacheQuant,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    new_tokens: int = 0,
    first_tokens: FirstTokens | None = None,
) -> None:
    """Turn an error code into the exception that the public functions raise."""
    if error == _NO_MEMORY:
        raise MemoryError("no memory for the partial results of decode attention")
    if error == _BAD_FIRST_TOKEN and first_tokens is not None:
        check_first_places(first_tokens)
    if error != _BAD_RANGE:
        check_lengths(lengths, "lengths", block_table.shape[1] * storage.block_size - new_tokens)
        check_block_ids(block_table, "block_table", storage.num_blocks)
    raise ValueError(f"the C kernels refused the call (error {error}); did a tensor change meanwhile?")
