"""The memory of one preallocated layer: blocks, table, lengths and first tokens, all at addresses that never change.

The block table never changes: sequence b owns blocks ``b * blocks`` and following. A sliding window is a ring: its
table repeats the same few blocks, so new tokens overwrite those that fell out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import compiled_ops
from .kernels import Scoring, Tokens, alloc_paged_int8_layer, load_backend
from .layer_checks import of_one_dtype
from .static_sinks import StaticSinks


class LayerShape(NamedTuple):
    """What a layer's first keys and values fix for all that follow.

    Attributes:
        num_kv_heads: heads of the keys, and of the values.
        head_dim: width of a key row.
        v_head_dim: width of a value row.
        device: where the layer's blocks are.
    """

    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    device: torch.device


class StaticMemory:
    """Memory for ``max_batch_size`` sequences of ``max_cache_len`` tokens.

    Args:
        shape: heads, widths and device of the layer's keys and values.
        dtypes: of the layer's first keys and values.
        max_batch_size: most sequences.
        max_cache_len: most tokens per sequence.
        window: sliding window in tokens, or ``None`` for full attention.
        block_size: tokens per block.
        backend: name of the kernel backend, or ``None`` for the best one of the device.
        rotation: ``"hadamard"`` or ``None``.
        center_keys: whether there is room for a key centre.
        sink_tokens: first tokens of a sequence that are kept in full precision.
    """

    def __init__(
        self,
        shape: LayerShape,
        dtypes: tuple[torch.dtype, torch.dtype],
        max_batch_size: int,
        max_cache_len: int,
        *,
        window: int | None,
        block_size: int,
        backend: str | None,
        rotation: str | None,
        center_keys: bool,
        sink_tokens: int,
    ):
        self.shape = shape
        self.max_batch_size = max_batch_size
        self.max_cache_len = max_cache_len
        self.window = window
        columns = -(-max_cache_len // block_size)
        # A window of W tokens and the token being written touch at most W / block_size + 2 blocks.
        self.blocks = columns if window is None else min(columns, -(-window // block_size) + 2)
        #: Positions that can be stored before the first is overwritten.
        self.capacity = self.blocks * block_size
        heads, head_dim, v_head_dim, device = shape
        self.storage = alloc_paged_int8_layer(
            max_batch_size * self.blocks,
            block_size,
            heads,
            head_dim,
            v_head_dim=v_head_dim,
            device=device,
            backend=backend,
            rotation=rotation,
            center_keys=center_keys,
        )
        compiled_ops.remember(self.storage)
        # Positions of a window that were never written are masked, not skipped, by other attention implementations.
        self.storage.k_scales.zero_()
        self.storage.v_scales.zero_()
        ring = torch.arange(columns, dtype=torch.int32) % self.blocks
        first = torch.arange(max_batch_size, dtype=torch.int32)[:, None] * self.blocks
        #: int32 ``[max_batch_size, columns]``, int32 ``[max_batch_size]``, int64 scalar.
        self.table = (first + ring).to(device)
        self.lens = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        self.length = torch.zeros((), dtype=torch.long, device=device)
        #: Bool scalar: whether the newest step that only the device counted fitted.
        self.fits = torch.ones((), dtype=torch.bool, device=device)
        # Kernels take one dtype for keys and values; float32 holds every other exactly.
        dtype = torch.promote_types(*dtypes)
        self.sinks = StaticSinks(max_batch_size, shape, dtype, sink_tokens, max_cache_len) if sink_tokens else None
        sinks = () if self.sinks is None else self.sinks.tensors
        for tensor in (*self.tensors, self.table, self.lens, self.length, self.fits, *sinks):
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)

    def append(self, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, lens_before: torch.Tensor) -> None:
        """Quantize and write new rows. Where the table has -1, nothing is written."""
        keys, values = of_one_dtype(keys, values)
        compiled_ops.append(keys.detach(), values.detach(), *compiled_ops.flat(self.storage), table, lens_before)

    def gather(self, batch: int, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys and values of positions ``start`` to ``stop``, ``[batch, num_kv_heads, stop - start, dim]``."""
        tokens = Tokens.at(self.table[:batch], self.lens[:batch])
        keys, values = load_backend(self.storage.backend).gather(self.storage, tokens, start, stop, dtype)
        return (keys, values) if self.sinks is None else self.sinks.tokens(batch).put_both(keys, values, start)

    def gather_all(self, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for all positions, as an operator that a compiler drops where its result is not used."""
        return compiled_ops.gather_dense(
            *compiled_ops.flat(self.storage), self.table[:batch], self.lens[:batch], self.max_cache_len, dtype,
            *self._flat_first_tokens(batch),
        )  # fmt: skip

    def attend(self, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Attention of the newest rows straight from the blocks; see `PagedInt8Layer.attend`."""
        batch, (scale, softcap, sink_logits, key_mask, _) = query.shape[0], scoring
        return compiled_ops.attend(
            query, *compiled_ops.flat(self.storage), self.table[:batch], self.lens[:batch], self.window,
            *self._flat_first_tokens(batch), scale, softcap, sink_logits, key_mask,
        )  # fmt: skip

    def select(self, rows: list[int]) -> None:
        """Copy blocks so that sequence i is what sequence ``rows[i]`` was."""
        index = torch.tensor(rows, device=self.shape.device)
        for tensor in self.tensors[:4]:
            owned = tensor.unflatten(1, (self.max_batch_size, self.blocks))
            owned[:, : len(rows)] = owned[:, index]
        if self.sinks is not None:
            self.sinks.select(index)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        self.lens.fill_(length)
        self.length.fill_(length)
        self.fits.fill_(True)
        if self.sinks is not None:
            self.sinks.truncate(length)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        s = self.storage
        return s.k, s.v, s.k_scales, s.v_scales, s.key_center

    @property
    def sink_nbytes(self) -> int:
        """Bytes of the tokens in full precision."""
        return 0 if self.sinks is None else self.sinks.nbytes

    def _flat_first_tokens(
        self, batch: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, int]:
        """First tokens as the operators take them."""
        if self.sinks is None:
            return None, None, None, self.max_cache_len
        keys, values = self.sinks.rows
        return keys, values, self.sinks.places[:, :batch], self.max_cache_len
