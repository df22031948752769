"""Random sequences of what `generate` and users do to caches: every step's attention is read by two readers, and what
is stored is compared with the fake-quantized dense cache."""

from __future__ import annotations

import copy
import random
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Gemma2Config
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from hf_int8_paged import CacheFullError, PagedInt8Pool
from hf_int8_paged.layer import PagedInt8Layer
from hf_int8_paged.options import PoolOptions
from hf_int8_paged.seam.attention import int8_paged_attention
from hf_int8_paged.seam.mask_function import int8_paged_mask
from tests.kernels.helpers import device_of

from .shadowed_cache import ShadowedCache
from .two_readers import Attention, assert_same_attention, visible_keys

LAYERS, MAX_BATCH, MAX_LENGTH, MAX_CACHES = 2, 8, 110, 4
#: What two layers are: as Llama's, Mistral's, Gemma's, and two windows.
KINDS = {
    "full": ("full_attention", "full_attention"),
    "window": ("sliding_attention", "sliding_attention"),
    "mixed": ("sliding_attention", "full_attention"),
}
#: Operations, and how often each is drawn.
OPERATIONS = {
    "step": 6, "chunk": 2, "crop": 3, "reorder": 4, "repeat": 2, "select": 3, "fork": 2, "another_cache": 1,
    "drop": 1, "reset": 1, "activate_past_recording": 1, "save_and_load": 2,
}  # fmt: skip


def pool_options(pool: PagedInt8Pool) -> dict[str, Any]:
    """Arguments that make such a pool."""
    return {name: getattr(pool, name) for name in PoolOptions._fields}


class Branch:
    """A cache, and the mask of its tokens, bool ``[batch, tokens]``; None before the first prompt."""

    def __init__(self, cache: ShadowedCache):
        self.cache = cache
        self.mask: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.mask is None else self.mask.shape[1]


