"""Requests of a server in small: prompts that begin alike, forks, rollback, several sequences, all from one pool.

What comes of each request is known beforehand, from a cache of its own in one thread; so threads, growth and shared
blocks may not change a token.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, NamedTuple

import torch

from hf_int8_paged import CacheFullError, PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from tests.models import random_ids, tiny_model

#: Different requests.
KINDS = 40
#: The centre of a pool's keys is that of whoever comes first; without it tokens do not depend on who that is.
OPTIONS: dict[str, Any] = {"center_keys": False}


class Request(NamedTuple):
    """One request: a prompt, and what is done after it."""

    batch: int
    prompt: int
    steps: int
    fork: bool
    crop: int
    seed: int


def request(number: int) -> Request:
    """Request ``number`` of `KINDS`."""
    draw = random.Random(number)
    return Request(
        draw.choice([1, 1, 1, 2, 3]), draw.randint(3, 90), draw.randint(1, 6), draw.random() < 0.4,
        draw.choice([0, 0, 1, 3]), number % 5,
    )  # fmt: skip


def model() -> Any:
    """Two windows and two layers without, as Gemma has them."""
    made = tiny_model("gemma2")
    made.set_attn_implementation("int8_paged")
    return made


@torch.no_grad()
def serve(model: Any, asked: Request, pool: PagedInt8Pool | None = None) -> list[list[int]]:
    """Carry a request out; the tokens that come of it, of the cache and of its fork."""
    cache = PagedInt8Cache(model.config, pool=pool, **({} if pool is not None else OPTIONS))
    if asked.crop:
        cache.activate_past_recording()

    def go_on(one: PagedInt8Cache, ids: torch.Tensor, steps: int) -> list[int]:
        said = []
        for _ in range(steps):
            ids = model(ids, **{CACHE_ARGUMENT: one}).logits[:, -1:].argmax(-1)
            said += ids[:, 0].tolist()
        return said

    said = [go_on(cache, random_ids(asked.batch, asked.prompt, seed=asked.seed), asked.steps)]
    if asked.crop and asked.steps > asked.crop:
        cache.crop(-asked.crop)
    last = torch.tensor(said[0][-asked.batch :])[:, None]
    if asked.fork:
        said.append(go_on(cache.fork(), last, 2))
    said.append(go_on(cache, last, 2))
    return said


def right_answers(model: Any) -> list[list[list[int]]]:
    """Of all `KINDS` requests, each from a pool of its own."""
    return [serve(model, request(number)) for number in range(KINDS)]


def check_empty(pool: PagedInt8Pool) -> list[str]:
    """What is wrong with a pool that no cache uses any more."""
    wrong = []
    for name, allocator in pool.allocators.items():
        counts = [allocator.ref_count(block) for block in range(allocator.num_blocks)]
        if allocator.num_used or any(counts) or allocator.num_free != len(counts):
            wrong.append(f"{name}: {allocator.num_used} of {len(counts)} blocks are held")
        elif sorted(allocator.allocate(len(counts)).tolist()) != list(range(len(counts))):
            wrong.append(f"{name}: not all blocks can be handed out")
        else:
            allocator.release(range(len(counts)))
    return wrong


def serve_checked(model: Any, number: int, right: list[list[list[int]]], pool: PagedInt8Pool, found: Counter) -> None:
    """Carry out request ``number`` and count what came of it."""
    try:
        said = serve(model, request(number), pool)
    except CacheFullError:
        found["refused as the pool was full"] += 1
        return
    found["right" if said == right[number] else "failure: other tokens"] += 1
    found["tokens"] += sum(map(len, said))
