"""The sequences of one cache: a block table per layer group, all advanced together, before any layer writes."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from .block_table import BlockTable
from .kernels import MAX_DECODE_ROWS
from .pool import CacheFullError, PagedInt8Pool


class HasLength(Protocol):
    """What `Sequences` needs to know of a layer."""

    index: int
    length: int


class StepTensors(NamedTuple):
    """Block ids, int32 ``[batch, columns]``, and context lengths before and after the step, int32 ``[batch]``."""

    block_table: torch.Tensor
    lens_before: torch.Tensor
    lens: torch.Tensor


class Group:
    """The layers of one cache that share a block table: the same window, or none.

    Args:
        name: the pool's name for the group.
        table: block table of the group's layers.
        window: sliding window in tokens (a query sees ``window`` positions, its own included), or ``None``.
    """

    def __init__(self, name: str, table: BlockTable, window: int | None):
        self.name = name
        self.table = table
        self.window = window
        #: Counts the times that tokens were dropped or moved; views made before are no longer valid.
        self.epoch = 0
        self._step_tensors: dict[torch.device, StepTensors] = {}

    def first_visible(self, position: int) -> int:
        """First position that a query at ``position`` sees."""
        return 0 if self.window is None else max(position - self.window + 1, 0)

    def changed(self) -> None:
        """Note that lengths or blocks are no longer what they were at the last step."""
        self._step_tensors.clear()

    def step_tensors(self, device: torch.device, start: int) -> StepTensors:
        """What the kernels need to know of the sequences, on ``device``: made once per step for all layers.

        Args:
            device: where the layer's blocks are.
            start: position of the step's first token.
        """
        tensors = self._step_tensors.get(device)
        if tensors is None:
            batch = self.table.batch_size
            tensors = self._step_tensors[device] = StepTensors(
                self.table.ids_on(device),
                torch.full((batch,), start, dtype=torch.int32, device=device),
                torch.full((batch,), self.table.length, dtype=torch.int32, device=device),
            )
        return tensors


class Sequences:
    """Lengths and block tables of one cache's sequences.

    The first layer that a forward pass updates calls `advance`, which finds blocks for the new tokens in
    every group. If that fails, nothing has changed; after it, no layer can run out of blocks.
    """

    def __init__(self, pool: PagedInt8Pool, max_cache_len: int | None = None):
        self.pool = pool
        self.max_cache_len = max_cache_len
        self.groups: dict[str, Group] = {}
        self.layers: list[HasLength] = []
        self.length = 0
        self.batch_size: int | None = None
        #: Where the newest tokens start, and whether attention reads them from the blocks.
        self.step_start = 0
        self.from_blocks = False

    def add_group(self, window: int | None) -> Group:
        """The group of layers with this window, made if need be."""
        name = "full_attention" if window is None else f"sliding_attention_{window}"
        if name not in self.groups:
            table = BlockTable(self.pool.add_group(name), self.pool.block_size)
            self.groups[name] = Group(name, table, window)
        return self.groups[name]

    def advance(self, batch: int, new_tokens: int) -> None:
        """Find blocks for ``new_tokens`` more tokens per sequence, in every group.

        Raises:
            ValueError: the batch size changed, or the last forward pass left layers out.
            CacheFullError: ``max_cache_len`` or the pool's budget would be exceeded.
        """
        if self.batch_size not in (None, batch):
            raise ValueError(
                f"the cache holds {self.batch_size} sequences, but keys of {batch} came; "
                "use one cache per batch, or reset() it first"
            )
        left_out = [layer.index for layer in self.layers if layer.length != self.length]
        if left_out:
            raise ValueError(
                f"the cache was made for {len(self.layers)} attention layers, but the model updated only "
                f"{len(self.layers) - len(left_out)} of them (not layer {left_out[0]}): another model's cache, or a "
                "forward pass that was interrupted; make the cache from this model's config, or reset() it"
            )
        start, stop = self.length, self.length + new_tokens
        if self.max_cache_len is not None and stop > self.max_cache_len:
            raise CacheFullError(
                f"{stop} tokens per sequence asked for, but max_cache_len is {self.max_cache_len}; the cache still "
                f"holds {start}; shorten the prompt, lower max_new_tokens or raise max_cache_len"
            )
        # Short steps read their own tokens from the blocks, like every later token does. Long chunks and first
        # prompts have them at hand in full precision.
        from_blocks = start > 0 and new_tokens <= MAX_DECODE_ROWS
        keep_from, needed = {}, {}
        for name, group in self.groups.items():
            group.epoch += group.table.drop_before(group.first_visible(start))
            keep_from[name] = 0 if from_blocks else group.first_visible(stop)
            needed[name] = group.table.blocks_needed(batch, new_tokens, keep_from[name])
        self.pool.ensure_free(needed)
        for name, group in self.groups.items():
            self.pool.copy(name, group.table.extend(batch, new_tokens, keep_from[name]))
            group.changed()
        self.step_start, self.length, self.batch_size, self.from_blocks = start, stop, batch, from_blocks

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        for group in self.groups.values():
            group.table.truncate(length)
            group.epoch += 1
            group.changed()
        self.length = length
        if length == 0:
            self.clear()

    def clear(self) -> None:
        """Forget all sequences and give their blocks back to the pool."""
        for group in self.groups.values():
            group.table.clear()
            group.epoch += 1
            group.changed()
        self.length = self.step_start = 0
        self.batch_size = None
