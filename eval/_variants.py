"""Ways to store keys and values, as fake quantization: a dense cache that shows attention the dequantized rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from hf_int8_paged.kernels.conditioning import hadamard
from hf_int8_paged.kernels.formats import INT8
from hf_int8_paged.layer_types import layer_types

#: Fewest tokens of a prompt whose mean key is taken as the centre.
CENTER_TOKENS = 16


def int8_per_row(x: torch.Tensor) -> torch.Tensor:
    q, scales = INT8.quantize(x)
    return q.float() * scales.float()[..., None]


def q8_0(x: torch.Tensor) -> torch.Tensor:
    """llama.cpp's layout: int8 in groups of 32, one float16 scale each; divided by the scale before it is rounded."""
    groups = x.unflatten(-1, (-1, 32))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    q = torch.round(groups / scales.masked_fill(scales == 0, 1.0))
    return (q * scales.half().float()).flatten(-2)


def fp8_per_row(x: torch.Tensor) -> torch.Tensor:
    """float8 e4m3 with one float16 scale per row, whose largest element becomes 448, the format's largest."""
    scales = (x.abs().amax(-1, keepdim=True) / 448).half().float()
    return (x / scales.masked_fill(scales == 0, 1.0)).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scales


def int4_in_groups_of_32(x: torch.Tensor) -> torch.Tensor:
    groups = x.unflatten(-1, (-1, 32))
    scales = (groups.abs().amax(-1, keepdim=True) / 7).half().float()
    return (torch.round(groups / scales.masked_fill(scales == 0, 1.0)).clamp(-7, 7) * scales).flatten(-2)


