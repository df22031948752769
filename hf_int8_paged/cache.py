"""`PagedInt8Cache`: transformers' ``Cache`` face of the paged int8 pool."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from .absent_names import ABSENT, WRAP_IT, NotFlattened
from .cache_operations import CacheOperations
from .full import refused_memory
from .generate_limits import UserDefinedMark
from .geometry import layer_geometry
from .layer import PagedInt8Layer
from .layer_types import growing_layers, is_layer_data, layers_of_data, preallocated_layers
from .look_inside import LookInside
from .one_thread import undo_interrupted
from .options import PoolOptions, check_cache_options, check_device, decoder_config
from .persistence.saved import SavedCaches
from .pool import PagedInt8Pool
from .seam.read_only import ReadOnly
from .sequences.growing import GrowingSequences
from .sequences.preallocated import PreallocatedSequences

_THE_CLASS = "a model got the class PagedInt8Cache instead of a cache; give it PagedInt8Cache(model.config)"


class _OfACache(property):
    """A property that says so where it is read from the class, which `generate` does first with what it is given."""

    def __iter__(self) -> Iterator:
        raise TypeError(_THE_CLASS)


class _Marked(type):
    """Refuses the mark that `generate` sets on what it was given: on the class it would take the place of ours."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if name == "_is_user_defined":
            raise TypeError(_THE_CLASS)
        super().__setattr__(name, value)


