"""The work whose cost is kept small: tests count what it does, ``budgets.py`` times it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig

from hf_int8_paged import PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.kernels import FirstTokens, KvCacheQuant, Scoring, Tokens, alloc_paged_int8_layer, load_backend
from hf_int8_paged.seam.attention import int8_paged_attention
from hf_int8_paged.sequences.growing import GrowingSequences

LAYERS = 30
#: Heads of keys and values, queries of each, width: of SmolLM2-135M, of an 8B Llama, of Gemma 3 1B.
SHAPES = ((3, 3, 64), (8, 4, 128), (1, 4, 256))
_PROMPT = 16


class Attention(torch.nn.Module):
    """What the attention function asks of a model's attention module."""

    is_causal = True
    num_key_value_groups = 3


class Step:
    """One decode step through all layers of a cache, from ``update`` to the attention output; calling it takes it."""

    def __init__(self, batch: int = 1) -> None:
        config = LlamaConfig(num_hidden_layers=LAYERS, hidden_size=576, num_attention_heads=9, num_key_value_heads=3)
        self.cache, self.module = PagedInt8Cache(config), Attention()
        self.row, self.query = torch.randn(batch, 3, 1, 64), torch.randn(batch, 9, 1, 64)
        prompt = torch.randn(batch, 3, _PROMPT, 64)
        for layer in range(LAYERS):
            self.cache.update(prompt, -prompt, layer)
        self()  # the pool has grown to what it needs
        self.undo()

    def __call__(self) -> None:
        for layer in range(LAYERS):
            keys, values = self.cache.update(self.row, self.row, layer)
            int8_paged_attention(self.module, self.query, keys, values, None, scaling=0.125)

    def undo(self) -> None:
        self.cache.crop(-1)

    def kernels_alone(self) -> Callable[[], None]:
        """The same launches for one sequence and nothing else."""
        backend, scoring = load_backend("cpu"), Scoring(0.125)
        before, after = (torch.tensor([n], dtype=torch.int32) for n in (_PROMPT, _PROMPT + 1))
        tokens = Tokens(torch.arange(2, dtype=torch.int32)[None], before, after)
        out, row, query = torch.empty(1, 9, 1, 64), self.row, self.query
        storages = [layer.storage for layer in self.cache.layers]

        def launch() -> None:
            for storage in storages:
                backend.append(row, row, storage, tokens)
                backend.attend(out, query, storage, tokens, scoring)

        return launch


