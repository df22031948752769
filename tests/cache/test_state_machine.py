"""Any sequence of operations on caches that share a pool, against lists of tokens.

The model of a cache is a list of token lists. A token's keys and values follow from its id, so the lists say what every
layer must hold. After each step contents, reference counts and free lists are compared, the free blocks poisoned, and
the attention of a further step is read by the kernels and from dense views.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import Gemma2Config

from hf_int8_paged import CacheFullError, PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.kernels import MAX_DECODE_ROWS, Scoring
from hf_int8_paged.layer import PagedInt8Layer
from tests.models import fake_quantize
from tests.segments import fill_blocks

from .two_readers import Attention, U, assert_same_attention, visible_keys

WINDOW = 21
MAX_BATCH, MAX_LENGTH, MAX_CACHES = 6, 120, 4
#: Small enough that some appends are refused.
MAX_TOKENS = 16 * 56
IDS = 64
CONFIG = Gemma2Config(
    num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW, vocab_size=IDS
)
#: Keys of each token id in both layers, ``[layers, ids, heads, head_dim]``, with a mean; values are their negatives.
KEYS = torch.randn(2, IDS, 2, 16, generator=torch.Generator().manual_seed(0))
KEYS += torch.randn(2, 1, 2, 16, generator=torch.Generator().manual_seed(1))

seeds = st.integers(0, 2**32 - 1)


class Twin:
    """A cache, and the tokens that it should hold."""

    def __init__(self, cache: PagedInt8Cache):
        self.cache = cache
        self.tokens: list[list[int]] = []
        #: How many of each sequence's first tokens are held in full precision.
        self.exact = 0
        #: Position from which on the sliding layer may be asked for tokens.
        self.held_from = 0

    @property
    def length(self) -> int:
        return len(self.tokens[0]) if self.tokens else 0


class Caches(RuleBasedStateMachine):
    backend: ClassVar[str]
    #: Whether rows are rotated and keys centred before they are quantized. The first prompt of the pool is long enough
    #: for a centre then, and it stays the centre.
    conditioned: ClassVar[bool]
    steps = readings = 0

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagedInt8Pool(
            backend=self.backend,
            max_tokens=MAX_TOKENS,
            rotation="hadamard" if self.conditioned else None,
            center_keys=self.conditioned,
        )
        self.twins: list[Twin] = []
        self.touched: Twin | None = None

    @initialize(sink_tokens=st.integers(0, 5))
    def one_cache(self, sink_tokens: int) -> None:
        self.new_cache(sink_tokens)
        if self.conditioned:
            self.append(0, 2, 30, 0, False)

    def images(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What each token id's keys and values are read as, ``[ids, heads, head_dim]``."""
        storage = self.pool.storages.get(layer)
        assert storage is not None
        rows = KEYS[layer].transpose(0, 1)[None]
        both = fake_quantize(rows, storage.rotation, storage.key_center), fake_quantize(-rows, storage.rotation)
        return both[0][0].transpose(0, 1), both[1][0].transpose(0, 1)

    def new_cache(self, sink_tokens: int) -> None:
        self.twins.append(Twin(PagedInt8Cache(CONFIG, pool=self.pool, sink_tokens=sink_tokens)))

    def pick(self, which: int) -> Twin:
        self.touched = self.twins[which % len(self.twins)]
        return self.touched

    @precondition(lambda self: len(self.twins) < MAX_CACHES)
    @rule(sink_tokens=st.integers(0, 5))
    def another_cache(self, sink_tokens: int) -> None:
        self.new_cache(sink_tokens)

    @rule(which=seeds, batch=st.integers(1, 4), count=st.integers(1, 45), seed=seeds, alike=st.booleans())
    def append(self, which: int, batch: int, count: int, seed: int, alike: bool) -> None:
        twin = self.pick(which)
        batch = len(twin.tokens) or batch
        count = min(count, MAX_LENGTH - twin.length)
        if not count:
            return
        new = torch.randint(0, IDS, (batch, count), generator=torch.Generator().manual_seed(seed))
        if alike:  # as beams of one prompt are
            new[1:] = new[:1]
        start = twin.length
        try:
            for layer in range(2):
                rows = KEYS[layer][new].transpose(1, 2)
                twin.cache.update(rows, -rows, layer)
        except CacheFullError:
            return
        if not start:
            twin.exact = min(twin.cache._sequences.sink_tokens, count)
        twin.tokens = [held + more for held, more in zip(twin.tokens or [[]] * batch, new.tolist())]
        if not twin.cache.layers[0].record_past:
            # A prompt's or a long chunk's own tokens are not kept where no later token sees them.
            seen_from = start if start and count <= MAX_DECODE_ROWS else twin.length
            twin.held_from = max(twin.held_from, seen_from - WINDOW + 1)

    @rule(which=seeds, count=st.integers(0, 50))
    def crop(self, which: int, count: int) -> None:
        twin = self.pick(which)
        target = max(twin.length - count, 0)
        visible = max(target - WINDOW + 1, 0)
        try:
            twin.cache.crop(-count)
        except RuntimeError:
            assert target > 0
            assert visible < twin.held_from, "refused, although every visible token is still held"
            return
        twin.tokens = [held[:target] for held in twin.tokens] if target else []
        twin.exact = min(twin.exact, target)
        twin.held_from = max(twin.held_from, visible) if target else 0

    @rule(which=seeds)
    def activate_past_recording(self, which: int) -> None:
        self.pick(which).cache.activate_past_recording()

    @precondition(lambda self: len(self.twins) < MAX_CACHES)
    @rule(which=seeds, by_copy=st.booleans())
    def fork(self, which: int, by_copy: bool) -> None:
        twin = self.pick(which)
        child = Twin(copy.deepcopy(twin.cache) if by_copy else twin.cache.fork())
        child.tokens, child.held_from = [list(row) for row in twin.tokens], twin.held_from
        child.exact = twin.exact
        self.twins.append(child)

    @rule(which=seeds, seed=seeds)
    def reorder(self, which: int, seed: int) -> None:
        twin = self.pick(which)
        if twin.tokens:
            batch = len(twin.tokens)
            rows = torch.randint(0, batch, (batch,), generator=torch.Generator().manual_seed(seed))
            twin.cache.reorder_cache(rows)
            twin.tokens = [twin.tokens[row] for row in rows]

    @rule(which=seeds, repeats=st.integers(1, 3))
    def repeat(self, which: int, repeats: int) -> None:
        twin = self.pick(which)
        if twin.tokens and len(twin.tokens) * repeats <= MAX_BATCH:
            twin.cache.batch_repeat_interleave(repeats)
            twin.tokens = [row for row in twin.tokens for _ in range(repeats)]

    @rule(which=seeds, seed=seeds, boolean=st.booleans())
    def select(self, which: int, seed: int, boolean: bool) -> None:
        twin = self.pick(which)
        if not twin.tokens:
            return
        generator, batch = torch.Generator().manual_seed(seed), len(twin.tokens)
        keep = torch.rand(batch, generator=generator) < 0.7
        keep[seed % batch] = True
        rows = keep.nonzero()[:, 0]
        if not boolean:
            rows = keep = rows[torch.randperm(len(rows), generator=generator)]
        twin.cache.batch_select_indices(keep)
        twin.tokens = [twin.tokens[row] for row in rows]

    @rule(which=seeds)
    def reset(self, which: int) -> None:
        twin = self.pick(which)
        twin.cache.reset()
        twin.tokens, twin.held_from = [], 0

    @precondition(lambda self: len(self.twins) > 1)
    @rule(which=seeds)
    def free(self, which: int) -> None:
        self.touched = None
        del self.twins[which % len(self.twins)]

    @invariant()
    def contents_agree(self) -> None:
        type(self).steps += 1
        #: The same integers and scales: what is rotated back and moved by the centre is rounded in float32.
        rounding = (2 * math.log2(16) + 4) * U if self.conditioned else 0.0
        for twin in self.twins:
            assert twin.cache.get_seq_length() == twin.length
            for index, layer in enumerate(twin.cache.layers):
                if not twin.length:
                    assert layer.keys is None
                    continue
                first = max(twin.length - WINDOW + 1, 0) if layer.is_sliding else 0
                tokens = torch.tensor(twin.tokens)[:, first:]
                is_exact = (torch.arange(first, twin.length) < twin.exact)[None, :, None, None]
                for stored, image, sign in zip((layer.keys, layer.values), self.images(index), (1, -1)):
                    expected = torch.where(is_exact, sign * KEYS[index][tokens], image[tokens]).transpose(1, 2)
                    error = torch.linalg.vector_norm(stored - expected, dim=3)
                    assert (error <= rounding * 3 * torch.linalg.vector_norm(expected, dim=3)).all()

    @invariant()
    def readers_agree(self) -> None:
        """One more step, of 1 to 16 tokens, on a fork of the cache that was touched last."""
        twin = self.touched
        if twin is None or not twin.tokens or twin.length > MAX_LENGTH:
            return
        count = type(self).steps % MAX_DECODE_ROWS + 1
        generator = torch.Generator().manual_seed(type(self).steps)
        new = torch.randint(0, IDS, (len(twin.tokens), count), generator=generator)
        fork = twin.cache.fork()
        for index, layer in enumerate(fork.layers):
            rows = KEYS[index][new].transpose(1, 2)
            try:
                views: Any = fork.update(rows, -rows, index)
            except CacheFullError:
                return
            assert isinstance(layer, PagedInt8Layer)
            keys, values = views
            query = torch.randn(len(new), 4, count, 16, generator=generator)
            visible = visible_keys(count, keys.content.start, layer.length, layer.window)
            other = Attention(query, keys.dense(), values.dense(), visible, 0.25)
            out = layer.attend(query, Scoring(0.25), layer.length)
            assert_same_attention(out, keys, values, other)
            type(self).readings += 1

    @invariant()
    def books_agree(self) -> None:
        for name, allocator in self.pool.allocators.items():
            held: Counter = Counter()
            for twin in self.twins:
                ids = twin.cache._sequences.groups[name].table.ids
                held.update(ids[ids >= 0].tolist())
            counts = [allocator.ref_count(block) for block in range(allocator.num_blocks)]
            assert counts == [held[block] for block in range(allocator.num_blocks)]
            assert allocator.num_free == counts.count(0)
            assert allocator.num_blocks <= MAX_TOKENS // 16

    @invariant()
    def poison_free_blocks(self) -> None:
        for layer in range(2):
            storage = self.pool.storages.get(layer)
            if storage is not None:
                name = "sliding_attention_21" if layer == 0 else "full_attention"
                allocator = self.pool.allocators[name]
                free = [b for b in range(allocator.num_blocks) if not allocator.ref_count(b)]
                fill_blocks(storage, free, 127, torch.nan)

    def teardown(self) -> None:
        self.twins.clear()
        self.touched = None
        for allocator in self.pool.allocators.values():
            assert allocator.num_used == 0


def run_operations(backend: str, conditioned: bool, examples: int, steps: int) -> type[Caches]:
    """Run the state machine; its class counts."""
    kind = type("Caches", (Caches,), {"backend": backend, "conditioned": conditioned})
    always: dict[str, Any] = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    run_state_machine_as_test(kind, settings=settings(max_examples=examples, stateful_step_count=steps, **always))
    return kind


@pytest.mark.slow
@pytest.mark.parametrize("conditioned", [False, True], ids=["plain", "rotated_and_centred"])
def test_any_operations_on_caches_over_one_pool_agree_with_lists_of_tokens(backend: str, conditioned: bool) -> None:
    examples, steps = (3, 20) if backend == "triton" else (70, 50)
    kind = run_operations(backend, conditioned, examples, steps)
    assert kind.steps >= examples * steps / 2
    # An empty cache has nothing to read, and a pool without free blocks no room for the step that would read.
    assert kind.readings  # how many depends on what hypothesis draws
