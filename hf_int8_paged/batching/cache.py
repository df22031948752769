"""The engine's cache, with int8 blocks: what transformers' `PagedAttentionCache` is to its engine."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from transformers.generation.continuous_batching.cache import (
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    PagedAttentionCache,
)
from transformers.generation.continuous_batching.requests import RequestState

from ..kernels import Scoring
from .allocators import Int8FullAllocator, Int8Pages, Int8SlidingAllocator
from .engine import seeing
from .first_tokens import FirstTokenRows
from .memory import HasRoomError, Int8Memory, Measuring
from .pages import BLOCK_SIZE
from .step import BatchStep, Request


class Int8Options(NamedTuple):
    """How rows are stored; see `PagedInt8Cache`, whose options have the same names.

    Attributes:
        centers: mean key of each layer, float32 ``[num_kv_heads, head_dim]``, subtracted from all its keys; layers that
            are not in it are not centred.
        rotation: ``"hadamard"`` or None.
        sink_tokens: first tokens of each request in full precision: 0 or 1.
        backend: name of the kernels' backend; None takes the best one of the device.
    """

    centers: Mapping[int, torch.Tensor]
    rotation: str | None = "hadamard"
    sink_tokens: int = 1
    backend: str | None = None


class PagedInt8AttentionCache(PagedAttentionCache):
    """transformers' `PagedAttentionCache` with keys and values as int8 blocks.

    The engine schedules, shares, forks, evicts and offloads blocks as it does its own. Attention reads them where they
    are (`attend`), so there are no indices of tokens to read, and no limit on how many a step reads.

    Args:
        options: how rows are stored.
        kwargs: what the engine gives to its own cache, with options that `check_engine_options` has passed.

    Raises:
        ValueError: no kernel serves the model's heads.
        MemoryError: the blocks have no room.
    """

    def __init__(self, *, options: Int8Options, **kwargs: Any):
        self._construct(options, Int8Memory, kwargs)
        #: The engine's buffer for indices of tokens to read; see `_infer_read_cache_limit`.
        self.max_tokens_read = 1
        self.first_rows: FirstTokenRows | None = None
        if options.sink_tokens:
            pages: Any = next(iter(self.cache_allocators.values()))
            sizes = (pages.num_key_value_heads, pages.head_dim, self.dtype, self.cache_tensor.device)
            self.first_rows = FirstTokenRows(sorted(self.layer_to_allocator), *sizes)
        self._requests: list[Request] = []
        self._step: BatchStep | None = None
        self._layers_left: set[int] = set()

    def _construct(self, options: Int8Options, memory: type[Int8Memory], kwargs: dict[str, Any]) -> None:
        """The engine's own ``__init__``, with allocators and arithmetic of memory for int8 blocks."""

        def with_options(kind: type[Int8Pages]) -> Any:
            def make(**arguments: Any) -> Int8Pages:
                allocator = kind(**arguments)
                allocator.options = options
                return allocator

            return make

        kinds = {FULL_ATTENTION: with_options(Int8FullAllocator), SLIDING_ATTENTION: with_options(Int8SlidingAllocator)}
        make = seeing(
            PagedAttentionCache.__init__,
            ATTN_TYPE_TO_ALLOCATOR=kinds,
            FullAttentionCacheAllocator=Int8FullAllocator,
            PagedAttentionMemoryHandler=memory,
        )
        make(self, **kwargs)

    @classmethod
    def check_room(cls, *, options: Int8Options, **kwargs: Any) -> None:
        """Raise ``MemoryError`` if the blocks have no room, and allocate nothing. The arguments are the class's."""
        with suppress(HasRoomError):
            cls.__new__(cls)._construct(options, Measuring, kwargs)

    def _infer_read_cache_limit(self) -> int:
        """No token is read by its index, so none counts."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated: blocks, and first tokens in full precision."""
        return self.cache_tensor.nbytes + (0 if self.first_rows is None else self.first_rows.nbytes)

    @property
    def max_request_tokens(self) -> int:
        """Most tokens that one request can have while no other has any."""
        low, high = 0, max(a.num_blocks * a.tokens_per_page for a in self.cache_allocators.values())
        if set(self.cache_allocators) == {SLIDING_ATTENTION}:
            high = max(high, 2**31 // BLOCK_SIZE)
        while low < high:
            middle = (low + high + 1) // 2
            sectors = 0
            for allocator in self.cache_allocators.values():
                blocks = allocator._compute_blocks_needed(0, 0, middle)  # type: ignore[attr-defined]
                sectors += -(-blocks // allocator.blocks_per_sector)
            low, high = (middle, high) if sectors <= self.num_sectors else (low, middle - 1)
        return low

    # -- requests: who begins with what ----------------------------------------------------------------------------

    def can_store_request_tokens(self, state: RequestState, request_len: int, dry_run: bool = False) -> bool:
        stored = super().can_store_request_tokens(state, request_len, dry_run)
        if stored and not dry_run and self.first_rows is not None:
            self.first_rows.hold(state.request_id, state.initial_tokens[0])
        return stored

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        if self.first_rows is None:
            return super().search_prefix_match(request_id, prompt_ids)
        if not prompt_ids or prompt_ids[0] not in self.first_rows:
            return 0
        matched = super().search_prefix_match(request_id, prompt_ids)
        if matched:
            self.first_rows.hold(request_id, prompt_ids[0])
        return matched

    def prepare_fork_request(
        self, src_state: RequestState, dst_req_ids: list[str], copy_src_and_dst: dict[str, tuple[list[int], list[int]]]
    ) -> list[str]:
        forked = super().prepare_fork_request(src_state, dst_req_ids, copy_src_and_dst)
        if self.first_rows is not None:
            for request_id in forked:  # before the request that they were forked from can end
                self.first_rows.hold(request_id, src_state.initial_tokens[0])
        return forked

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        super().free_blocks(request_id, no_cache)
        # Offloading frees with no_cache, and the request comes back.
        if self.first_rows is not None and not no_cache:
            self.first_rows.release(request_id)

    def free_all_requests(self, clear_ledgers: bool = False) -> None:
        super().free_all_requests(clear_ledgers)
        if self.first_rows is not None:
            self._finish_step()
            if clear_ledgers:
                self.first_rows.forget_all()
            else:
                self.first_rows.release_all()

    def outdate_first_tokens(self) -> None:
        """The model's weights may have changed, between two steps: requests that come write first tokens anew."""
        if self.first_rows is not None:
            self._finish_step()
            self.first_rows.outdate()

    # -- one step --------------------------------------------------------------------------------------------------

    def extend_read_and_write_indices(
        self,
        request_id: str,
        past_length: int,
        query_length: int,
        read_index: list[list[int]] | None,
        write_index: list[list[int]],
    ) -> None:
        """Learn that a request is in the step that the engine prepares. The engine's index gets placeholders. A request
        without rows is in the step for the engine alone, which forks it afterwards."""
        if not write_index[0]:
            self._finish_step()
            self._requests = []
        if query_length:
            self._requests.append(Request(request_id, past_length, query_length))
            for indices in write_index:
                indices.append(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From transformers 5.24 on models call this before attention. Nothing is stored yet: `attend` does both, and
        the attention function finds the cache in ``kwargs``."""
        kwargs["int8_paged_batch"] = self
        return key_states, value_states

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """Store the step's keys and values of a layer, and attend to what every row sees of its own request.

        Args:
            layer: index of the layer.
            query: ``[1, num_q_heads, total_rows, head_dim]``: the rows of all requests one after the other.
            key: ``[1, num_kv_heads, total_rows, head_dim]``.
            value: likewise.
            scoring: factor, softcap and sink logits.

        Returns:
            ``[1, total_rows, num_q_heads, head_dim]``.

        Raises:
            ValueError: keys of another width or number of heads than the model's config says.
        """
        pages: Any = self.layer_to_allocator[layer]
        held = pages.storages[layer]
        sizes = (1, held.num_kv_heads, query.shape[2], held.head_dim)
        if key.shape != sizes or value.shape != sizes:
            raise ValueError(
                f"layer {layer}: keys {list(key.shape)} and values {list(value.shape)} came, but the engine's cache is "
                f"for {list(sizes)}; transformers' continuous batching has one width for all layers"
            )
        if self._step is None:
            self._step = BatchStep(self._requests, self.first_rows, self.cache_tensor.device)
            self._layers_left = set(self.layer_to_allocator)
        rows, states = query[0].transpose(0, 1), (key[0].transpose(0, 1), value[0].transpose(0, 1))
        out = self._step.attend(layer, pages, rows, states, scoring)
        self._layers_left.discard(layer)
        return out[None]

    def _finish_step(self) -> None:
        """The step at hand is over. Rows of first tokens hold what it wrote, if every layer did."""
        if self._step is not None and not self._layers_left and self.first_rows is not None:
            self.first_rows.written()
        self._step = None
