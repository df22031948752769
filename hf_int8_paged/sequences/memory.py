"""The memory of one preallocated layer: blocks, table, lengths and first tokens, all at addresses that never change.

The block table never changes: sequence b owns blocks ``b * blocks`` and following. A sliding window is a ring: its
table repeats the same few blocks, so new tokens overwrite those that fell out.
"""

from __future__ import annotations

import copy

import torch

from ..kernels import FirstTokens, Scoring, Tokens, alloc_paged_int8_layer
from ..layer_checks import LayerShape, of_one_dtype
from ..options import PoolOptions
from ..seam import operators
from .first_tokens import FixedFirstTokens


def blocks_of_a_sequence(max_cache_len: int, window: int | None, block_size: int) -> int:
    """Blocks that each sequence has in a layer with this window: a window of W tokens and the token being written touch
    at most W / block_size + 2 blocks."""
    columns = -(-max_cache_len // block_size)
    return columns if window is None else min(columns, -(-window // block_size) + 2)


class PreallocatedMemory:
    """Memory for ``max_batch_size`` sequences of ``max_cache_len`` tokens.

    Args:
        shape: heads, widths and device of the layer's keys and values.
        dtypes: of the layer's first keys and values.
        max_batch_size: most sequences.
        max_cache_len: most tokens per sequence.
        window: sliding window in tokens, or ``None`` for full attention.
        options: what blocks are like.
        sink_tokens: first tokens of a sequence that are kept in full precision.
    """

    def __init__(
        self,
        shape: LayerShape,
        dtypes: tuple[torch.dtype, torch.dtype],
        max_batch_size: int,
        max_cache_len: int,
        window: int | None,
        options: PoolOptions,
        sink_tokens: int,
    ):
        self.shape = shape
        self.max_batch_size = max_batch_size
        self.max_cache_len = max_cache_len
        self.window = window
        block_size = options.block_size
        columns = -(-max_cache_len // block_size)
        self.blocks = blocks_of_a_sequence(max_cache_len, window, block_size)
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
            backend=options.backend,
            rotation=options.rotation,
            center_keys=options.center_keys,
            format=options.format,
        )
        operators.remember(self.storage)
        # Positions of a window that were never written are masked, not skipped, by other attention implementations.
        self.storage.k_scales.zero_()
        self.storage.v_scales.zero_()
        ring = torch.arange(columns, dtype=torch.int32) % self.blocks
        first = torch.arange(max_batch_size, dtype=torch.int32)[:, None] * self.blocks
        #: int32 ``[max_batch_size, columns]``, int32 ``[max_batch_size]``, all the same.
        self.table = (first + ring).to(device)
        self.lens = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        #: Bool scalar: whether the newest step that only the device counted fitted.
        self.fits = torch.ones((), dtype=torch.bool, device=device)
        # Kernels take one dtype for keys and values; float32 holds every other exactly.
        dtype = torch.promote_types(*dtypes)
        self.first_tokens: FixedFirstTokens | None = None
        if sink_tokens:
            self.first_tokens = FixedFirstTokens(max_batch_size, shape, dtype, sink_tokens, max_cache_len)
        first_tokens = () if self.first_tokens is None else self.first_tokens.tensors
        #: What kernels take of so many sequences, once it was made.
        self._made: dict[int, tuple[Tokens, FirstTokens | None]] = {}
        for tensor in (*self.tensors, self.table, self.lens, self.fits, *first_tokens):
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)

    @property
    def length(self) -> torch.Tensor:
        """Tokens of each sequence, int32 scalar: a view of the lengths."""
        return self.lens[0]

    def append(self, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, lens_before: torch.Tensor) -> None:
        """Quantize and write new rows, as an operator. Where the table has -1, nothing is written."""
        keys, values = of_one_dtype(keys, values)
        (k, v, k_scales, v_scales, *center), names = operators.flat_storage(self.storage)
        new = [keys.detach(), values.detach()]
        operators.append(k, v, k_scales, v_scales, center, names, new, [table, lens_before])

    def of(self, batch: int) -> tuple[Tokens, FirstTokens | None]:
        """What kernels take of the first ``batch`` sequences. Its tensors are those at the fixed addresses, so both
        lengths are that of now: the one before a step until the layer has counted it."""
        if batch not in self._made:
            tokens = Tokens.at(self.table[:batch], self.lens[:batch], self.window)
            self._made[batch] = tokens, None if self.first_tokens is None else self.first_tokens.of(batch)
        return self._made[batch]

    def gather_all(self, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Dense keys and values of all positions, ``[batch, num_kv_heads, max_cache_len, dim]``, as an operator that a
        compiler drops where its result is not used."""
        where, first_tokens = self._flat(batch)
        storage = operators.flat_storage(self.storage)
        return operators.gather_dense(*storage, where, first_tokens, self.max_cache_len, dtype)

    def attend(self, query: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Attention of the newest rows straight from the blocks, as an operator; see `LayerReader.attend`."""
        where, first_tokens = self._flat(query.shape[0])
        storage = operators.flat_storage(self.storage)
        return operators.attend(query, *storage, where, self.window, first_tokens, *operators.flat_scoring(scoring))

    def select(self, rows: list[int]) -> None:
        """Copy blocks so that sequence i is what sequence ``rows[i]`` was."""
        index = torch.tensor(rows, device=self.shape.device)
        for tensor in self.tensors[:4]:
            owned = tensor.unflatten(1, (self.max_batch_size, self.blocks))
            owned[:, : len(rows)] = owned[:, index]
        if self.first_tokens is not None:
            self.first_tokens.select(index)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        self.lens.fill_(length)
        self.fits.fill_(True)
        if self.first_tokens is not None:
            self.first_tokens.truncate(length)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        s = self.storage
        return s.k, s.v, s.k_scales, s.v_scales, s.key_center

    @torch.inference_mode(False)  # its tensors may be written to outside it later, which inference tensors refuse
    def __deepcopy__(self, memo: dict) -> PreallocatedMemory:
        twin = copy.copy(self)
        twin.__dict__.update(copy.deepcopy({name: x for name, x in vars(self).items() if name != "_made"}, memo))
        twin._made = {}
        operators.remember(twin.storage)
        return twin

    def _flat(self, batch: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Block table and lengths, and first tokens, as operators take them."""
        where = [self.table[:batch], self.lens[:batch]]
        if self.first_tokens is None:
            return where, []
        return where, [*self.first_tokens.rows, self.first_tokens.places[:, :batch]]
