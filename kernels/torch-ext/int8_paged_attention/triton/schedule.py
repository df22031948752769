"""Who reads what: the work of decode attention, cut evenly over a fixed number of programs, whatever the lengths are.

A **unit** is what shares an operand: the query rows of one tile of one KV head of one sequence. Units stand one behind
the other, sequence by sequence, and take positions: one for each chunk of their tokens, and a few more. Each program
takes the same **share** of all positions: it may begin and end within a unit, and serve several. All of this follows
from the lengths on the device, so that a CUDA graph may be replayed when they have changed.

The positions beyond the chunks pay for the beginning of a unit (the query must be rotated and split), which takes about
as long as a chunk. Where there are programs enough for it, no program serves two units: each unit's positions are
rounded up to a multiple of the share. Otherwise one position precedes the chunks of a unit.

What program p leaves of unit u lies in slot ``p + u``: both only grow along the positions, so slots differ, and those
of a unit follow each other.

Even shares that ignore where tiles begin are Stream-K (Osama et al., 2023, https://arxiv.org/abs/2301.03598).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import TOKENS

#: Warps of a program; each is a stream of its own.
STREAMS = 4
#: Tokens that a program reads per iteration.
CHUNK = tl.constexpr(STREAMS * TOKENS.value)


@triton.jit
def visible_tokens(context_lens_ptr, kv_start_ptr, sequence, there, q_len, window, HAS_WINDOW: tl.constexpr):
    """Positions that some row of a sequence sees lie in ``[first, length)``, those that all rows see from
    ``first_by_all`` on. Of one sequence or of several; where it is not ``there``, nothing is seen."""
    length = tl.load(context_lens_ptr + sequence, mask=there, other=0)
    first = tl.zeros_like(length)
    if kv_start_ptr is not None:
        first = tl.maximum(tl.load(kv_start_ptr + sequence, mask=there, other=0), 0)
    first_by_all = first
    if HAS_WINDOW:
        first_by_all = tl.maximum(first, length - window)
        first = tl.maximum(first, length - q_len - window + 1)
    return length, first, first_by_all


@triton.jit
def chunks_between(first, length):
    """Chunks of the tokens ``[first, length)``, the first of which begins with its group of 16."""
    return (tl.maximum(length - first // 16 * 16, 0) + CHUNK - 1) // CHUNK


@triton.jit
def positions_of(chunks, share, lead):
    """How many positions a unit of so many chunks takes. An empty one takes none."""
    aligned = (chunks + share - 1) // share * share
    return tl.where(lead == 0, aligned, chunks + tl.where(chunks > 0, lead, 0))


@triton.jit
def cut_evenly(
    context_lens_ptr,
    kv_start_ptr,
    batch,
    units,
    programs,
    q_len,
    window,
    HAS_WINDOW: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """Positions that one of the ``units`` units of each sequence takes, int32 ``[SEQUENCES]`` of which ``batch`` exist;
    positions of each program, and those that precede the chunks of a unit."""
    sequence = tl.arange(0, SEQUENCES)
    there = sequence < batch
    length, first, _ = visible_tokens(context_lens_ptr, kv_start_ptr, sequence, there, q_len, window, HAS_WINDOW)
    chunks = chunks_between(first, length)
    share = tl.maximum((tl.sum(chunks, axis=0) * units + programs - 1) // programs, 1)
    pieces = tl.sum((chunks + share - 1) // share, axis=0) * units
    lead = tl.where(pieces <= programs, 0, 1)
    positions = positions_of(chunks, share, lead)
    return positions, (tl.sum(positions, axis=0) * units + programs - 1) // programs, lead
