"""What the drill interrupts: operations on a cache of three layers, two of them with a window, and what led to them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.seam.attention import int8_paged_attention
from tests.cache.offloaded import choose

LAYERS, HEADS, DIM, WINDOW = 3, 1, 16, 20
_OPTIONS: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 2 * DIM,
    "num_attention_heads": 2,
    "num_key_value_heads": HEADS,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
}
CONFIG = LlamaConfig(**_OPTIONS)
#: Stands for a model's attention module.
MODULE: Any = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
_OFFLOADING = {"offloading": True, "offload_only_non_sliding": False}
#: Options of the cache, by kind. The last two are caches whose layers leave: for files, and for where slots are filled
#: from.
KINDS: dict[str, dict[str, Any]] = {
    "growing": {},
    "preallocated": {"max_batch_size": 4, "max_cache_len": 80},
    "mapped": _OFFLOADING,
    "copied": _OFFLOADING,
}


class World:
    """The caches of one run of a scenario; ``main`` is the one that is interrupted.

    Args:
        kind: of `KINDS`.
        backend: of the cache.
    """

    def __init__(self, kind: str, backend: str):
        self.caches: dict[str, PagedInt8Cache] = {"main": PagedInt8Cache(CONFIG, backend=backend, **KINDS[kind])}
        self.pool: Any = vars(self.caches["main"]).get("pool")
        if KINDS[kind] is _OFFLOADING:
            choose(self.main.pool, kind)

    @property
    def main(self) -> PagedInt8Cache:
        return self.caches["main"]


Action = Callable[[World], object]


class Scenario(NamedTuple):
    """``history`` leads to the state in which ``operation`` is interrupted; ``kinds`` of cache that it concerns."""

    history: tuple[Action, ...]
    operation: Action
    kinds: tuple[str, ...] = tuple(KINDS)


@functools.cache
def rows(seed: int, batch: int, tokens: int) -> torch.Tensor:
    """Random keys or values with a common offset, so that centring them matters: ``[batch, HEADS, tokens, DIM]``."""
    return torch.randn(batch, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed)) + 3


@functools.cache
def equal_rows(seed: int, batch: int, tokens: int) -> torch.Tensor:
    """The same for every sequence."""
    return rows(seed, 1, tokens).repeat(batch, 1, 1, 1)


@functools.cache
def queries(batch: int, tokens: int) -> torch.Tensor:
    """Random queries ``[batch, 2 * HEADS, tokens, DIM]``."""
    return torch.randn(batch, 2 * HEADS, tokens, DIM, generator=torch.Generator().manual_seed(tokens))


def assign(world: World) -> None:
    """Other values for one layer."""
    world.main.layers[1].values = rows(9, 2, 21)


class Step:
    """A forward pass of ``tokens`` tokens, after the mask function has said what padding is: every layer is updated and
    then attended to.

    Args:
        tokens: per sequence.
        batch: sequences.
        padding: tokens of left padding in front of the first sequence.
        equal_layers: first layers whose keys and values are the same for every sequence.
    """

    def __init__(self, tokens: int, batch: int = 2, padding: int = 0, equal_layers: int = 0):
        self.tokens, self.batch, self.equal_layers = tokens, batch, equal_layers
        self.mask = torch.ones(batch, tokens, dtype=torch.bool)
        self.mask[0, :padding] = False

    def __call__(self, world: World) -> None:
        cache, padded = world.main, not bool(self.mask.all())
        if padded:
            # As `get_mask_sizes` and the mask function do.
            cache._sequences.padding.leave(self.mask)
        for index in range(LAYERS):
            make = equal_rows if index < self.equal_layers else rows
            keys, values = (make(10 * self.tokens + 2 * index + i, self.batch, self.tokens) for i in range(2))
            views = cache.update(keys, values, index)
            int8_paged_attention(MODULE, queries(self.batch, self.tokens), *views, None)


def fork(world: World) -> None:
    world.caches["twin"] = world.main.fork()


def deepcopy(world: World) -> None:
    world.caches["twin"] = copy.deepcopy(world.main)


def delete(world: World) -> None:
    del world.caches["main"]
    world.pool.nbytes_used  # noqa: B018 (whoever asks takes note that the cache is gone)


def delete_twin_and_step(world: World) -> None:
    world.caches.pop("twin", None)
    Step(1)(world)


def call(method: str, *arguments: Any) -> Action:
    """An operation of the cache."""
    return lambda world: getattr(world.main, method)(*arguments)


_GROWING = ("growing", "mapped", "copied")
SCENARIOS: dict[str, Scenario] = {
    "first prompt": Scenario((), Step(20)),
    "short first prompt": Scenario((), Step(5)),
    "padded prompt": Scenario((), Step(40, padding=18)),
    "padded prompt that has too few tokens for a centre": Scenario((), Step(18, batch=1, padding=6)),
    "single step": Scenario((Step(20),), Step(1)),
    "step that makes the pool grow": Scenario((Step(16),), Step(1), _GROWING),
    "copy on write after a fork": Scenario((Step(20), fork), Step(1)),
    "window drop": Scenario((Step(34), Step(1)), Step(1)),
    "step over a ring that begins anew": Scenario((Step(60), Step(4)), Step(1)),
    "late centring": Scenario((Step(5), Step(6)), Step(8)),
    "late centring by a single token": Scenario((Step(15),), Step(1)),
    "equal prompts": Scenario((), Step(20, equal_layers=LAYERS)),
    "unsharing of prompts whose later layers differ": Scenario((), Step(20, equal_layers=1)),
    "step after equal prompts": Scenario((Step(20, equal_layers=LAYERS),), Step(1)),
    "long chunk": Scenario((Step(20),), Step(21)),
    "crop": Scenario((Step(20), Step(1), Step(2)), call("crop", -2)),
    "crop over a block": Scenario((Step(16), Step(2)), call("crop", -2)),
    "crop of everything": Scenario((Step(20),), call("crop", -20)),
    "reorder_cache": Scenario((Step(20), Step(1)), call("reorder_cache", torch.tensor([1, 1]))),
    "batch_select_indices": Scenario((Step(20, batch=3),), call("batch_select_indices", [2, 0])),
    "batch_select_indices of none": Scenario((Step(20),), call("batch_select_indices", []), _GROWING),
    "batch_repeat_interleave": Scenario((Step(20),), call("batch_repeat_interleave", 2)),
    "fork": Scenario((Step(20),), fork),
    "deepcopy": Scenario((Step(20), Step(1)), deepcopy),
    "assignment of values": Scenario((Step(20), fork, Step(1)), assign, _GROWING),
    "reset": Scenario((Step(20), Step(1)), call("reset")),
    "deletion": Scenario((Step(20), Step(1)), delete, _GROWING),
    "deletion of one of two": Scenario((Step(20), fork, Step(1)), delete, _GROWING),
    "step after another cache was deleted": Scenario((Step(20), fork, Step(1)), delete_twin_and_step, _GROWING),
}
