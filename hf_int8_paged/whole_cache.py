"""Operations that no single layer can do: layers share their sequences."""

from __future__ import annotations

import torch


class OfTheWholeCache:
    """A layer that refuses what only its cache can do."""

    def reset(self) -> None:
        raise NotImplementedError("layers share their sequences; call reset() of the cache")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise NotImplementedError("layers share their sequences; call reorder_cache() of the cache")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("layers share their sequences; call crop() of the cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise NotImplementedError("layers share their sequences; call batch_repeat_interleave() of the cache")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise NotImplementedError("layers share their sequences; call batch_select_indices() of the cache")

    def activate_past_recording(self) -> None:
        raise NotImplementedError("layers share their sequences; call activate_past_recording() of the cache")
