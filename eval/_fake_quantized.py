"""The oracle for `PagedInt8Cache`: the same numbers in dense tensors, in a few lines of torch.

Stored rows are quantized and dequantized again. Attention sees what it sees through the paged cache: first prompts and
long chunks see their own rows in full precision, short steps see the stored image of theirs.

The first token of a sequence is left as it is, and keys are centred on the first prompt's mean. ``padding`` says how
many tokens of padding stand in front of each sequence: the paged cache learns of it from its own attention function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from hf_int8_paged.kernels import MAX_DECODE_ROWS, mean_key
from hf_int8_paged.kernels.conditioning import hadamard
from hf_int8_paged.kernels.formats import INT8
from hf_int8_paged.layer_types import layer_types
from hf_int8_paged.pool_centring import MIN_CENTER_TOKENS


def fake_quantize(x: torch.Tensor, rotation: str | None = None, center: torch.Tensor | None = None) -> torch.Tensor:
    """Rows ``[batch, heads, tokens, dim]`` conditioned, quantized, dequantized and restored."""
    rows = x.float() if center is None else x.float() - center[:, None]
    q, scales = INT8.quantize(hadamard(rows) if rotation else rows)
    rows = q.float() * scales.float()[..., None]
    rows = hadamard(rows) if rotation else rows
    return (rows if center is None else rows + center[:, None]).to(x.dtype)


class FakeQuantizedLayer(DynamicLayer):
    """A dense layer whose stored rows went through int8. It forgets nothing; windows only limit what it shows."""

    def __init__(
        self,
        window: int | None = None,
        rotation: str | None = "hadamard",
        center_keys: bool = True,
        sink_tokens: int = 1,
        padding: Sequence[int] = (),
    ):
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.rotation = rotation
        self.center_keys = center_keys
        self.sink_tokens = sink_tokens
        self.padding = padding
        self.center: torch.Tensor | None = None

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        if not past and self.center_keys and key_states.shape[2] - min(self.padding, default=0) >= MIN_CENTER_TOKENS:
            first = torch.tensor(self.padding or [0])[:, None]
            self.center = mean_key(key_states, torch.arange(key_states.shape[2]) >= first)
        lead = min(self.padding, default=0)
        late = past and past - lead < MIN_CENTER_TOKENS <= past + key_states.shape[2] - lead
        if (
            late
            and self.center_keys
            and self.center is None
            and (self.window or MIN_CENTER_TOKENS) >= MIN_CENTER_TOKENS
        ):
            together = torch.cat([self.keys, key_states], dim=-2)
            first = torch.tensor(self.padding or [0])[:, None]
            positions = torch.arange(together.shape[2])
            self.center = mean_key(together, positions >= first)
            exact = ((positions >= first) & (positions < first + self.sink_tokens))[:, None, :past, None]
            self.keys = torch.where(exact, self.keys, fake_quantize(self.keys, self.rotation, self.center))
        seen = []
        for name, new in (("keys", key_states), ("values", value_states)):
            stored = getattr(self, name)
            image = fake_quantize(new, self.rotation, self.center if name == "keys" else None)
            if not past:
                for b in range(len(new)):
                    first = self.padding[b] if self.padding else 0
                    image[b, :, first : first + self.sink_tokens] = new[b, :, first : first + self.sink_tokens]
            setattr(self, name, torch.cat([stored, image], dim=-2))
            fresh = new.shape[2] > (MAX_DECODE_ROWS if past else 1)
            seen.append(torch.cat([stored, new], dim=-2) if fresh else getattr(self, name))
        first = self._first(past)
        return seen[0][:, :, first:], seen[1][:, :, first:]

    def _first(self, length: int) -> int:
        return 0 if self.window is None else max(length - self.window + 1, 0)

    def get_mask_sizes(self, query_length):
        length = self.get_seq_length()
        return length + query_length - self._first(length), self._first(length)


class FakeQuantizedHybridLayer(FakeQuantizedLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc,override]
    """With transformers' own convolution and recurrent states beside the keys and values."""

    def __init__(self, window: int | None = None, number_of_states: int = 1, **conditioning):
        FakeQuantizedLayer.__init__(self, window, **conditioning)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)


class FakeQuantizedCache(DynamicCache):
    """What `PagedInt8Cache` should be equal to, for every kind of layer."""

    def __init__(self, config: PreTrainedConfig, offloading: bool = False, **conditioning):
        layers: list = []
        config = config.get_text_config(decoder=True)
        elsewhere = getattr(config, "cross_attention_layers", None) or ()
        for index, (kind, kwargs) in enumerate(layer_types(config)):
            if index in elsewhere:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
            elif kind in ("full_attention", "sliding_attention", "chunked_attention"):
                layers.append(FakeQuantizedLayer(kwargs.get("sliding_window"), **conditioning))
            elif kind in ("hybrid", "hybrid_sliding"):
                layers.append(
                    FakeQuantizedHybridLayer(**{"window": kwargs.pop("sliding_window", None)}, **kwargs, **conditioning)
                )
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
        Cache.__init__(self, layers=layers)
