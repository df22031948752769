"""How decode attention on GPUs cuts its work, written a second time, in numpy; and the least time that any cut needs.

Times are in chunks: reading a chunk takes 1, and so does the beginning of a unit, whose query must be loaded, rotated
and split. (docs/gpu_audit.json counts about as many instructions outside of the loop as in it.)
"""

from __future__ import annotations

import numpy as np

CHUNK = 256
BEGINNING = 1


def ceil_div(a: np.ndarray, b: int) -> np.ndarray:
    return -(-a // b)


def chunks_of(lengths: np.ndarray, first: int | np.ndarray = 0) -> np.ndarray:
    """Chunks of each sequence whose tokens ``[first, length)`` are read."""
    return ceil_div(np.maximum(lengths - first // 16 * 16, 0), CHUNK)


def cut_evenly(chunks: np.ndarray, units: int, programs: int) -> tuple[np.ndarray, int, int]:
    """Positions of a unit of each sequence, positions of a program, and those before the chunks of a unit."""
    share = max(1, int(ceil_div(chunks.sum() * units, programs)))
    pieces = ceil_div(chunks, share)
    if pieces.sum() * units <= programs:
        return pieces * share, share if pieces.any() else 0, 0
    positions = chunks + (chunks > 0)
    return positions, int(ceil_div(positions.sum() * units, programs)), 1


def segments_of_programs(chunks: np.ndarray, units: int, programs: int) -> list[list[int]]:
    """How many chunks each program reads of each unit that it serves.

    Args:
        chunks: of each sequence.
        units: of a sequence: KV heads times tiles of query rows.
        programs: how many there are.
    """
    positions, share, lead = cut_evenly(chunks, units, programs)
    segments: list[list[int]] = [[] for _ in range(programs)]
    start = 0
    for sequence, count in enumerate(chunks):
        for _ in range(units):
            begin, end = start + lead, start + lead + count
            for program in range(begin // share, (end - 1) // share + 1) if count else ():
                segments[program].append(int(min(end, (program + 1) * share) - max(begin, program * share)))
            start += positions[sequence]
    return segments


def makespan(chunks: np.ndarray, units: int, programs: int) -> int:
    """When the last program ends, if all begin at once and none disturbs another."""
    return max(sum(mine) + BEGINNING * len(mine) for mine in segments_of_programs(chunks, units, programs))


def least_makespan(chunks: np.ndarray, units: int, programs: int) -> int:
    """A bound that no cut into whole chunks passes: in time T a program reads ``T - 1`` chunks of one unit at most, so
    that a unit of c chunks is begun ``c / (T - 1)`` times, and all of that must fit into ``programs * T``."""
    time = 1 + BEGINNING
    while chunks.sum() * units + BEGINNING * ceil_div(chunks, time - BEGINNING).sum() * units > programs * time:
        time += 1
    return time
