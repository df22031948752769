"""A pool whose key centres are given instead of taken from the first prompt, as those of continuous batching are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from hf_int8_paged import PagedInt8Pool


class CentredPool(PagedInt8Pool):
    """See above.

    Args:
        centers: mean key of each layer, float32 ``[num_kv_heads, head_dim]``; empty for none.
        rotation: as of `PagedInt8Pool`.
    """

    def __init__(self, centers: Mapping[int, torch.Tensor], rotation: str | None = "hadamard"):
        super().__init__(rotation=rotation, center_keys=bool(centers))
        self.given = centers

    def center(self, layer: int, *_: Any, **__: Any) -> bool:
        if not self.lacks_center(layer):
            return False
        self._centers[layer] = self.given[layer].clone()
        self.storages[layer] = dataclasses.replace(self.storages[layer], key_center=self._centers[layer])
        return True
