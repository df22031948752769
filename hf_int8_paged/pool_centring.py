"""The centres that a pool subtracts from its layers' keys: when they are set, taken back, and taken over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from .kernels import KvCacheQuant, Segment, mean_key, read_blocks, write_blocks
from .pool_access import PoolAccess

#: Fewer tokens say too little about the mean of a layer's keys.
MIN_CENTER_TOKENS = 16


def enough_for_mean(keys: torch.Tensor, tokens: torch.Tensor | None = None) -> bool:
    """Whether keys ``[batch, num_kv_heads, tokens, head_dim]`` are enough for a mean that says something. ``tokens`` is
    False for padding, bool ``[batch, tokens]`` on the host."""
    return (keys.shape[2] if tokens is None else int(tokens.sum(dim=1).max())) >= MIN_CENTER_TOKENS


class Centring(NamedTuple):
    """How a layer's keys were stored before a step centred them, so that this can be undone.

    Attributes:
        group: the layer's group.
        center: float32 ``[num_kv_heads, head_dim]``, the centre before; None if the pool has none.
        blocks: int64 ids of the blocks that the step stores once more; None if there are none.
        stored: what they held.
    """

    group: str
    center: torch.Tensor | None
    blocks: torch.Tensor | None = None
    stored: Segment | None = None


class PoolCentring:
    """The half of `PagedInt8Pool` that knows of centres. The pool sets these attributes."""

    access: PoolAccess
    storages: dict[int, KvCacheQuant]
    #: The centre of each layer whose keys have been centred, as long as its storage has this very one.
    _centers: dict[int, torch.Tensor]

    def center(
        self,
        layer: int,
        key_states: torch.Tensor,
        only_user: Callable[[], bool],
        tokens: torch.Tensor | None = None,
    ) -> bool:
        """Centre a layer's keys on the mean of these, unless they have been centred before or are too few.

        What is stored keeps the centre it was stored with, so nothing happens while another cache has tokens.

        Args:
            layer: index of the layer.
            key_states: ``[batch, num_kv_heads, tokens, head_dim]``.
            only_user: whether no block of the layer holds a token of another cache; asked while nobody can allocate.
            tokens: bool ``[batch, tokens]`` on the host, False for padding, which does not count; ``None`` without.

        Returns:
            Whether the centre is now another.
        """
        if not self.lacks_center(layer) or not enough_for_mean(key_states, tokens):
            return False
        mean = mean_key(key_states, None if tokens is None else tokens.to(key_states.device))
        with self.access.exclusive():
            if not only_user() or not self.lacks_center(layer):
                return False
            with torch.inference_mode(False):  # kernels read it outside inference mode too
                self._centers[layer] = torch.empty_like(mean).copy_(mean)
                self.storages[layer] = dataclasses.replace(self.storages[layer], key_center=self._centers[layer])
        return True

    def before_centring(self, layer: int, group: str, blocks: torch.Tensor | None = None) -> Centring:
        """What `undo_centring` needs.

        Args:
            layer: index of the layer.
            group: its group.
            blocks: int64 ids of blocks that will be stored once more.
        """
        storage = self.storages[layer]
        if blocks is None:
            return Centring(group, storage.key_center)
        return Centring(group, storage.key_center, blocks, read_blocks(storage, blocks))

    @torch.inference_mode(False)
    def undo_centring(self, layer: int, before: Centring, only_user: Callable[[], bool]) -> bool:
        """Give a layer the centre back that it had, and its blocks what they held.

        Args:
            layer: index of the layer.
            before: what `before_centring` returned.
            only_user: whether no block of the layer holds a token of another cache; asked while nobody can allocate.

        Returns:
            False if blocks had to be restored and cannot, as another cache has stored tokens with the new centre.
        """
        with self.access.exclusive():
            storage = self.storages[layer]
            if storage.key_center is before.center:
                return True
            if not only_user():
                return before.blocks is None
            if before.blocks is not None and before.stored is not None:
                write_blocks(storage, before.blocks, before.stored)
            self.storages[layer] = dataclasses.replace(storage, key_center=before.center)
        return True

    def takes_center(self, layer: int, center: torch.Tensor | None, only_user: Callable[[], bool]) -> bool:
        """Whether `adopt_center`, given the same arguments, would succeed now."""
        with self.access.exclusive():
            return self._has_center(layer, center) or (self.storages[layer].key_center is not None and only_user())

    @torch.inference_mode(False)
    def adopt_center(self, layer: int, center: torch.Tensor | None, only_user: Callable[[], bool]) -> bool:
        """Give a layer the centre of keys that are stored already.

        Args:
            layer: index of the layer.
            center: float32 ``[num_kv_heads, head_dim]``, or None if those keys have not been centred.
            only_user: whether no block of the layer holds a token of another cache; asked while nobody can allocate.

        Returns:
            False if another cache has tokens with another centre.
        """
        with self.access.exclusive():
            if self._has_center(layer, center):
                return True
            storage = self.storages[layer]
            if storage.key_center is None or not only_user():
                return False
            new = torch.zeros_like(storage.key_center) if center is None else storage.key_center.clone().copy_(center)
            if center is not None:
                self._centers[layer] = new
            self.storages[layer] = dataclasses.replace(storage, key_center=new)
        return True

    def _has_center(self, layer: int, center: torch.Tensor | None) -> bool:
        storage = self.storages[layer]
        if center is None or storage.key_center is None:
            return center is None and (storage.key_center is None or self.lacks_center(layer))
        return not self.lacks_center(layer) and torch.equal(center.to(storage.device), storage.key_center)

    def lacks_center(self, layer: int) -> bool:
        """Whether a layer's keys are to be centred and are not yet."""
        storage = self.storages.get(layer)  # which may be away
        center = None if storage is None else storage.key_center
        return center is not None and self._centers.get(layer) is not center
