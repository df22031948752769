"""What transformers asks of a preallocated layer beyond what it asks of any: its ``StaticLayer`` face."""

from __future__ import annotations

import torch

from .layer import PagedInt8Layer
from .seam.views import Content
from .sequences.device_step import append_on_device, dense_on_device, step_on_device
from .sequences.preallocated import PreallocatedSequences
from .sequences.preallocated_room import PreallocatedRoom

_NO_ASSIGNMENT = (
    "a preallocated layer does not take keys or values by assignment; a cache that grows does, without max_batch_size"
)


class PagedInt8StaticLayer(PagedInt8Layer):
    """A cache layer with everything preallocated, so that decoding compiles: such a step changes nothing on the host.

    Args:
        index: the layer's index in the model.
        sequences: limits and lengths, which all layers of a cache share.
        window: sliding window in tokens, or ``None`` for full attention.
    """

    is_compileable = True
    sequences: PreallocatedSequences
    room: PreallocatedRoom

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return all keys and values that attention may see, lazily; see `PagedInt8Layer.update`.

        A compiled step cannot raise for what only the device knows. One that does not fit into ``max_cache_len``
        writes nothing, leaves the length as it is, and its values are NaN, so that what comes of them is NaN too.

        Returns:
            Keys and values of ``max_cache_len`` positions, those after the newest token 0.
        """
        if torch.compiler.is_compiling():
            return step_on_device(self, self.room, key_states, value_states)
        if _is_captured(key_states):
            self.sequences.captured = True
            past = append_on_device(self.room, key_states, value_states)
            if key_states.shape[2] > 1:
                return dense_on_device(self.room, key_states, value_states, past)
            keys, values = self.room.blank_views(self.max_cache_len)
            keys.content = values.content = Content(self, 0, self.max_cache_len, self.room.epoch, None)
            return keys, values
        return super().update(key_states, value_states)

    def get_seq_length(self) -> torch.Tensor | int:  # type: ignore[override]
        """Tokens per sequence, as a tensor on the layer's device: reading it on the host would wait for the device. A
        copy: flex attention's masks are evaluated after the step has counted its tokens."""
        return 0 if self.room.memory is None else self.room.memory.length.clone()

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that the mask covers, and the position of the first: the same at every step, so that what was
        compiled for one serves all."""
        sizes = self.max_cache_len, 0
        return sizes if torch.compiler.is_compiling() else self.sequences.padding.asked(sizes)

    @property
    def keys(self) -> torch.Tensor | None:
        """A lazy view of the stored keys, ``[batch, num_kv_heads, max_cache_len, head_dim]``; ``None`` before the first
        token."""
        return self.stored(values=False)

    @keys.setter  # type: ignore[override]
    def keys(self, dense: torch.Tensor) -> None:
        raise NotImplementedError(_NO_ASSIGNMENT)

    @property
    def values(self) -> torch.Tensor | None:
        """A lazy view of the stored values, ``[batch, num_kv_heads, max_cache_len, v_head_dim]``; ``None`` before the
        first token."""
        return self.stored(values=True)

    @values.setter  # type: ignore[override]
    def values(self, dense: torch.Tensor) -> None:
        raise NotImplementedError(_NO_ASSIGNMENT)

    @property
    def max_batch_size(self) -> int:
        return self.sequences.max_batch_size

    @property
    def max_cache_len(self) -> int:
        return self.sequences.max_cache_len

    @property
    def cumulative_length(self) -> torch.Tensor:  # type: ignore[override]
        """Tokens per sequence, on the layer's device."""
        self._known("cumulative_length")
        return self.room.allocated.length

    @property
    def cumulative_length_int(self) -> int:
        """``cumulative_length`` on the host, which waits for the device; layers without a window do not have it."""
        if self.window is None:
            raise AttributeError("cumulative_length_int")
        return 0 if self.room.memory is None else int(self.room.memory.length)

    @property
    def num_heads(self) -> int:
        """KV heads; unknown before the first keys."""
        return self._known("num_heads")[0]

    @property
    def k_head_dim(self) -> int:
        """Width of a key; unknown before the first ones."""
        return self._known("k_head_dim")[1]

    @property
    def v_head_dim(self) -> int:
        """Width of a value; unknown before the first ones."""
        return self._known("v_head_dim")[2]

    def rows_that_see(self, tokens: int) -> torch.Tensor:
        """The causal mask of the newest tokens over all positions; see `PreallocatedRoom.rows_that_see`."""
        return self.room.rows_that_see(tokens)


def _is_captured(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured around what happens to this tensor."""
    return getattr(x, "is_cuda", False) and torch.cuda.is_current_stream_capturing()
