"""First tokens in full precision for the cases of `helpers`: which positions they have, and what they replace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_int8_paged.kernels import FirstTokens


def first_places(rng: np.random.Generator, lens: Sequence[int], count: int, first: Sequence[int]) -> np.ndarray:
    """int32 ``[3, batch]``: row, first and stop of every sequence's first tokens, which stand in permuted rows."""
    batch = len(lens)
    places = np.zeros((3, batch), np.int32)
    places[0] = rng.permutation(batch + 1)[:batch]
    places[1] = first if len(first) else 0
    places[2] = np.minimum(places[1] + count, lens)
    return places


def keep_first(
    places: np.ndarray,
    tensors: Sequence[tuple[np.ndarray, np.ndarray]],
    count: int,
    dtype: torch.dtype,
    device: torch.device,
) -> FirstTokens:
    """The first tokens of every sequence in full precision. Rows and tokens that nobody may read hold NaN.

    Args:
        places: what `first_places` returned.
        tensors: keys and values, each as the model computed them and dequantized, float64 ``[batch, kv_heads, capacity,
            dim]``; the latter get the first tokens too, in place.
        count: tokens per sequence.
        dtype: that they are kept in.
        device: where they are kept.
    """
    rows = []
    for source, dense in tensors:
        kept = torch.full((len(source) + 1, source.shape[1], count, source.shape[3]), torch.nan, dtype=dtype)
        for b, (row, begin, stop) in enumerate(places.T.tolist()):
            kept[row, :, : stop - begin] = torch.from_numpy(source[b, :, begin:stop]).to(dtype)
            dense[b, :, begin:stop] = kept[row, :, : stop - begin].double().numpy()
        rows.append(kept.to(device))
    row, begin, stop = torch.from_numpy(places).to(device)
    return FirstTokens(*rows, row, begin, stop, limit=int(places[2].max()))


def first_positions(options: dict[str, Any], sequence: int) -> tuple[int, int]:
    """Position of a sequence's first token in full precision, and after the last, by the options of a case."""
    held = options.get("first_tokens")
    return (0, 0) if held is None else (int(held.first[sequence]), int(held.stop[sequence]))
