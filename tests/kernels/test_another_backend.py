"""Room for one more backend: what a backend must have, all of it here, and a cache that runs on it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels import (
    Backend,
    FirstTokens,
    KvCacheQuant,
    Scoring,
    Segment,
    Tokens,
    backends,
    load_backend,
    reference,
    register_backend,
    why_unavailable,
)
from tests.models import random_ids, tiny_model


class Loops:
    """Attention one sequence, one head and one row at a time, with a softmax in Python: the third backend."""

    NAME = "loops"
    TILE_ORDER = "v_transposed"
    FORMATS: Collection[str] = ("int8",)
    LONG_CHUNKS = False
    SEGMENTS = False

    def __init__(self) -> None:
        self.rows = 0

    def unavailable(self, device: torch.device, block_size: int, head_dim: int, v_head_dim: int) -> str | None:
        return None if device.type == "cpu" else f"it loops on the CPU, not on {device.type!r}"

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, filled_slowly: bool = False
    ) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def filled(self, segment: Segment) -> None:
        raise AssertionError("it reads storages of one segment")

    def append(self, k_new: torch.Tensor, v_new: torch.Tensor, storage: KvCacheQuant, tokens: Tokens) -> None:
        reference.append(k_new, v_new, storage, tokens)

    def attend(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        storage: KvCacheQuant,
        tokens: Tokens,
        scoring: Scoring,
        fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
        first_tokens: FirstTokens | None = None,
    ) -> None:
        assert fresh is None, "LONG_CHUNKS says that callers gather the past"
        assert scoring.softcap is scoring.sink_logits is scoring.key_mask is None
        num_q_heads, q_len = q.shape[1:3]
        group = num_q_heads // storage.num_kv_heads
        longest = int(tokens.context_lens.max())
        keys, values = self.gather(storage, tokens, 0, longest, torch.float32)
        if first_tokens is not None:
            first_tokens.put_both(keys, values, 0)
        for b, length in enumerate(tokens.context_lens.tolist()):
            for head in range(num_q_heads):
                for i in range(q_len):
                    stop = length - q_len + i + 1
                    seen = slice(max(stop - tokens.window, 0) if tokens.window else 0, stop)
                    scores = scoring.scale * keys[b, head // group, seen] @ q[b, head, i].float()
                    weights = torch.exp(scores - scores.max())
                    out[b, head, i] = (weights / weights.sum()) @ values[b, head // group, seen]
                    self.rows += 1

    def gather(
        self, storage: KvCacheQuant, tokens: Tokens, start: int, stop: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.gather(storage, tokens, start, stop, dtype)

    def copy(self, storage: KvCacheQuant, src: torch.Tensor, dst: torch.Tensor) -> None:
        reference.copy(storage, src, dst)


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Loops:
    monkeypatch.setattr(backends, "_registered", {})
    backend = Loops()
    register_backend(backend)
    return backend


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_generates_on_a_registered_backend(loops: Loops, name: str, beams: int) -> None:
    model: Any = tiny_model(name)
    model.set_attn_implementation("int8_paged")
    ids = random_ids(2, 21)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    outputs = []
    for backend in ("reference", "loops"):
        cache = PagedInt8Cache(model.config, backend=backend)
        outputs.append(model.generate(ids, past_key_values=cache, **options))
        assert {layer.storage.backend for layer in cache.layers} == {backend}
    assert torch.equal(*outputs)
    # Every step but the prompt's own reads the blocks: layers, sequences, heads.
    config = model.config
    assert loops.rows == config.num_hidden_layers * 2 * beams * config.num_attention_heads * 7


def test_a_registered_backend_is_asked_for_by_name_and_refused_where_it_cannot_serve(loops: Loops) -> None:
    assert load_backend("loops") is loops
    assert why_unavailable("loops", torch.device("meta")) == "it loops on the CPU, not on 'meta'"
    with pytest.raises(ValueError, match="choose one of reference, cpu, triton, loops, or None"):
        load_backend("lops")


def test_a_name_is_given_once(loops: Loops) -> None:
    register_backend(loops)  # the same one again changes nothing
    another: Backend = Loops()
    with pytest.raises(ValueError, match="another backend is called 'loops' already"):
        register_backend(another)
    another.NAME = "cpu"
    with pytest.raises(ValueError, match="another backend is called 'cpu' already"):
        register_backend(another)