def hqq(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What ``QuantizedCache("hqq", axis_key=1, axis_value=1)`` of transformers does to what it quantizes: groups of 64
    within a row, a scale and a zero point each, fitted by the library `hqq`."""

    def quantize(x: torch.Tensor) -> torch.Tensor:
        from hqq.core.quantize import Quantizer

        options = {"axis": 1, "group_size": 64, "compute_dtype": torch.float16, "device": str(x.device)}
        # Unpacked: two 4-bit rows share a byte, and a token may have an odd number of rows.
        q, meta = Quantizer.quantize(x.reshape(-1, x.shape[-1]), nbits=bits, bitpack=False, **options)
        for name in ("scale", "zero"):
            meta[name] = meta[name].half()
        return Quantizer.dequantize(q, meta).float().view(x.shape)

    return quantize


@dataclass(frozen=True)
class Variant:
    """One way to store keys and values.

    Args:
        title: for tables.
        quantize: float32 rows ``[..., head_dim]`` -> the rows that are read back.
        row_bytes: bytes that a row of head_dim elements takes.
        rotate: whether keys and values are rotated before, and back after.
        center: whether the mean key of the prompt is subtracted before, and added after.
        skip_layers: layers that are left as they are; negative numbers count from the last.
        sink_tokens: first tokens that are left as they are.
    """

    title: str
    quantize: Callable[[torch.Tensor], torch.Tensor]
    row_bytes: Callable[[int], float]
    rotate: bool = False
    center: bool = False
    skip_layers: tuple[int, ...] = ()
    sink_tokens: int = 0

    def keys(self, k: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        """Keys ``[batch, num_kv_heads, tokens, head_dim]`` as attention sees them.

        Args:
            center: ``[num_kv_heads, 1, head_dim]``.
        """
        return (self._through(k.float() - center, k.dtype) + center).to(k.dtype)

    def values(self, v: torch.Tensor) -> torch.Tensor:
        return self._through(v.float(), v.dtype).to(v.dtype)

    def _through(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Quantized in float32, as the package does, and rotated back in at least that."""
        wide = torch.promote_types(dtype, torch.float32)
        return hadamard(self.quantize(hadamard(x)).to(wide)) if self.rotate else self.quantize(x).to(wide)


def _int8_bytes(head_dim: int) -> float:
    return head_dim + 2


def _int4_bytes(head_dim: int) -> float:
    return head_dim / 32 * 18


def _both(title: str, **options: Any) -> Variant:
    return Variant(title, int8_per_row, _int8_bytes, rotate=True, center=True, **options)


VARIANTS = {
    "int8": Variant("int8 per (token, head)", int8_per_row, _int8_bytes),
    "int8-rotated": Variant("+ Hadamard K and V", int8_per_row, _int8_bytes, rotate=True),
    "int8-centered": Variant("+ centred K", int8_per_row, _int8_bytes, center=True),
    "int8-both": _both("+ both: Hadamard K and V, centred K"),
    "sinks-1": _both("+ both + first token as it is", sink_tokens=1),
    "q8_0": Variant("int8 in groups of 32 (q8_0)", q8_0, lambda head_dim: head_dim / 32 * 34),
    "fp8": Variant("fp8 e4m3 per (token, head)", fp8_per_row, _int8_bytes),
    "hqq8": Variant("HQQ 8 bit, groups of 64", hqq(8), lambda head_dim: head_dim / 64 * 68),
    "hqq4": Variant("HQQ 4 bit, groups of 64", hqq(4), lambda head_dim: head_dim / 64 * 36),
    "int4-both": Variant("int4 in groups of 32 + both", int4_in_groups_of_32, _int4_bytes, rotate=True, center=True),
}
#: Additions to ``int8-both`` that keep some rows in the model's dtype; measured when they are asked for.
EXCEPTIONS = {
    "skip-first": _both("both, first layer unquantized", skip_layers=(0,)),
    "skip-last": _both("both, last layer unquantized", skip_layers=(-1,)),
    "skip-first-two": _both("both, first two layers unquantized", skip_layers=(0, 1)),
    "sinks-4": _both("both, first 4 tokens unquantized", sink_tokens=4),
    "sinks-16": _both("both, first 16 tokens unquantized", sink_tokens=16),
}


class VariantCache(Cache):
    """A dense cache whose rows went through a `Variant`.

    The first forward pass, the prompt, attends to its fresh rows, as with `PagedInt8Cache`. Every later row attends
    to quantized rows only, its own included, so that one pass over many rows gives what feeding them one by one gives.
    """

    def __init__(self, config: PreTrainedConfig, variant: Variant):
        kinds = layer_types(config.get_text_config(decoder=True))
        unlike = sorted({kind for kind, _ in kinds} - {"full_attention", "sliding_attention"})
        if unlike:
            raise ValueError(f"fake quantization knows full and sliding attention only, not {', '.join(unlike)}")
        skipped = {index % len(kinds) for index in variant.skip_layers}
        layers: list = [
            _FakeQuantizedLayer(None if index in skipped else variant, "sliding_window" in kwargs)
            for index, (_, kwargs) in enumerate(kinds)
        ]
        super().__init__(layers=layers)


class _FakeQuantizedLayer(DynamicLayer):
    """Keeps all rows, in windows too: the mask hides what lies outside a window."""

    def __init__(self, variant: Variant | None, is_sliding: bool):
        super().__init__()
        self.variant = variant
        self.is_sliding = is_sliding
        self.center: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.variant is None:
            return super().update(key_states, value_states)
        prompt = self.center is None
        if self.center is None:
            self.lazy_initialization(key_states, value_states)
            self.center = key_states.float().mean((0, 2))[:, None]
            if not self.variant.center or key_states.shape[2] < CENTER_TOKENS:
                self.center.zero_()
        keys, values = self.variant.keys(key_states, self.center), self.variant.values(value_states)
        if prompt and self.variant.sink_tokens:
            first = slice(self.variant.sink_tokens)
            for rows, new in ((keys, key_states), (values, value_states)):
                rows[:, :, first] = new[:, :, first].float()  # as the package holds them
        stored = super().update(keys, values)
        return (key_states, value_states) if prompt else stored

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0
