"""Layers that hold keys and values and a recurrent state beside them, as in Falcon-H1."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from .layer import PagedInt8Layer
from .sequences.growing import GrowingSequences


class PagedInt8HybridLayer(PagedInt8Layer, LinearAttentionCacheLayerMixin):  # type: ignore[misc,override]
    """Paged int8 keys and values, and transformers' own convolution and recurrent states.

    Args:
        index: the layer's index in the model.
        sequences: lengths and block tables of the cache.
        sliding_window: window in tokens, or ``None`` for full attention.
        number_of_states: convolution and recurrent states of the layer.
    """

    def __init__(
        self, index: int, sequences: GrowingSequences, sliding_window: int | None = None, number_of_states: int = 1
    ) -> None:
        PagedInt8Layer.__init__(self, index, sequences, sliding_window)
        self.linear_part = LinearAttentionLayer(number_of_states=number_of_states)

    def __getattr__(self, name: str) -> Any:
        # The states themselves: transformers reads them from the layer.
        if name == "linear_part":
            raise AttributeError(name)
        return getattr(self.linear_part, name)

    def update_conv_state(self, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.linear_part.update_conv_state(conv_states, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.linear_part.update_recurrent_state(recurrent_states, *args, **kwargs)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.linear_part.is_croppable

    def fork(self, sequences: GrowingSequences) -> PagedInt8HybridLayer:
        twin = super().fork(sequences)
        assert isinstance(twin, PagedInt8HybridLayer)
        twin.linear_part = copy.deepcopy(self.linear_part)
        return twin
