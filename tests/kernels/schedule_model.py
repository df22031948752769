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


def work_of_programs(chunks: np.ndarray, units: int, programs: int) -> np.ndarray:
    """``[programs, 2]``: chunks that each program reads, and units that it begins."""
    positions, share, lead = cut_evenly(chunks, units, programs)
    work = np.zeros((programs, 2), dtype=np.int64)
    start = 0
    for sequence, count in enumerate(chunks):
        for _ in range(units):
            begin, end = start + lead, start + lead + count
            for program in range(begin // share, (end - 1) // share + 1) if count else ():
                part = min(end, (program + 1) * share) - max(begin, program * share)
                work[program] += part, 1
            start += positions[sequence]
    return work


def makespan(chunks: np.ndarray, units: int, programs: int) -> int:
    """When the last program ends, if all begin at once and none disturbs another."""
    work = work_of_programs(chunks, units, programs)
    return int((work[:, 0] + BEGINNING * work[:, 1]).max())


def least_makespan(chunks: np.ndarray, units: int, programs: int) -> int:
    """A bound that no cut into whole chunks passes: in time T a program reads ``T - 1`` chunks of one unit at most, so
    that a unit of c chunks is begun ``c / (T - 1)`` times, and all of that must fit into ``programs * T``."""
    time = 1 + BEGINNING
    while chunks.sum() * units + BEGINNING * ceil_div(chunks, time - BEGINNING).sum() * units > programs * time:
        time += 1
    return time
