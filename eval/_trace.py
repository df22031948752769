"""Traces of requests: prompts with common beginnings, of different lengths, that arrive at random times."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Arrival(NamedTuple):
    """A request of a trace.

    Attributes:
        second: when it arrives.
        prompt: token ids.
        new_tokens: that it asks for.
    """

    second: float
    prompt: list[int]
    new_tokens: int


class TraceOptions(NamedTuple):
    """What a trace is made of.

    Attributes:
        requests: how many.
        rate: mean arrivals per second of a Poisson process.
        shared: tokens of a system prompt.
        system_prompts: how many different ones.
        short: longest of the short prompts behind a system prompt.
        long: longest of the long ones, a fifth of all.
        new_tokens: most tokens that a request asks for; the fewest are a quarter of it.
        seed: of all that is drawn.
    """

    requests: int
    rate: float
    shared: int
    system_prompts: int
    short: int
    long: int
    new_tokens: int
    seed: int

    @property
    def longest(self) -> int:
        """Most tokens of a request, its answer included."""
        return self.shared + self.long + self.new_tokens


def trace_of(options: TraceOptions, text: torch.Tensor) -> list[Arrival]:
    """A trace whose prompts are pieces of a text, int64 ``[tokens]``, in the order of arrival."""
    generator = torch.Generator().manual_seed(options.seed)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def piece(length: int) -> list[int]:
        start = drawn(0, len(text) - length - 1)
        return text[start : start + length].tolist()

    beginnings = [piece(options.shared) for _ in range(options.system_prompts)]
    gaps = torch.empty(options.requests).exponential_(options.rate, generator=generator)
    return [
        Arrival(
            second,
            beginnings[drawn(0, options.system_prompts - 1)]
            + piece(drawn(options.short + 1, options.long) if drawn(1, 5) == 1 else drawn(1, options.short)),
            drawn(max(options.new_tokens // 4, 1), options.new_tokens),
        )
        for second in (gaps.cumsum(0) - gaps[0]).tolist()
    ]
