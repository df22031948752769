"""One step of the engine: which requests are in it, and attention of all their rows in one layer.

The rows of all requests are packed, ``[total_rows, heads, dim]``. Requests with equally many rows are one call of the
kernels, as in `kernels.ragged`: all that decode are one call, whatever their lengths. As in `PagedInt8Cache`, chunks of
more than 16 rows and first prompts of more than one see their own tokens in full precision; all else is read from the
blocks. The groups are made here, of what the host knows, as a window's ring has one table before the step and another
one after it, and as nothing should wait for a device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..kernels import MAX_DECODE_ROWS, FirstTokens, Scoring, Tokens, load_backend
from ..kernels.ragged import unpacked
from ..layer_checks import of_one_dtype
from .allocators import Int8Pages
from .first_tokens import FirstTokenRows


class Request(NamedTuple):
    """A request's part of a step.

    Attributes:
        name: the engine's id of it.
        past: tokens that it had before.
        rows: new ones.
    """

    name: str
    past: int
    rows: int


class Chunks(NamedTuple):
    """Requests with equally many rows, and where their tokens lie in the layers of one allocator.

    Attributes:
        rows: int64 ``[count * q_len]`` places of their rows in the step; None: all rows, in their order.
        q_len: rows of each.
        sees_fresh: whether their own tokens are seen in full precision.
        past: for attention that sees the own tokens in full precision.
        tokens: for appending, and for attention from the blocks.
        first_tokens: row, first and stop of each request's first token, int32 ``[count]``; None if none is read.
    """

    rows: torch.Tensor | None
    q_len: int
    sees_fresh: bool
    past: Tokens
    tokens: Tokens
    first_tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None


class BatchStep:
    """A step of the engine.

    Args:
        requests: in the order of their rows, each with at least one.
        first_rows: of their first tokens, or None if these are read from the blocks.
        device: of the cache.
    """

    def __init__(self, requests: list[Request], first_rows: FirstTokenRows | None, device: torch.device):
        self.requests, self.first_rows, self.device = requests, first_rows, device
        counts = [request.rows for request in requests]
        self.starts = [0, *np.cumsum(counts).tolist()]
        self._chunks: dict[int, list[Chunks]] = {}
        names, past = [request.name for request in requests], [request.past for request in requests]
        written = ([], []) if first_rows is None else first_rows.to_write(names, past, self.starts)
        self._new_rows = None
        if first_rows is not None:
            first_rows.make_room()
        if first_rows is not None and written[0]:
            self._new_rows = tuple(torch.tensor(x, dtype=torch.long, device=device) for x in written)

    def attend(
        self,
        layer: int,
        pages: Int8Pages,
        query: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor],
        scoring: Scoring,
    ) -> torch.Tensor:
        """Store the step's keys and values of a layer, and attend.

        Args:
            layer: index of the layer.
            pages: the layer's allocator.
            query: ``[total_rows, num_q_heads, head_dim]``.
            states: keys and values, ``[total_rows, num_kv_heads, head_dim]``.
            scoring: factor, softcap and sink logits.

        Returns:
            ``[total_rows, num_q_heads, head_dim]``.
        """
        storage = pages.storages[layer]
        backend = load_backend(storage.backend)
        out = query.new_empty(query.shape)
        new = of_one_dtype(*states)
        if self.first_rows is not None and self._new_rows is not None:
            rows, places = self._new_rows
            self.first_rows.write(layer, rows, new[0][places], new[1][places])
        chunks = self._chunks_of(pages)

        def attend(part: Chunks, tokens: Tokens, fresh: tuple[torch.Tensor, torch.Tensor] | None) -> None:
            first: FirstTokens | None = None
            if self.first_rows is not None and part.first_tokens is not None:
                first = self.first_rows.of_layer(layer, part.first_tokens)
            answer = out if part.rows is None else out.new_empty(len(part.rows), *out.shape[1:])
            backend.attend(unpacked(answer, part.q_len), _of(query, part), storage, tokens, scoring, fresh, first)
            if part.rows is not None:
                out[part.rows] = answer

        # A ring's oldest blocks are what the newest tokens overwrite: long chunks read them before.
        for part in chunks:
            if part.sees_fresh:
                attend(part, part.past, tuple(_of(x, part).to(query.dtype) for x in states))  # type: ignore[arg-type]
        for part in chunks:
            backend.append(_of(new[0], part), _of(new[1], part), storage, part.tokens)
        for part in chunks:
            if not part.sees_fresh:
                attend(part, part.tokens, None)
        return out

    def _chunks_of(self, pages: Int8Pages) -> list[Chunks]:
        if pages.index not in self._chunks:
            self._chunks[pages.index] = self._make_chunks(pages)
        return self._chunks[pages.index]

    def _make_chunks(self, pages: Int8Pages) -> list[Chunks]:
        kinds: dict[tuple[int, bool], list[int]] = {}
        for i, request in enumerate(self.requests):
            sees_fresh = request.rows > MAX_DECODE_ROWS or (request.rows > 1 and request.past == 0)
            kinds.setdefault((request.rows, sees_fresh), []).append(i)
        chunks = []
        for (q_len, sees_fresh), members in kinds.items():
            names = [self.requests[i].name for i in members]
            before = np.array([self.requests[i].past for i in members], dtype=np.int64)
            after = before + q_len
            window = pages.window
            now = self._tokens(pages.tables(names, after), before, after, window)
            past = self._tokens(pages.tables(names, before), before, after, window) if sees_fresh and window else now
            starts = np.array([self.starts[i] for i in members])
            rows = None if len(kinds) == 1 else self._on_device((starts[:, None] + np.arange(q_len)).ravel())
            places = self._first_tokens(names, before, sees_fresh, window, int(before.min(initial=0)))
            chunks.append(Chunks(rows, q_len, sees_fresh, past, now, places))
        return chunks

    def _tokens(self, table: np.ndarray, before: np.ndarray, after: np.ndarray, window: int | None) -> Tokens:
        lens_before, lens = (self._on_device(x.astype(np.int32)) for x in (before, after))
        return Tokens(self._on_device(table), lens_before, lens, window)

    def _first_tokens(
        self, names: list[str], before: np.ndarray, sees_fresh: bool, window: int | None, shortest: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        if self.first_rows is None or (window is not None and shortest >= window):
            return None
        # With the own tokens at hand, first tokens are of the past only.
        stop = np.minimum(before, 1) if sees_fresh else np.ones_like(before)
        if not stop.any():
            return None
        row = np.array(self.first_rows.rows(names))
        return tuple(self._on_device(x.astype(np.int32)) for x in (row, np.zeros_like(row), stop))  # type: ignore[return-value]

    def _on_device(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device, non_blocking=True)


def _of(x: torch.Tensor, part: Chunks) -> torch.Tensor:
    """The rows ``[total_rows, heads, dim]`` of some requests as kernels take them, ``[count, heads, q_len, dim]``."""
    return unpacked(x if part.rows is None else x[part.rows], part.q_len)
