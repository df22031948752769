"""A second, independent statement of the storage contract and of attention, in numpy, and poisoned test cases.

Nothing here calls the code under test but to allocate: tile orders, quantization, rotation and masks are written
again, element by element where that is affordable, so that an error in the package cannot hide in its tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hf_int8_paged.kernels import KvCacheQuant, alloc_paged_int8_layer
from tests.segments import STORES, fill_blocks, in_segments, put_whole, whole

from .first_token_cases import first_places, first_positions, keep_first

POISON = 127  # int8 value of a slot that nobody may read; its scale is NaN
FLOAT16_MAX = np.float32(65504)
#: Added to the seeds of all cases: `make test-gpu` draws fresh inputs.
SEED = int(os.environ.get("HF_INT8_PAGED_TEST_SEED", "0"))


def device_of(backend: str) -> torch.device:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return torch.device("cuda" if backend == "triton" and not interpreted else "cpu")


def int32_on(backend: str) -> dict[str, Any]:
    """Keywords of a tensor of block ids or lengths."""
    return {"dtype": torch.int32, "device": device_of(backend)}


def tile_offsets(tile_order: str, block_size: int, dim: int, *, values: bool) -> np.ndarray:
    """Offset in its tile of element d of token t, ``[block_size, dim]``."""
    t, d = np.arange(block_size)[:, None], np.arange(dim)[None]
    if tile_order == "dot4":
        return (t // 4) * dim * 4 + d * 4 + t % 4 if values else (d // 4) * block_size * 4 + t * 4 + d % 4
    if tile_order == "v_transposed" and values:
        return d * block_size + t
    return t * dim + d


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 rows and float16 scales of float32 rows, by the formula of DESIGN.md section 2."""
    assert x.dtype == np.float32
    with np.errstate(all="ignore"):
        largest = np.abs(x).max(-1, initial=0)
        faulty = ~np.isfinite(x).all(-1)
        scales = np.minimum(largest / np.float32(127), FLOAT16_MAX).astype(np.float16)
        q = np.clip(np.rint(x / scales.astype(np.float32)[..., None]), -127, 127)
    q[(scales == 0) | faulty] = 0
    scales[faulty] = np.nan
    return q.astype(np.int8), scales


