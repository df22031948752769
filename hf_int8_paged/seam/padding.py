"""What the mask function knows of padding, on its way to the next step of the same forward pass.

transformers asks a cache how many keys a mask covers, makes the mask, and then calls the layers. So the cache that was
asked last in this thread is the one whose mask is made next, and its first layer finds there what the mask says.
"""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import numpy as np
import torch


class Asked(NamedTuple):
    """A cache's answer.

    Attributes:
        padding: of the cache.
        sizes: number of keys that the mask covers, and the position of the first.
    """

    padding: Padding
    sizes: tuple[int, int]


_local = threading.local()


class Padding:
    """Of one cache: which positions of its next step are tokens, once a mask function has said so."""

    def __init__(self) -> None:
        self._note: tuple[torch.Tensor, weakref.ref[torch.Tensor], int] | None = None

    def asked(self, sizes: tuple[int, int]) -> tuple[int, int]:
        """A mask of these sizes is made next for this cache, in this thread. Returns ``sizes``."""
        _local.asked = weakref.ref(self), sizes
        return sizes

    def leave(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Note which positions are tokens.

        Args:
            tokens: bool ``[batch, positions]``, False for padding, from the first position of the sequences on.
            mask: that was made of it. The note is worth nothing when it is gone, or somebody has written into it.
        """
        of = tokens if mask is None else mask
        self._note = tokens, weakref.ref(of), version(of)

    def take(self, batch: int, length: int) -> np.ndarray | None:
        """The note for a step up to position ``length``: bool ``[batch, length]`` on the host, or None. Reading it
        waits for the device, once per padded prompt. The next step finds none."""
        note, self._note = self._note, None
        if note is None:
            return None
        tokens, (mask, made) = note[0], (note[1](), note[2])
        if mask is None or version(mask) != made or len(tokens) != batch or tokens.shape[1] < length:
            return None
        return tokens[:, :length].cpu().numpy()

    def __reduce__(self) -> tuple:
        # A copy of a cache begins a step of its own.
        return Padding, ()


def last_asked() -> Asked | None:
    """The cache that was asked last in this thread, and its answer, if no mask has been made since."""
    asked: tuple[weakref.ref[Padding], tuple[int, int]] | None = getattr(_local, "asked", None)
    _local.asked = None
    padding = None if asked is None else asked[0]()
    return None if asked is None or padding is None else Asked(padding, asked[1])


def version(mask: torch.Tensor) -> int:
    """The mask's version counter. Tensors made in inference mode have none, and the compiler knows of none."""
    return 0 if torch.compiler.is_compiling() or mask.is_inference() else mask._version
