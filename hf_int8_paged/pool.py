"""The blocks of all layers: storage, growth, budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch

from .block_allocator import BlockAllocator
from .kernels import (
    KvCacheQuant,
    alloc_paged_int8_layer,
    copy_blocks,
    grow_paged_int8_layer,
)
from .layer_checks import LayerShape
from .offloading.far_side import WhichBlocks
from .offloading.storages import OffloadedStorages
from .options import PoolOptions
from .pool_access import PoolAccess
from .pool_budget import PoolBudget
from .pool_centring import PoolCentring


class PagedInt8Pool(PoolBudget, PoolCentring):
    """Paged int8 storage of a model's layers.

    Layers of one *group* (all full-attention layers, or all layers of one sliding window) use the same
    block ids, each in its own tensors, so one block table serves them all.

    Several caches of one model may share a pool, and with it the blocks of forked prefixes. Each of them may be used by
    another thread: `access` says who may touch the pool when.

    Args:
        block_size: tokens per block, a multiple of 16.
        backend: name of the kernel backend, or ``None`` for the best one of each layer's device.
        max_tokens: slots that any group may have at most (a hard limit), or ``None``.
        rotation: ``"hadamard"`` rotates rows before quantization, ``None`` does not.
        center_keys: whether the mean of a layer's first tokens is subtracted from its keys before quantization.
        format: name of the storage format (`kernels.Format`).
        max_bytes: most bytes that are allocated for blocks, and for first tokens in full precision of all caches
            (a hard limit): a number, or a text such as ``"8GiB"``; ``None`` sets no limit. Blocks count wherever they
            are, and so do the slots that offloaded ones are copied to.
        offloading: whether layers leave their device until they are needed: those of the CPU for files that are mapped
            into memory, those of another device for the host's memory.
        offload_only_non_sliding: whether layers with a window stay.
        resident_layers: so many of the layers that could leave stay, the first ones.
        offload_folder: for the files; ``None`` takes the system's folder for temporary files.

    Raises:
        TypeError, ValueError: an option is of the wrong kind or out of range.
    """

    def __init__(
        self,
        block_size: int = 16,
        backend: str | None = None,
        max_tokens: int | None = None,
        rotation: str | None = "hadamard",
        center_keys: bool = True,
        format: str = "int8",
        max_bytes: int | str | None = None,
        *,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
        resident_layers: int = 0,
        offload_folder: str | os.PathLike | None = None,
    ):
        options = PoolOptions(
            block_size, backend, max_tokens, rotation, center_keys, format, max_bytes, offloading,
            offload_only_non_sliding, resident_layers, offload_folder,
        ).checked()  # fmt: skip
        self.block_size, self.backend, self.max_tokens, self.rotation, self.center_keys, self.format = options[:6]
        PoolBudget.__init__(self, options.max_bytes)  # type: ignore[arg-type]
        self.allocators: dict[str, BlockAllocator] = {}
        self.access = PoolAccess(self.allocators)
        #: The centre of each layer whose keys have been centred, as long as its storage has this very one.
        self._centers: dict[int, torch.Tensor] = {}
        #: By layer, the blocks as they are now; growth replaces the object. Nothing before the layer's first token.
        self.storages: dict[int, KvCacheQuant] = {}
        self.offloading, self.offload_only_non_sliding, self.resident_layers, self.offload_folder = options[7:]
        self._members: dict[str, list[int]] = {}
        #: The same with ``offloading``, else None.
        self.offloaded: OffloadedStorages | None = None
        if options.offloading:
            self.storages = self.offloaded = OffloadedStorages(
                options.resident_layers,
                options.offload_only_non_sliding,
                options.offload_folder,  # type: ignore[arg-type]
                partial(_blocks_in_use, self.allocators, self._members),
            )

    def add_group(self, group: str, window: int | None) -> BlockAllocator:
        """The allocator of ``group``, the layers with this window, made if need be."""
        with self.access.exclusive():
            self._members.setdefault(group, [])
            self.windows[group] = window
            return self.allocators.setdefault(group, BlockAllocator(settle=self.access.settle))

    @torch.inference_mode(False)  # blocks may be written to outside it later, which inference tensors refuse
    def add_layer(
        self,
        layer: int,
        group: str,
        mine: LayerShape,
        only_user: Callable[[], bool],
    ) -> str:
        """Allocate a layer's blocks with the heads, widths and device of its first keys and values, unless it has them.
        Returns the name of their backend.

        Args:
            layer: index of the layer.
            group: its group, which says how many blocks.
            mine: heads, widths and device.
            only_user: whether no block of the layer holds a token of another cache; asked while nobody can allocate.

        Raises:
            ValueError: another cache of this pool uses the layer with another window, with other heads or widths, or on
                another device.
            CacheFullError: the layer does not fit into ``max_bytes``.
        """
        with self.access.exclusive():
            self.start_over_if_refused()
            held = self.storages.get(layer)
            theirs = None
            if held is not None:
                device = held.device if self.offloaded is None else self.offloaded.device_of(layer)
                theirs = LayerShape(held.num_kv_heads, held.head_dim, held.v_head_dim, device)
            if held is not None and mine == theirs and layer in self._members[group]:
                return held.backend
            others = [name for name, layers in self._members.items() if name != group and layer in layers]
            if any(self.allocators[name].num_used for name in others):
                raise ValueError(
                    f"layer {layer} of this pool holds tokens as one of {', '.join(others)}, but keys came for one of "
                    f"{group}; use one pool per model"
                )
            if theirs is None or mine == theirs or only_user():
                empty = None if self.offloaded is None else self.offloaded.memory_for(layer, mine.device)
                blocks = self.blocks_that_fit(layer, group, mine)
                try:
                    new = alloc_paged_int8_layer(
                        blocks,
                        self.block_size,
                        mine.num_kv_heads,
                        mine.head_dim,
                        v_head_dim=mine.v_head_dim,
                        device=mine.device,
                        backend=self.backend,
                        rotation=self.rotation,
                        center_keys=self.center_keys,
                        format=self.format,
                        empty=empty,
                    )
                except BaseException:
                    # Other layers have got as many blocks: when the tokens are gone, a shorter prompt must find room.
                    self._starts_over = True
                    raise
                self.storages[layer] = new
                for name in others:
                    self._members[name].remove(layer)
                if layer not in self._members[group]:
                    self._members[group].append(layer)
                return new.backend
        assert theirs is not None
        raise ValueError(
            f"layer {layer} of this pool has {theirs[0]} KV heads of widths {theirs[1]} and {theirs[2]} on "
            f"{theirs[3]}, but keys with {mine[0]} heads of widths {mine[1]} and {mine[2]} came on {mine[3]}; "
            "use one pool per model"
        )

    def ensure_free(self, needed: Mapping[str, int], first_tokens: int = 0) -> None:
        """Make sure that each group has the given number of free blocks; grow where it has not. Call it inside
        ``access.exclusive()``.

        Args:
            needed: blocks, by group.
            first_tokens: bytes of tokens in full precision that the step will keep besides.

        Raises:
            CacheFullError: a group would exceed ``max_tokens``, or all together ``max_bytes``. No group has grown then.
        """
        targets = self.growth_targets(needed, first_tokens)
        if not targets:
            return
        # Blocks may be written to outside inference mode later, which inference tensors refuse.
        with self.access.growing(), torch.inference_mode(False):
            for group, target in targets.items():
                for layer in self._members[group]:
                    if self.look_at(layer).num_blocks < target:  # an interrupted growth may have come this far
                        held = self.storages[layer] if self.offloaded is None else self.offloaded.home(layer)
                        self.storages[layer] = grow_paged_int8_layer(held, target)
                self.allocators[group].grow(target)

    def copy(self, group: str, pairs: np.ndarray) -> None:
        """Copy blocks in all layers of a group. Call it inside ``access.exclusive()``.

        Args:
            group: its name.
            pairs: int32 ``[copies, 2]``: source and destination of each copy.
        """
        if not len(pairs):
            return
        src, dst = torch.from_numpy(np.ascontiguousarray(pairs.T))
        for layer in self._members[group]:
            storage = self.to_write(layer, lambda: pairs[:, 1])
            copy_blocks(storage, src.to(storage.device), dst.to(storage.device))

    def to_write(self, layer: int, which: WhichBlocks) -> KvCacheQuant:
        """A layer's blocks, of which those that ``which`` names are about to be written to."""
        return self.storages[layer] if self.offloaded is None else self.offloaded.writing(layer, which)

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of int8 values and scales allocated, all layers, and of the slots that offloaded ones are copied to."""
        slots = 0 if self.offloaded is None else self.offloaded.nbytes_beside
        return sum(storage.nbytes for storage in list(self.storages.values())) + slots

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks that hold tokens, all layers."""
        return sum(
            self.allocators[group].num_used * self.block_size * self.look_at(layer).bytes_per_token
            for group, layers in self._members.items()
            for layer in layers
        )


def _blocks_in_use(allocators: Mapping[str, BlockAllocator], members: Mapping[str, list[int]], layer: int) -> int:
    """One more than the last of a layer's blocks that holds tokens."""
    return max((allocators[group].end for group, layers in members.items() if layer in layers), default=0)