def hadamard_matrix(dim: int) -> np.ndarray:
    """Orthonormal, float64, block-diagonal of the largest power of two that divides ``dim``."""
    block = np.ones((1, 1))
    while dim % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(dim // len(block)), block / np.sqrt(len(block)))


def snapshot(storage: KvCacheQuant) -> dict[str, np.ndarray]:
    """Every bit of the storage; scales as int16, so that NaNs compare."""
    stores = {name: whole(storage, name) for name in STORES}
    return {
        name: x.cpu().view(torch.int16 if x.dtype == torch.float16 else torch.int8).numpy().copy()
        for name, x in stores.items()
    }


def poisoned_layer(
    backend: str,
    num_blocks: int,
    block_size: int,
    kv_heads: int,
    head_dim: int,
    *,
    segments: bool = True,
    **kwargs: Any,
) -> KvCacheQuant:
    """A layer's storage in which every slot holds int8 127 with scale NaN; of several segments where possible."""
    make = in_segments if segments else alloc_paged_int8_layer
    storage = make(num_blocks, block_size, kv_heads, head_dim, device=device_of(backend), backend=backend, **kwargs)
    fill_blocks(storage, list(range(num_blocks)), POISON, torch.nan)
    return storage


def write_slots(
    storage: KvCacheQuant, blocks: np.ndarray, slots: np.ndarray, rows: np.ndarray, scales: np.ndarray, *, values: bool
) -> None:
    """Put quantized rows ``[kv_heads, tokens, dim]`` into their slots without the code under test."""
    name, of_scales = ("v", "v_scales") if values else ("k", "k_scales")
    new, new_scales = (whole(storage, x).cpu().numpy().copy() for x in (name, of_scales))
    offsets = tile_offsets(storage.tile_order, storage.block_size, new.shape[-1], values=values)
    tiles = new.reshape(*new.shape[:2], -1)
    tiles[:, blocks[:, None], offsets[slots]] = rows
    new_scales[:, blocks, slots] = scales
    put_whole(storage, name, torch.from_numpy(new))
    put_whole(storage, of_scales, torch.from_numpy(new_scales))


@dataclass
class Case:
    """One call of decode attention over a poisoned pool, and all that an independent check of it needs."""

    storage: KvCacheQuant
    block_table: torch.Tensor
    context_lens: torch.Tensor
    q: torch.Tensor
    scale: float
    keys: np.ndarray  # float64 [batch, kv_heads, capacity, head_dim], dequantized; NaN where there is no token
    values: np.ndarray
    options: dict[str, Any] = field(default_factory=dict)
    backend: str = "reference"

    @property
    def arguments(self) -> tuple:
        return self.q, self.storage, self.block_table, self.context_lens, self.scale

    def slot_of(self, sequence: int, position: int) -> tuple[int, int]:
        block_size = self.storage.block_size
        return int(self.block_table[sequence, position // block_size]), position % block_size


def make_case(
    backend: str,
    *,
    lens: Sequence[int] = (37,),
    kv_heads: int = 2,
    group: int = 1,
    head_dim: int = 64,
    v_head_dim: int | None = None,
    block_size: int = 16,
    q_len: int = 1,
    dtype: torch.dtype = torch.float32,
    tile_order: str | None = None,
    rotation: str | None = None,
    center: bool = False,
    holes: Sequence[tuple[int, int]] = (),
    kv_start: Sequence[int] | None = None,
    key_mask: float | None = None,
    key_mask_start: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: bool = False,
    first_tokens: int = 0,
    first_at: Sequence[int] = (),
    edit: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None = None,
    seed: int = 0,
) -> Case:
    """Random tokens in permuted blocks of a poisoned pool.

    Args:
        key_mask: share of keys that are visible, of a random mask as wide as the longest context.
        holes: (sequence, logical block) whose table entry is -1.
        first_tokens: first tokens in full precision.
        first_at: position of the first one per sequence; default 0.
        edit: changes q ``[batch, heads, q_len, head_dim]``, k and v ``[batch, kv_heads, capacity, dim]`` in place
            before k and v are quantized.
    """
    rng = np.random.default_rng(SEED + seed)
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    blocks_of = [-(-n // block_size) for n in lens]
    width, batch = max(blocks_of, default=0) + 1, len(lens)
    num_blocks = sum(blocks_of) + 3
    storage = poisoned_layer(
        backend, num_blocks, block_size, kv_heads, head_dim,
        v_head_dim=v_head_dim, tile_order=tile_order, rotation=rotation, center_keys=center,
    )  # fmt: skip
    order = rng.permutation(num_blocks)
    # What lies past a sequence's blocks points at a block that stays poisoned.
    table = np.full((batch, width), order[-1], dtype=np.int32)
    used = 0
    for b, count in enumerate(blocks_of):
        table[b, :count] = order[used : used + count]
        used += count
    for b, block in holes:
        table[b, block] = -1

    q = rng.standard_normal((batch, kv_heads * group, q_len, head_dim))
    k = rng.standard_normal((batch, kv_heads, width * block_size, head_dim))
    v = rng.standard_normal((batch, kv_heads, width * block_size, v_head_dim))
    if edit is not None:
        edit(q, k, v)
    if storage.key_center is not None:
        mu = torch.from_numpy(rng.standard_normal((kv_heads, head_dim)) * 2)
        storage.key_center.copy_(mu)
        k += mu.numpy()[:, None]
    keys, values = np.full_like(k, np.nan), np.full_like(v, np.nan)
    tokens = [(b, p) for b, n in enumerate(lens) for p in range(n) if table[b, p // block_size] >= 0]
    sequence, p = np.array(tokens, dtype=np.int64).reshape(-1, 2).T
    for dense, rows, is_values in ((keys, k, False), (values, v, True)):
        # numpy moves the advanced axes to the front.
        new = rows[sequence, :, p].transpose(1, 0, 2)  # [kv_heads, tokens of all sequences, dim]
        rows = store_rows(storage, table[sequence, p // block_size], p % block_size, new, values=is_values)
        dense[sequence, :, p] = rows.transpose(1, 0, 2)

    device, int32 = device_of(backend), int32_on(backend)
    options: dict[str, Any] = {"window": window, "softcap": softcap}
    if kv_start is not None:
        options["kv_start"] = torch.tensor(kv_start, **int32)
    if key_mask is not None:
        mask = rng.random((batch, max(lens) - key_mask_start)) < key_mask
        options["key_mask"] = torch.from_numpy(mask).to(device)
        options["key_mask_start"] = key_mask_start
    if sink_logits:
        options["sink_logits"] = torch.from_numpy(rng.standard_normal(kv_heads * group)).to(dtype).to(device)
    if first_tokens:
        places = first_places(rng, lens, first_tokens, first_at)
        options["first_tokens"] = keep_first(places, ((k, keys), (v, values)), first_tokens, dtype, device)
    case = Case(
        storage=storage,
        block_table=torch.from_numpy(table).to(device),
        context_lens=torch.tensor(lens, **int32),
        q=torch.from_numpy(q).to(dtype).to(device),
        scale=head_dim**-0.5,
        keys=keys,
        values=values,
        options=options,
        backend=backend,
    )
    poison_unseen(case)
    return case


def store_rows(
    storage: KvCacheQuant, blocks: np.ndarray, slots: np.ndarray, rows: np.ndarray, *, values: bool
) -> np.ndarray:
    """Quantize rows ``[kv_heads, tokens, dim]`` into their slots; returns them dequantized, as the model had them."""
    rotation = hadamard_matrix(rows.shape[-1]) if storage.rotation else np.eye(rows.shape[-1])
    center = np.zeros((storage.num_kv_heads, 1, 1))
    if storage.key_center is not None and not values:
        center = storage.key_center.double().cpu().numpy()[:, None]
    q, scales = quantize(((rows - center) @ rotation).astype(np.float32))
    write_slots(storage, blocks, slots, q, scales, values=values)
    return (q * scales.astype(np.float64)[..., None]) @ rotation + center


def visible_keys(case: Case) -> list[list[np.ndarray]]:
    """Positions that query row i of sequence b sees, as ``[b][i]``: the list in the public docstring, once more."""
    table, block_size = case.block_table.cpu().numpy(), case.storage.block_size
    lens, q_len = case.context_lens.tolist(), case.q.shape[2]
    kv_start, mask, window = (case.options.get(name) for name in ("kv_start", "key_mask", "window"))
    seen: list[list[np.ndarray]] = []
    for b, n in enumerate(lens):
        j = np.arange(n)
        first, stop = first_positions(case.options, b)
        visible = ((table[b, j // block_size] >= 0) & (j >= stop)) | ((j >= first) & (j < stop))
        if kv_start is not None:
            visible &= j >= int(kv_start[b])
        if mask is not None:
            column, row = j - case.options["key_mask_start"], mask[b].cpu().numpy()
            inside = (column >= 0) & (column < len(row))
            visible[~inside] = False
            visible[inside] &= row[column[inside]]
        here = j[visible]
        ends = [n - q_len + i for i in range(q_len)]
        seen.append([here[(here <= p) & (here > (p - window if window else -1))] for p in ends])
    return seen


def poison_unseen(case: Case) -> None:
    """Poison the slots of tokens that no query row sees: outside a window, before kv_start, masked, first tokens."""
    lens, seen = case.context_lens.tolist(), visible_keys(case)
    kept = [range(first_positions(case.options, b)[1]) for b in range(len(lens))]
    unread = [set(range(n)).difference(*seen[b]).union(kept[b]) for b, n in enumerate(lens)]
    places = [case.slot_of(b, p) for b, positions in enumerate(unread) for p in sorted(positions)]
    poison_slots(case.storage, [(block, slot) for block, slot in places if block >= 0])


def poison_slots(storage: KvCacheQuant, places: Sequence[tuple[int, int]]) -> None:
    """Poison slots, given as (block, slot)."""
    blocks, slots = np.array(places, dtype=np.int64).reshape(-1, 2).T
    for values, dim in ((False, storage.head_dim), (True, storage.v_head_dim)):
        rows = np.full((storage.num_kv_heads, len(blocks), dim), POISON, dtype=np.int8)
        write_slots(storage, blocks, slots, rows, np.full(rows.shape[:2], np.nan, np.float16), values=values)