class OperationSequence:
    """One random sequence of operations over caches that share a pool.

    Args:
        seed: draws everything.
        backend: of the kernels.
    """

    def __init__(self, seed: int, backend: str):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device_of(backend)
        draw = self.random
        self.heads, self.group = draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
        self.dims = draw.choice([(16, 16), (16, 16), (32, 16), (48, 64)])
        self.softcap = draw.choice([None, None, 5.0])
        self.sinks = torch.randn(self.heads * self.group, generator=self.generator) if draw.random() < 0.2 else None
        self.config = Gemma2Config(
            num_hidden_layers=LAYERS,
            layer_types=list(KINDS[draw.choice(sorted(KINDS))]),
            sliding_window=draw.choice([7, 21, 40]),
        )
        self.pool = PagedInt8Pool(
            block_size=draw.choice([16, 16, 32]),
            backend=backend,
            max_tokens=draw.choice([None, None, 1024]),
            rotation=draw.choice(["hadamard", "hadamard", None]),
            center_keys=draw.random() < 0.7,
        )
        #: A model's keys have a mean that is not 0, which is why they are centred.
        self.mean = torch.randn(LAYERS, 1, self.heads, 1, self.dims[0], generator=self.generator)
        #: Where keys are centred late, whoever else holds blocks of the pool decides whether they are; then there is
        #: one cache only, and it has first tokens by which the paged cache knows its padding.
        self.alone = self.pool.center_keys and draw.random() < 0.3
        self.branches = [self.new_branch()]
        self.counts: Counter[str] = Counter()

    def new_branch(self) -> Branch:
        sink_tokens = self.random.choice([1, 1, 4] if self.alone else [0, 1, 1, 4])
        return Branch(ShadowedCache(self.config, pool=self.pool, sink_tokens=sink_tokens))

    def run(self, operations: int) -> Counter[str]:
        """Do that many operations; returns how often what was done and compared."""
        names, weights = zip(*OPERATIONS.items())
        self.forward(self.branches[0])
        for name in self.random.choices(names, weights, k=operations):
            branch = self.random.choice(self.branches)
            if branch.mask is None and name != "another_cache":
                name = "first prompt"
                self.forward(branch)
            else:
                getattr(self, name)(branch)
            self.counts[name] += 1
            if branch in self.branches and branch.mask is not None:
                self.read(branch)
        for branch in self.branches:
            branch.cache.check()
            if branch.mask is not None:
                self.read(branch)
        return self.counts

    # -- operations ------------------------------------------------------------------------------------------------

    def step(self, branch: Branch) -> None:
        self.forward(branch, self.random.choice([1, 1, 1, self.random.randint(2, 20)]))

    def chunk(self, branch: Branch) -> None:
        self.forward(branch, self.random.randint(17, 40))

    def crop(self, branch: Branch) -> None:
        assert branch.mask is not None
        count = self.random.choice([0, 1, 3, 9, 25])
        try:
            branch.cache.crop(-count)
        except RuntimeError:  # gone out of a window
            self.counts["refused"] += 1
            return
        length = max(branch.length - count, 0)
        branch.mask = branch.mask[:, :length] if length else None

    def reorder(self, branch: Branch) -> None:
        batch = self.batch_of(branch)
        self.on_rows(branch, rows := torch.randint(0, batch, (batch,), generator=self.generator))
        branch.cache.reorder_cache(rows)

    def repeat(self, branch: Branch) -> None:
        repeats = self.random.randint(1, max(1, min(3, MAX_BATCH // self.batch_of(branch))))
        self.on_rows(branch, torch.arange(self.batch_of(branch)).repeat_interleave(repeats))
        branch.cache.batch_repeat_interleave(repeats)

    def select(self, branch: Branch) -> None:
        batch = self.batch_of(branch)
        rows = torch.randperm(batch, generator=self.generator)[: self.random.randint(1, batch)]
        keep = torch.zeros(batch, dtype=torch.bool).index_fill(0, rows, True)
        boolean = self.random.random() < 0.5
        self.on_rows(branch, keep.nonzero()[:, 0] if boolean else rows)
        branch.cache.batch_select_indices(keep if boolean else rows)

    def fork(self, branch: Branch) -> None:
        if self.alone or len(self.branches) == MAX_CACHES:
            return
        cache = copy.deepcopy(branch.cache) if self.random.random() < 0.5 else branch.cache.fork()
        twin = Branch(cache)
        twin.mask = branch.mask
        self.branches.append(twin)

    def another_cache(self, branch: Branch) -> None:
        if not self.alone and len(self.branches) < MAX_CACHES:
            self.branches.append(self.new_branch())

    def drop(self, branch: Branch) -> None:
        if len(self.branches) > 1:
            self.branches.remove(branch)

    def reset(self, branch: Branch) -> None:
        branch.cache.reset()
        branch.mask = None

    def activate_past_recording(self, branch: Branch) -> None:
        branch.cache.activate_past_recording()

    def save_and_load(self, branch: Branch) -> None:
        """Goes on with what a file holds, in the same pool or in another one."""
        before = branch.cache
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            before.save(path)
            pool = self.pool if self.alone or self.random.random() < 0.5 else PagedInt8Pool(**pool_options(self.pool))
            try:
                branch.cache = ShadowedCache.load(path, self.config, pool, device=self.device)
            except CacheFullError:
                self.counts["full"] += 1
                return
        branch.cache.take_shadow(before)

    # -- internals -------------------------------------------------------------------------------------------------

    @staticmethod
    def batch_of(branch: Branch) -> int:
        assert branch.mask is not None
        return len(branch.mask)

    @staticmethod
    def on_rows(branch: Branch, rows: torch.Tensor) -> None:
        assert branch.mask is not None
        branch.mask = branch.mask[rows]

    def prompt_mask(self) -> torch.Tensor:
        """Of a first prompt: 1 to 5 sequences, some behind padding."""
        batch = self.random.randint(1, 5)
        least = 1 if self.alone or not self.pool.center_keys else 16
        padding = [self.random.choice([0, self.random.randint(0, 40)]) for _ in range(batch)]
        if self.random.random() < 0.5:
            padding = [0] * batch
        tokens = max(padding) + self.random.randint(least, 45)
        return torch.arange(tokens) >= torch.tensor(padding)[:, None]

    def forward(self, branch: Branch, count: int = 0) -> None:
        """A step of ``count`` tokens, or a first prompt, as a model does it."""
        count = min(count, MAX_LENGTH - branch.length)
        if branch.mask is None:
            mask = self.prompt_mask()
            branch.cache.set_padding((~mask).sum(1).tolist() if not mask.all() else ())
        elif count <= 0:
            return
        else:
            mask = torch.nn.functional.pad(branch.mask, (0, count), value=True)
        try:
            self.attend(branch.cache, mask, mask.shape[1] - branch.length)
        except CacheFullError:
            self.counts["full"] += 1
            return
        branch.mask = mask

    def read(self, branch: Branch) -> None:
        """The next step's attention, on a fork: it changes nothing."""
        assert branch.mask is not None
        count = self.random.choice([1, 1, 2, 5, 16, 20])
        if self.alone and any(self.pool.lacks_center(index) for index in range(LAYERS)):
            return  # a fork that reaches 16 tokens is not alone
        try:
            mask = torch.nn.functional.pad(branch.mask, (0, count), value=True)
            self.attend(branch.cache.fork(), mask, count)
        except CacheFullError:
            self.counts["full"] += 1

    def attend(self, cache: ShadowedCache, mask: torch.Tensor, count: int) -> None:
        """All layers' updates and attention, by both readers."""
        batch, stop = mask.shape
        alike = self.random.random() < 0.3  # as beams of one prompt are
        padded = None if mask.all() else mask
        for index, layer in enumerate(cache.layers):
            assert isinstance(layer, PagedInt8Layer)
            sizes = [(self.heads, self.dims[0]), (self.heads, self.dims[1]), (self.heads * self.group, self.dims[0])]
            k, v, q = (torch.randn(batch, n, count, d, generator=self.generator) for n, d in sizes)
            k += self.mean[index]
            if alike:
                k[1:], v[1:] = k[:1], v[:1]
            k, v, q = (x.to(self.device) for x in (k, v, q))
            pattern: Any = causal_mask_function
            if layer.window is not None:
                pattern = sliding_window_causal_mask_function(layer.window)
            width, offset = layer.get_mask_sizes(count)
            shown = int8_paged_mask(
                batch, count, width, stop - count, offset, pattern,
                None if padded is None else padded.to(self.device), layer.window, device=self.device,
            )  # fmt: skip
            keys, values = cache.update(k, v, index)
            scale = self.dims[0] ** -0.5
            visible = visible_keys(count, offset, stop, layer.window, padded)
            other = Attention(q, keys.dense(), values.dense(), visible, scale, self.softcap, self.sinks)
            sinks = None if self.sinks is None else self.sinks.to(self.device)
            module: Any = SimpleNamespace(is_causal=True, num_key_value_groups=self.group, training=False)
            out, _ = int8_paged_attention(
                module, q, keys, values, shown, scaling=scale, softcap=self.softcap, s_aux=sinks
            )
            assert_same_attention(out, keys, values, other)
            self.counts["readings"] += 1