class PagedInt8Cache(SavedCaches, LookInside, CacheOperations, metaclass=_Marked):
    """A KV cache of int8 blocks with one float16 scale per token and KV head.

    Pass it to ``model.generate(cache=...)`` or to a model's forward; transformers before 5.24 calls the argument
    ``past_key_values``. With ``attn_implementation="int8_paged"`` decode attention reads the blocks directly; any other
    attention implementation works through a dequantized copy. What it has in common with transformers' own caches, name
    by name, stands in docs/cache_api.md.

    Args:
        config: the model's config: how many layers there are, and which of them have a sliding window. Or, as
            `DynamicCache` takes it, an iterable with ``(keys, values)`` or ``(keys, values, window)`` of each layer,
            ``[batch, num_kv_heads, tokens, head_dim]``, which are stored anew.
        block_size: tokens per block, a multiple of 16.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; ``None`` takes the best one for the device of
            each layer's keys. A backend asked for by name never falls back to another.
        max_batch_size: most sequences. With ``max_cache_len``, everything is preallocated, lengths live in device
            tensors, and `generate` compiles the decoding step by itself where it compiles (on CUDA, for one).
        max_cache_len: most tokens per sequence, or ``None`` for no limit. Beyond it `CacheFullError` is raised,
            and the cache stays valid at its old length.
        max_tokens: most tokens of all sequences together, rounded down to blocks, or ``None``. Not for a preallocated
            cache.
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
        format: name of what a stored row is: ``"int8"``, or one that `kernels.register_format` has made known.
        max_bytes: most bytes that are allocated for blocks and first tokens, all that ``nbytes_allocated`` counts: a
            number, or a text such as ``"8GiB"``; ``None`` sets no limit. `CacheFullError` says how many tokens it
            holds.
        pool: take blocks from this pool, which other caches of the same model may use too. ``block_size``, ``backend``,
            ``max_tokens``, ``rotation``, ``center_keys``, ``format``, ``max_bytes`` and what is about offloading
            are then the pool's.
        device: where the model will run, to be checked now: that the machine has it, and that the backend serves it.
            Without ``device``, a backend that can serve no device of this machine is refused.
        offloading: whether layers leave their device until they are needed: those of the CPU for files that are mapped
            into memory, those of another device for the host's memory. Not for a preallocated cache.
        offload_only_non_sliding: whether layers with a window stay.
        resident_layers: so many of the layers that could leave stay, the first ones.
        offload_folder: for the files, with room for all blocks; ``None`` takes the system's folder for temporary ones.

    Raises:
        TypeError, ValueError: an option is of the wrong kind or out of range, or this mode cannot honour it.

    Example, for transformers 5.24 or newer (before, it is ``past_key_values=cache``):

    ```python
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_int8_paged import PagedInt8Cache

    >>> config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=2, attn_implementation="int8_paged")
    >>> model = LlamaForCausalLM(config).eval()
    >>> cache = PagedInt8Cache(model.config)
    >>> out = model.generate(torch.tensor([[1, 2, 3]]), cache=cache, max_new_tokens=5, do_sample=False)
    >>> cache.get_seq_length()
    7

    ```
    """

    #: Where the blocks of a cache that grows are; a preallocated one has none.
    pool: PagedInt8Pool
    _is_user_defined = UserDefinedMark()

    def __init__(
        self,
        config: PreTrainedConfig | Iterable[tuple[torch.Tensor | None, ...]] | None = None,
        *,
        block_size: int = 16,
        backend: str | None = None,
        max_batch_size: int | None = None,
        max_cache_len: int | None = None,
        max_tokens: int | None = None,
        rotation: str | None = "hadamard",
        center_keys: bool = True,
        sink_tokens: int = 1,
        format: str = "int8",
        max_bytes: int | str | None = None,
        pool: PagedInt8Pool | None = None,
        device: torch.device | str | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
        resident_layers: int = 0,
        offload_folder: str | os.PathLike | None = None,
    ):
        own = PoolOptions(
            block_size, backend, max_tokens, rotation, center_keys, format, max_bytes, offloading,
            offload_only_non_sliding, resident_layers, offload_folder,
        ).checked()  # fmt: skip
        if pool is not None and not isinstance(pool, PagedInt8Pool):
            raise TypeError(f"pool must be a PagedInt8Pool or None, got {pool!r}")
        options = check_cache_options(
            own,
            max_batch_size=max_batch_size,
            max_cache_len=max_cache_len,
            sink_tokens=sink_tokens,
            pool_given=pool is not None,
        )
        given = own if pool is None else pool
        check_device(device, given.backend, own.block_size, given.format)
        data = list(config) if is_layer_data(config) else None  # type: ignore[arg-type]
        text_config = decoder_config(config) if data is None else None
        self._not_flattened = NotFlattened()
        self._config = text_config
        if options.max_batch_size is None:
            self.pool = PagedInt8Pool(**own._asdict()) if pool is None else pool
            self._sequences = GrowingSequences(self.pool, options.max_cache_len, options.sink_tokens)
            if text_config is None:
                layers = layers_of_data(data or [], self._sequences)
            else:
                layers = growing_layers(text_config, self._sequences)
        elif text_config is None:
            raise ValueError("a cache made of keys and values grows; leave out max_batch_size, or give a config")
        else:
            assert options.max_cache_len is not None
            self._sequences = PreallocatedSequences(
                options.max_batch_size, options.max_cache_len, own, options.sink_tokens
            )
            layers = preallocated_layers(text_config, self._sequences)
        #: Whether a layer that is updated twice in a row shows that the cache should have been wrapped.
        paged = sum(isinstance(layer, PagedInt8Layer) for layer in layers)
        self._needs_wrapping = bool(getattr(config, "is_encoder_decoder", False)) and paged > 1
        self._sequences.beside_recurrent_states = any(isinstance(x, LinearAttentionCacheLayerMixin) for x in layers)
        if given.max_bytes is not None and text_config is not None:
            self._sequences.expect(layer_geometry(text_config))
        # A `DynamicCache`, as transformers lets only those be cropped within an `EncoderDecoderCache`.
        Cache.__init__(self, layers=layers)
        offloaded = None if options.max_batch_size is not None else self.pool.offloaded
        self.offloading = offloaded is not None
        if offloaded is not None:
            self.only_non_sliding = offloaded.only_non_sliding
        for index, (keys, values, *_) in enumerate(data or []):
            if keys is not None:
                self.update(keys, values, index)

    def __getattr__(self, name: str) -> Any:
        what = ABSENT.get(name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}" + (f": {what}" if what else ""))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a layer's new keys and values, and return lazy views of all that attention may see.

        If it raises, every layer is back at the length it had before this forward pass. No sequences or no tokens are
        no update: they change nothing.

        Args:
            key_states: ``[batch, num_kv_heads, new_tokens, head_dim]``.
            value_states: ``[batch, num_kv_heads, new_tokens, v_head_dim]``.
            layer_idx: index of the layer.

        Raises:
            ValueError: shapes, dtype, device or number of layers are not those of this cache.
            CacheFullError: a limit is reached.
        """
        if torch.compiler.is_compiling():
            layer = self.layers[layer_idx]
            if isinstance(layer, PagedInt8Layer) and not layer.is_compileable:
                # Block tables are the host's: no graph can hold what happens here.
                return _update_outside_graphs(self, key_states, value_states, layer_idx)
            return layer.update(key_states, value_states, *args, **kwargs)
        guard = self._sequences.guard
        if guard.enter():
            undo_interrupted(self)
        try:
            result = self._update(key_states, value_states, layer_idx, *args, **kwargs)
            return guard.inside.clear() or result
        except BaseException as error:
            self._take_back(layer_idx)
            full = refused_memory(error, self._sequences.broken)
            guard.inside.clear()
            if full is not None:
                raise full from error
            raise

    def _update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else self._refuse_layer(layer_idx)
        if isinstance(layer, PagedInt8Layer) and isinstance(key_states, torch.Tensor) and not key_states.numel():
            batch, new_tokens = key_states.shape[0], key_states.shape[-2]
            if not int(layer.get_seq_length()) and not (batch and new_tokens):
                return key_states, value_states
            if batch == layer.batch_size and not new_tokens:
                return layer.keys, layer.values  # type: ignore[return-value]
        # Views of another cache have no memory of their own, and kernels read addresses.
        if isinstance(key_states, ReadOnly):
            key_states = key_states.readable()
        if isinstance(value_states, ReadOnly):
            value_states = value_states.readable()
        if self._needs_wrapping:
            self._refuse_cross_attention(layer_idx, key_states.shape[2])
        return layer.update(key_states, value_states, *args, **kwargs)

    def _refuse_layer(self, layer_idx: int) -> NoReturn:
        raise ValueError(
            f"layer {layer_idx} was updated, but the cache was made for a model with {len(self.layers)} "
            "layers; make it from this model's config"
        )

    def _take_back(self, layer_idx: int) -> None:
        """Take back the step in which an exception ended the update of a layer."""
        self._newest, start = None, self._sequences.guard.inside.get("start")
        if start is None:
            # The layer has not changed: if it is behind the others, it has ended the forward pass that these had begun.
            layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
            if layer is not None and not isinstance(layer, PagedInt8Layer):
                return
            start = None if layer is None else layer.length
        self._sequences.take_back(start)
        self._take_back_others(layer_idx)

    def get_seq_length(self=None, layer_idx: int = 0) -> int:  # type: ignore[assignment]
        """Tokens per sequence that a layer holds; preallocated layers answer with a tensor on their device."""
        if self is None:
            raise TypeError(_THE_CLASS)
        return super().get_seq_length(layer_idx)

    @_OfACache
    def is_linear(self) -> list[bool]:
        """For each layer whether it has linear attention only."""
        return [
            isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, PagedInt8Layer)
            for layer in self.layers
        ]

    def _refuse_cross_attention(self, layer_idx: int, new_tokens: int) -> None:
        before, self._newest = self._newest, (layer_idx, new_tokens)
        if before is None or before[0] != layer_idx:
            return
        self._newest = None
        self._sequences.take_back()
        raise ValueError(f"layer {layer_idx} was updated twice in one forward pass: {WRAP_IT}")


@torch.compiler.disable
def _update_outside_graphs(
    cache: PagedInt8Cache, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.update(key_states, value_states, layer_idx)
