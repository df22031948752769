"""How much a pool may allocate: limits in tokens and in bytes, and how far it grows within them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch

from .block_allocator import RUN_LENGTH
from .byte_sizes import bytes_as_text
from .full import CacheFullError
from .kernels import KvCacheQuant, format_called, load_backend
from .layer_checks import LayerShape
from .pool_giving_back import HoldsBytes, PoolGivingBack

#: A pool that has to grow grows by at least this fraction, so that growth stays rare.
GROWTH = 0.25
#: Where that does not fit into ``max_bytes``, it takes as many of so many parts of it as do.
_PARTS = 16
#: No sequence has as many tokens.
ANY_LENGTH = (1 << 40) - 1


class PoolBudget(PoolGivingBack):
    """The half of `PagedInt8Pool` that counts bytes. The pool sets these attributes.

    Args:
        max_bytes: most bytes of blocks, of slots that offloaded ones are copied to, and of first tokens; or None.
    """

    block_size: int
    max_tokens: int | None
    format: str

    def __init__(self, max_bytes: int | None):
        self.max_bytes = max_bytes
        #: Window of each group in tokens, or None.
        self.windows: dict[str, int | None] = {}
        #: By group and layer, heads and widths as the config has them, for layers whose first keys have yet to come.
        self.forecast: dict[str, dict[int, tuple[int, int, int]]] = {}
        #: Of all caches.
        self.first_tokens: weakref.WeakSet[HoldsBytes] = weakref.WeakSet()
        self._starts_over = False

    def growth_targets(self, needed: Mapping[str, int], first_tokens: int) -> dict[str, int]:
        """Blocks that each group that has to grow should have; see `PagedInt8Pool.ensure_free`. Where they do not fit,
        memory that nobody uses is given back first."""
        self.start_over_if_refused()
        targets = self._targets_that_fit(needed, first_tokens)
        if targets is None and self._give_back_unused():
            targets = self._targets_that_fit(needed, first_tokens)
        if targets is None:
            least = {group: low for group, (low, _) in self._wanted(needed).items()}
            raise self._full(self._bytes_with(least) + first_tokens, first_tokens)
        return targets

    def _wanted(self, needed: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Of each group that has to grow, the fewest blocks that it can do with, and those that it should have."""
        wanted = {}
        for group, count in needed.items():
            allocator = self.allocators[group]
            if count <= allocator.num_free:
                continue
            least = target = allocator.num_used + count
            if allocator.num_blocks:
                target = max(target, allocator.num_blocks + max(int(allocator.num_blocks * GROWTH), RUN_LENGTH))
            if self.max_tokens is not None:
                most = self.max_tokens // self.block_size
                if least > most:
                    raise CacheFullError(
                        f"the cache needs {least} blocks of {self.block_size} tokens, but "
                        f"max_tokens={self.max_tokens} allows {most}; free sequences, shorten the prompt or raise "
                        "max_tokens"
                    )
                target = min(target, most)
            wanted[group] = least, target
        return wanted

    def _targets_that_fit(self, needed: Mapping[str, int], first_tokens: int) -> dict[str, int] | None:
        """What `growth_targets` returns, or None if it does not fit into ``max_bytes``."""
        wanted = self._wanted(needed)
        if self.max_bytes is None or not (wanted or first_tokens):
            return {group: target for group, (_, target) in wanted.items()}
        for part in range(_PARTS, -1, -1):
            targets = {group: low + (target - low) * part // _PARTS for group, (low, target) in wanted.items()}
            if self._bytes_with(targets) + first_tokens <= self.max_bytes:
                return targets
        return None

    def blocks_that_fit(self, layer: int, group: str, shape: LayerShape) -> int:
        """How many blocks a layer is to have with its first keys: as many as its group.

        Raises:
            CacheFullError: they do not fit into ``max_bytes``, which is found only here where the config says nothing
                of them, or something else.
        """
        blocks = self.allocators[group].num_blocks
        if self.max_bytes is None:
            return blocks
        per_block = self.block_size * self._bytes_per_token(shape[:3])
        bytes_then = self._bytes_in_place_of(layer, blocks * per_block)
        if bytes_then > self.max_bytes and self._give_back_unused():
            blocks = self.allocators[group].num_blocks
            bytes_then = self._bytes_in_place_of(layer, blocks * per_block)
        if bytes_then > self.max_bytes:
            # Other layers have got as many blocks: when the tokens are gone, a shorter prompt must find room.
            self._starts_over = True
            raise self._full(bytes_then, 0 if self.forecast.get(group, {}).get(layer) == shape[:3] else None)
        return blocks

    def _bytes_in_place_of(self, layer: int, size: int) -> int:
        """Bytes held while a layer's old blocks are still there beside the new ones, which have this size."""
        replaced = self.storages.get(layer)
        sizes = self._sizes_with({}) | {layer: size}
        return self._bytes_of(sizes) + (0 if replaced is None else replaced.nbytes)

    def hold(self, kept: HoldsBytes) -> None:
        """Count first tokens for ``max_bytes`` from now on, for as long as they live.

        Raises:
            CacheFullError: they do not fit.
        """
        if self.max_bytes is None:
            return
        with self.access.exclusive():
            if self.bytes_held + kept.nbytes > self.max_bytes:
                self._give_back_unused()
            if self.bytes_held + kept.nbytes > self.max_bytes:
                self._starts_over = True  # as above
                raise self._full(self.bytes_held + kept.nbytes, 0)
            self.first_tokens.add(kept)

    @property
    def bytes_held(self) -> int:
        """Bytes that count for ``max_bytes``: of all blocks, of the slots that offloaded ones are copied to, and of all
        caches' first tokens in full precision."""
        return self._bytes_of({layer: storage.nbytes for layer, storage in self.storages.items()})

    def look_at(self, layer: int) -> KvCacheQuant:
        """A layer's blocks for who asks what they are like, not what they hold: they may be away."""
        storage = self.storages.get(layer)
        assert storage is not None, f"layer {layer} holds nothing yet"
        return storage

    def tokens_for(self, max_bytes: int) -> int:
        """Tokens of one sequence that so many bytes hold, as far as sizes of layers are known; `ANY_LENGTH` if as many
        as one likes."""

        def size(tokens: int) -> int:
            blocks, sizes = -(-tokens // self.block_size), dict[int, int]()
            for group, window in self.windows.items():
                held = blocks if window is None else min(blocks, -(-window // self.block_size) + 1)
                sizes |= {layer: held * per_block for layer, per_block in self._bytes_per_block(group).items()}
            return self._bytes_of(sizes, with_first_tokens=False)

        low, high = 0, ANY_LENGTH + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if size(middle) <= max_bytes else (low, middle)
        return low

    def first_tokens_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes that all layers keep of so many tokens in full precision, as far as their sizes are known."""
        if self.max_bytes is None:
            return 0
        shapes = {layer: shape for layers in self.forecast.values() for layer, shape in layers.items()}
        shapes |= {layer: (x.num_kv_heads, x.head_dim, x.v_head_dim) for layer, x in self.storages.items()}
        return tokens * dtype.itemsize * sum(heads * (dim + v_dim) for heads, dim, v_dim in shapes.values())

    def _bytes_per_token(self, shape: tuple[int, int, int]) -> int:
        return format_called(self.format).bytes_per_token(*shape)

    def _bytes_per_block(self, group: str) -> dict[int, int]:
        """Of each layer of a group, also of those that are forecast."""
        per_token = {layer: self._bytes_per_token(shape) for layer, shape in self.forecast.get(group, {}).items()}
        per_token |= {layer: self.look_at(layer).bytes_per_token for layer in self._members[group]}
        return {layer: self.block_size * size for layer, size in per_token.items()}

    def _sizes_with(self, targets: Mapping[str, int]) -> dict[int, int]:
        """Bytes of each layer's blocks once these groups have grown, also of layers that are forecast."""
        sizes = {layer: storage.nbytes for layer, storage in self.storages.items()}
        for group, allocator in self.allocators.items():
            target = targets.get(group, allocator.num_blocks)
            for layer, per_block in self._bytes_per_block(group).items():
                sizes[layer] = max(sizes.get(layer, 0), target * per_block)
        return sizes

    def _bytes_of(self, sizes: Mapping[int, int], with_first_tokens: bool = True) -> int:
        """Bytes that count for ``max_bytes`` while layers have these sizes."""
        slots = 0 if self.offloaded is None else self.offloaded.bytes_beside(sizes)
        kept = sum(kept.nbytes for kept in list(self.first_tokens)) if with_first_tokens else 0
        return sum(sizes.values()) + slots + kept

    def _bytes_with(self, targets: Mapping[str, int]) -> int:
        """Bytes held at most while these groups grow, and with all layers that are forecast."""
        sizes = self._sizes_with(targets)
        # The old memory of a layer without segments is there until all is copied.
        copied = [
            storage.nbytes
            for layer, storage in self.storages.items()
            if sizes[layer] > storage.nbytes and not load_backend(storage.backend).SEGMENTS
        ]
        return self._bytes_of(sizes) + max(copied, default=0)

    def _full(self, bytes_then: int, first_tokens: int | None) -> CacheFullError:
        """The error for a step that would need so many bytes, of which so many are of first tokens; None where sizes
        of layers are not known."""
        assert self.max_bytes is not None
        holds, unused = "", self._is_unused()
        if self.forecast and first_tokens is not None:
            kept = sum(kept.nbytes for kept in list(self.first_tokens))
            tokens = self.tokens_for(self.max_bytes - first_tokens - kept)
            holds = f", which holds {tokens} tokens of one sequence"
            if tokens == ANY_LENGTH:
                holds = ", which holds one sequence of any length, as every layer has a window"
        free = [f"{x.num_free} blocks of {group}" for group, x in self.allocators.items() if x.num_free]
        if free and not unused:
            holds += f"; {' and '.join(free)} are free, but for nothing else while the pool holds any sequence"
        return CacheFullError(
            f"the cache needs {bytes_then} bytes ({bytes_as_text(bytes_then)}), but max_bytes={self.max_bytes} "
            f"({bytes_as_text(self.max_bytes)}){holds}; {'take fewer' if unused else 'free'} sequences, shorten the "
            "prompt or raise max_bytes"
        )