class Bookkeeping:
    """What the host does beside the kernels in decode steps of many sequences, with a block table for layers of full
    attention and one for a window of 64. There are no keys and values. Calling it takes a step; a cycle of steps begins
    with the one in which every sequence needs a block, and in its last one the window gives one back.

    Args:
        batch: sequences.
        beams: how many of them have the same prompt. More than one are reordered before each step.
    """

    CYCLE = 16

    def __init__(self, batch: int, beams: int = 1) -> None:
        self.sequences = GrowingSequences(PagedInt8Pool(), sink_tokens=1)
        for layer, window in enumerate((None, 64)):
            self.sequences.add_room(layer, window)
        self.batch = batch
        self.turns: Iterator[list[int]] = iter(())
        self._take(batch // beams, 10 * self.CYCLE)
        if beams > 1:
            of_prompt = torch.arange(0, batch, beams).repeat_interleave(beams)
            self.sequences.select((of_prompt // beams).tolist())
            generator = torch.Generator().manual_seed(0)
            turns = of_prompt + torch.randint(beams, (32 * self.CYCLE, batch), generator=generator)
            self.turns = iter(turns.tolist())
        for _ in range(self.CYCLE):
            self()

    def __call__(self) -> None:
        for rows in self.turns:
            self.sequences.select(rows)
            break
        self._take(self.batch, 1)

    def _take(self, batch: int, tokens: int) -> None:
        state = self.sequences.advance(batch, tokens)
        for group in self.sequences.groups.values():
            group.tokens(torch.device("cpu"))
        state.layer_lengths.update(dict.fromkeys(state.layer_lengths, state.length))  # the layers have stored them


def layer_over_a_past(
    kv_heads: int, group: int, head_dim: int, conditioned: bool, tokens: int = 500
) -> Callable[[], None]:
    """The native kernels of one layer and step: append and decode over a past, with both transforms or neither."""
    backend, scoring = load_backend("cpu"), Scoring(0.1)
    table, before = torch.arange(32, dtype=torch.int32)[None], torch.tensor([tokens], dtype=torch.int32)
    prompt = torch.randn(1, kv_heads, tokens, head_dim)
    row, query = torch.randn(1, kv_heads, 1, head_dim), torch.randn(1, kv_heads * group, 1, head_dim)
    out, after = torch.empty_like(query), before + 1
    rotation = "hadamard" if conditioned else None
    storage = alloc_paged_int8_layer(
        32, 16, kv_heads, head_dim, backend="cpu", rotation=rotation, center_keys=conditioned
    )
    backend.append(prompt, prompt, storage, Tokens.at(table, torch.zeros(1, dtype=torch.int32)))
    step = Tokens(table, before, after)

    def launch() -> None:
        backend.append(row, row, storage, step)
        backend.attend(out, query, storage, step, scoring)

    launch()  # what is made once per layer has been made
    return launch


@contextmanager
def triton_layer_launching_nothing() -> Iterator[tuple[Callable[[], None], list[Any]]]:
    """Append and decode of one layer and step of an 8B Llama on an H100 that is not there, but for the launchers' C
    code, and the list of what those were given."""
    from _triton_offline import TARGETS, launching_nothing

    from hf_int8_paged.kernels.triton import backend as triton_backend
    from hf_int8_paged.kernels.triton.tuning import Chip

    chips = {torch.device("cpu"): Chip("sm_90", 132)}
    slots = (8, 64, 16)
    k, v = (torch.empty(*slots, 128, dtype=torch.int8) for _ in range(2))
    scales = torch.empty(2, *slots, dtype=torch.float16)
    storage = KvCacheQuant(k, v, scales[0], scales[1], "triton", "v_transposed", "hadamard", torch.zeros(8, 128))
    new, q = torch.empty(1, 8, 1, 128), torch.empty(1, 32, 1, 128)
    out, table, lens = torch.empty_like(q), torch.zeros(1, 64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    held = FirstTokens(new, new, lens, lens, lens, limit=1)
    tokens, scoring = Tokens(table, lens, lens), Scoring(0.1)

    def layer() -> None:
        triton_backend.append(new, new, storage, tokens)
        triton_backend.attend(out, q, storage, tokens, scoring, None, held)

    with (
        launching_nothing(TARGETS["sm_90"]) as launched,
        patch.object(triton_backend, "chip_of", chips.__getitem__),
    ):
        layer()  # what is made once per layer has been made, and the kernels are compiled
        launched.clear()
        yield layer, launched


def beams_over_a_prompt(tokens: int, beams: int = 8, new: int = 40) -> PagedInt8Cache:
    """A cache of beams that share a prompt and have some tokens of their own, in three layers."""
    cache = PagedInt8Cache(LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4))
    generator = torch.Generator().manual_seed(0)
    for batch, count in ((1, tokens), (beams, new)):
        if cache.get_seq_length():
            cache.batch_repeat_interleave(beams)
        for layer in range(3):
            rows = torch.randn(batch, 2, count, 16, generator=generator)
            cache.update(rows, rows, layer)
    return cache


def turns_of_beams(beams: int = 8, count: int = 50) -> list[torch.Tensor]:
    """Permutations: beams neither die nor multiply, so that the cache is the same kind at every turn."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(beams, generator=generator) for _ in range(count)]


def reorder(cache: PagedInt8Cache, turns: list[torch.Tensor]) -> None:
    for rows in turns:
        cache.reorder_cache(rows)
