"""`PagedInt8Cache`: transformers' ``Cache`` face of the paged int8 pool."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
)

from .hybrid import PagedInt8HybridLayer
from .kernels import MAX_SINK_TOKENS, ROTATIONS, resolve_backend, why_unavailable
from .layer_types import layer_types
from .layers import PagedInt8Layer
from .pool import PagedInt8Pool
from .sequences import Sequences
from .static_layers import PagedInt8StaticLayer


class PagedInt8Cache(DynamicCache):
    """A KV cache of int8 blocks with one float16 scale per token and KV head.

    Pass it to ``model.generate(past_key_values=...)`` or to a model's forward. With
    ``attn_implementation="int8_paged"`` decode attention reads the blocks directly; any other attention implementation
    works through a dequantized copy.

    Args:
        config: the model's config: how many layers there are, and which of them have a sliding window.
        block_size: tokens per block, a multiple of 16.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; ``None`` takes the best one for the device of
            each layer's keys. A backend asked for by name never falls back to another.
        max_batch_size: most sequences. With ``max_cache_len``, everything is preallocated, lengths live in device
            tensors, and `generate` compiles the decoding step by itself where it compiles (on CUDA, for one).
        max_cache_len: most tokens per sequence, or ``None`` for no limit. Beyond it `CacheFullError` is raised,
            and the cache stays valid at its old length.
        max_tokens: most tokens of all sequences together, rounded down to blocks, or ``None``.
        rotation: ``"hadamard"`` rotates keys and values before quantization, which spreads outliers over the row;
            ``None`` does not. Exact: queries and outputs are rotated too.
        center_keys: subtract the mean of the first prompt's keys from all keys before quantization. Exact: it lowers
            all scores of a query alike. With a first prompt of fewer than 16 tokens it is done once there are 16; a
            preallocated cache leaves the keys as they are then. The mean is that of the whole batch, so how a
            sequence's keys are rounded depends on its batch mates; padding does not count, where it is known (see
            ``sink_tokens``).
        sink_tokens: keep so many first tokens of each sequence, 0 to 16, in full precision. Attention rests on the very
            first so heavily that its rounding is in every score; more than one adds nothing that could be measured.
            They are those of the first forward pass, and padding does not count where the attention function sees it
            (``"int8_paged"`` does).
        pool: take blocks from this pool, which other caches of the same model may use too. ``block_size``,
            ``backend``, ``max_tokens``, ``rotation`` and ``center_keys`` are then the pool's.
        device: where the model will run. A backend that cannot serve it is refused now; without ``device``, one that
            can serve no device of this machine.
        offloading: must be False. Models that make a cross-attention cache of the same class pass it.

    Example:

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_int8_paged import PagedInt8Cache

    >>> config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=2, attn_implementation="int8_paged")
    >>> model = LlamaForCausalLM(config).eval()
    >>> cache = PagedInt8Cache(model.config)
    >>> out = model.generate(torch.tensor([[1, 2, 3]]), past_key_values=cache, max_new_tokens=5, do_sample=False)
    >>> cache.get_seq_length()
    7

    ```
    """

    #: `PagedInt8Layer` where keys and values are held, transformers' own classes elsewhere.
    layers: list

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        block_size: int = 16,
        backend: str | None = None,
        max_batch_size: int | None = None,
        max_cache_len: int | None = None,
        max_tokens: int | None = None,
        rotation: str | None = "hadamard",
        center_keys: bool = True,
        sink_tokens: int = 1,
        pool: PagedInt8Pool | None = None,
        device: torch.device | str | None = None,
        offloading: bool = False,
    ):
        if offloading:
            raise ValueError("PagedInt8Cache does not offload layers: the blocks stay on their device")
        if block_size <= 0 or block_size % 16:
            raise ValueError(f"block_size must be a positive multiple of 16, got {block_size}")
        limits = {"max_batch_size": max_batch_size, "max_cache_len": max_cache_len, "max_tokens": max_tokens}
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}")
        if not 0 <= sink_tokens <= MAX_SINK_TOKENS:
            raise ValueError(f"sink_tokens must be between 0 and {MAX_SINK_TOKENS}, got {sink_tokens}")
        own = (block_size, backend, max_tokens, rotation, center_keys)
        if pool is not None and own != (16, None, None, "hadamard", True):
            raise ValueError(
                "block_size, backend, max_tokens, rotation and center_keys belong to the pool; "
                "give them to PagedInt8Pool"
            )
        if rotation is not None and rotation not in ROTATIONS:
            raise ValueError(f"unknown rotation {rotation!r}; choose one of {', '.join(ROTATIONS)}, or None")
        _check_backend(backend if pool is None else pool.backend, device, block_size)
        self.pool = PagedInt8Pool(*own) if pool is None else pool
        self._sequences = Sequences(self.pool, max_cache_len, sink_tokens)
        text_config = config.get_text_config(decoder=True)
        if max_batch_size is None:
            layers = _layers_for(text_config, self._sequences)
        elif max_cache_len is None or pool is not None:
            raise ValueError("max_batch_size goes with max_cache_len, and without a pool: it preallocates everything")
        else:
            sizes = (max_batch_size, max_cache_len)
            layers = _static_layers_for(text_config, *sizes, block_size, backend, rotation, center_keys, sink_tokens)
        self._preallocated = max_batch_size is not None
        # A `DynamicCache`, as transformers lets only those be cropped within an `EncoderDecoderCache`.
        Cache.__init__(self, layers=layers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a layer's new keys and values, and return lazy views of all that attention may see.

        If it raises, every layer is back at the length it had before this forward pass.

        Args:
            key_states: ``[batch, num_kv_heads, new_tokens, head_dim]``.
            value_states: ``[batch, num_kv_heads, new_tokens, v_head_dim]``.
            layer_idx: index of the layer.

        Raises:
            ValueError: shapes, dtype, device or number of layers are not those of this cache.
            CacheFullError: a limit is reached.
        """
        if self._preallocated:
            return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        try:
            if layer is None:
                raise ValueError(
                    f"layer {layer_idx} was updated, but the cache was made for a model with {len(self.layers)} "
                    "layers; make it from this model's config"
                )
            return layer.update(key_states, value_states, *args, **kwargs)
        except Exception:
            # A layer that is behind is the one that ended this forward pass; one that is not has changed nothing.
            if layer is None or (isinstance(layer, PagedInt8Layer) and layer.length < self._sequences.length):
                self._sequences.truncate(self._sequences.step_start)
            raise

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of keys, values and scales allocated, all layers, and of first tokens in full precision."""
        static = sum(layer.storage.nbytes for layer in self._static_layers())
        return self.pool.nbytes_allocated + static + self._sink_nbytes

    @property
    def nbytes_used(self) -> int:
        """Bytes of the blocks that hold tokens, all layers, and of first tokens in full precision; at most one block
        per sequence and layer more than the tokens themselves take."""
        static = sum(layer.nbytes_used for layer in self._static_layers())
        return self.pool.nbytes_used + static + (self._sink_nbytes if int(self.get_seq_length()) else 0)

    def reset(self) -> None:
        """Forget all tokens. The memory stays allocated."""
        self._sequences.truncate(0)
        for layer in self._own_layers():
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back.

        Args:
            tokens_to_remove: minus the number of tokens; 0 only lets windows shrink to what they need.

        Raises:
            ValueError: a positive number.
            RuntimeError: tokens have fallen out of a sliding window that would be visible again; see
                `activate_past_recording`.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        self._sequences.truncate(max(self._sequences.length + tokens_to_remove, 0))
        for layer in self._own_layers():
            layer.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Keep what falls out of sliding windows until the next `crop`, so that it can be taken back."""
        self._sequences.record_past = True
        for layer in self._own_layers():
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make sequence i what sequence ``beam_idx[i]`` is. Only block tables change; blocks are shared."""
        self._sequences.select(beam_idx.tolist())
        for layer in self._own_layers():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times in place. The copies share all blocks."""
        batch = self._sequences.batch_size or 0
        self._sequences.select(torch.arange(batch).repeat_interleave(repeats).tolist())
        for layer in self._own_layers():
            _require(layer, "batch_repeat_interleave")(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences at ``indices``, or those where a boolean ``indices`` is True, in this order."""
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._sequences.select(rows.tolist())
        for layer in self._own_layers():
            _require(layer, "batch_select_indices")(indices)

    def fork(self) -> PagedInt8Cache:
        """A cache with the same tokens that goes on independently. All blocks are shared until one of them
        writes to a partly filled last block. ``copy.deepcopy`` does the same."""
        twin = copy.copy(self)
        twin._sequences = self._sequences.fork()
        twin.layers = [
            layer.fork(twin._sequences) if isinstance(layer, PagedInt8Layer) else copy.deepcopy(layer)
            for layer in self.layers
        ]
        return twin

    def __deepcopy__(self, memo: dict) -> PagedInt8Cache:
        return self.fork()

    @property
    def is_linear(self) -> list[bool]:
        """For each layer whether it has linear attention only."""
        return [
            isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, PagedInt8Layer)
            for layer in self.layers
        ]

    @property
    def _sink_nbytes(self) -> int:
        return sum(layer.sink_nbytes for layer in self.layers if hasattr(layer, "sink_nbytes"))

    def _static_layers(self) -> list[PagedInt8StaticLayer]:
        return [x for x in self.layers if isinstance(x, PagedInt8StaticLayer) and x.is_initialized]

    def _own_layers(self) -> list:
        """Layers with state outside the pool: transformers' own, and the linear part of hybrid ones."""
        return [
            layer.linear_part if isinstance(layer, PagedInt8HybridLayer) else layer
            for layer in self.layers
            if not isinstance(layer, PagedInt8Layer) or isinstance(layer, PagedInt8HybridLayer)
        ]


def _require(layer: Any, operation: str) -> Callable:
    if not hasattr(layer, operation):
        raise NotImplementedError(f"transformers' {type(layer).__name__} has no {operation}")
    return getattr(layer, operation)


def _check_backend(backend: str | None, device: torch.device | str | None, block_size: int) -> None:
    """Raise ``ValueError`` for a backend that cannot serve ``device``, or any device of this machine."""
    if device is not None:
        resolve_backend(backend, torch.device(device), block_size)
    elif backend is not None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        devices = [torch.device("cpu")] + ([accelerator] if accelerator is not None else [])
        if all(why_unavailable(backend, d, block_size) is not None for d in devices):
            resolve_backend(backend, devices[-1], block_size)


def _layers_for(config: PreTrainedConfig, sequences: Sequences) -> list:
    """One layer per model layer: paged where keys and values are held per token, transformers' own class elsewhere."""
    layers: list = []
    # Layers that attend to another sequence, an image say, hold its keys: as many as that has, or none without one.
    elsewhere = getattr(config, "cross_attention_layers", None) or ()
    for index, (layer_type, kwargs) in enumerate(layer_types(config)):
        if index in elsewhere:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs))
        elif layer_type in ("full_attention", "sliding_attention", "chunked_attention"):
            # Chunks are windows that the mask narrows further.
            layers.append(PagedInt8Layer(index, sequences, kwargs.get("sliding_window")))
        elif layer_type in ("hybrid", "hybrid_sliding"):
            layers.append(PagedInt8HybridLayer(index, sequences, **kwargs))
        elif layer_type in DYNAMIC_LAYER_TYPE_MAPPING:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs))
        else:
            raise NotImplementedError(
                f"layer {index} of this {config.model_type} model is of type {layer_type!r}, which neither "
                "PagedInt8Cache nor transformers' DynamicCache knows"
            )
    return layers


def _static_layers_for(config: PreTrainedConfig, max_batch_size: int, max_cache_len: int, *options: Any) -> list:
    """One preallocated layer per model layer; transformers' own class where nothing is held per token."""
    layers: list = []
    for index, (layer_type, kwargs) in enumerate(layer_types(config)):
        if layer_type in ("full_attention", "sliding_attention", "chunked_attention"):
            window = kwargs.get("sliding_window")
            layers.append(PagedInt8StaticLayer(index, max_batch_size, max_cache_len, window, *options))
        elif layer_type in STATIC_LAYER_TYPE_MAPPING:
            layers.append(STATIC_LAYER_TYPE_MAPPING[layer_type](max_cache_len=max_cache_len, **kwargs))
        else:
            raise NotImplementedError(f"layer {index} is of type {layer_type!r}, which cannot be preallocated")
    return layers
