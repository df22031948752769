"""`PagedInt8Cache` with its oracle beside it: every operation is done to both, and after every update what a layer
stores is compared with the fake-quantized dense layer that got the same keys and values."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from eval._fake_quantized import FakeQuantizedLayer
from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.layer import PagedInt8Layer
from hf_int8_paged.seam.views import PagedView
from tests.models import FakeQuantizedCache

from .two_readers import U


class ShadowedCache(PagedInt8Cache):
    """A growing cache that raises ``AssertionError`` where it differs from `FakeQuantizedCache`.

    Args:
        config: of the model.
        padding: tokens of left padding in front of each sequence, where the attention function shows the cache the
            mask; what is stored of padding is not compared.
        options: those of `PagedInt8Cache`.
    """

    def __init__(self, config: PreTrainedConfig, padding: Sequence[int] = (), **options: Any):
        super().__init__(config, **options)
        self.sink_tokens = options.get("sink_tokens", 1)
        self.shadow = FakeQuantizedCache(
            config, rotation=self.pool.rotation, center_keys=self.pool.center_keys, sink_tokens=self.sink_tokens
        )
        self.set_padding(padding)
        #: Layers whose keys were centred after some of them had been stored: those were rounded a second time.
        self.rounded_twice: set[int] = set()
        self.comparisons = 0

    def set_padding(self, padding: Sequence[int]) -> None:
        """Tokens of left padding of the prompt that comes next."""
        self.padding = list(padding)
        for layer in self._shadows().values():
            layer.padding = self.padding

    def _shadows(self) -> dict[int, FakeQuantizedLayer]:
        return {i: x for i, x in enumerate(self.shadow.layers) if isinstance(x, FakeQuantizedLayer)}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        layer, shadow = self.layers[layer_idx], self._shadows().get(layer_idx)
        if not isinstance(layer, PagedInt8Layer) or shadow is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        past = shadow.get_seq_length()
        held = self.pool.storages.get(layer_idx)
        if not past and held is not None and held.key_center is not None and not self.pool.lacks_center(layer_idx):
            # A layer's centre is the pool's for life.
            shadow.center, shadow.center_keys = held.key_center.clone(), False
        views = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        was_centred = shadow.center is not None
        dense = shadow.update(key_states.detach(), value_states.detach())
        if past and shadow.center is not None and not was_centred:
            self.rounded_twice.add(layer_idx)
        first = layer.room.first_shown(past)
        for view, expected in zip(views, dense):
            keys = view.dense() if isinstance(view, PagedView) else view
            self._compare(keys, expected, first, layer_idx)
        return views

    def check(self) -> None:
        """Compare what every layer stores with the oracle."""
        for index, shadow in self._shadows().items():
            if shadow.get_seq_length():
                layer = self.layers[index]
                first = layer.room.first_shown(layer.length)
                for name in ("keys", "values"):
                    self._compare(getattr(layer, name).clone(), getattr(shadow, name)[:, :, first:], first, index)

    def _compare(self, stored: torch.Tensor, expected: torch.Tensor, first: int, index: int) -> None:
        assert stored.shape == expected.shape
        dim = stored.shape[3]
        norm = torch.linalg.vector_norm(expected, dim=3, keepdim=True)
        center = self.layers[index].storage.key_center
        if center is not None:
            norm = norm + 2 * torch.linalg.vector_norm(center, dim=1)[:, None, None]
        # The same integers and scales, rotated back and moved by the centre in float32: one rounding each.
        allowed = (2 * math.log2(dim) + 4) * U * norm
        if index in self.rounded_twice:
            # Centred a second time, a row is rounded in another place than the oracle's where float32 tips it: one
            # step per element, of 1/127 of the row's largest, which rotation spreads over the row.
            allowed = allowed + math.sqrt(dim) / 127 * norm
        counts = torch.ones(stored.shape[0], 1, stored.shape[2], 1, dtype=torch.bool)
        for row, padding in enumerate(self.padding):
            counts[row, :, : max(padding - first, 0)] = False
        error = (stored - expected).abs()
        right = (error <= allowed) | ~counts.to(error.device)
        assert right.all(), f"layer {index} is off by {float((error / allowed)[~right].max()):.3g} times its rounding"
        self.comparisons += 1

    # -- every operation, on both ----------------------------------------------------------------------------------

    def _on_rows(self, rows: torch.Tensor) -> None:
        for shadow in self._shadows().values():
            if shadow.get_seq_length():
                assert shadow.keys is not None and shadow.values is not None  # noqa: PT018
                shadow.keys, shadow.values = shadow.keys[rows], shadow.values[rows]
        if self.padding:
            self.set_padding([self.padding[row] for row in rows.tolist()])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._on_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(max(self._batch_size, 0)).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._on_rows(rows)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._on_rows(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        for shadow in self._shadows().values():
            length = max(shadow.get_seq_length() + tokens_to_remove, 0)
            if not length:
                _forget(shadow)
            elif tokens_to_remove:
                assert shadow.keys is not None and shadow.values is not None  # noqa: PT018
                shadow.keys, shadow.values = shadow.keys[:, :, :length], shadow.values[:, :, :length]

    def reset(self) -> None:
        super().reset()
        for shadow in self._shadows().values():
            _forget(shadow)

    def fork(self) -> ShadowedCache:
        twin = super().fork()
        assert isinstance(twin, ShadowedCache)
        twin.take_shadow(self)
        return twin

    def take_shadow(self, other: ShadowedCache) -> None:
        """Have a copy of what another cache with the same tokens is compared with."""
        self.shadow, self.rounded_twice = copy.deepcopy(other.shadow), set(other.rounded_twice)
        self.set_padding(other.padding)

    @property
    def _batch_size(self) -> int:
        return next((x.batch_size for x in self.layers if isinstance(x, PagedInt8Layer)), 0)


def _forget(shadow: FakeQuantizedLayer) -> None:
    shadow.keys = shadow.values = None
    shadow.is_initialized = False
