"""What the cache really holds in memory, and that decoding never waits for a device."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_int8_paged import PagedInt8Cache
from tests.models import random_ids, tiny_model

MODEL = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 64}


def storages() -> dict[int, int]:
    """Bytes of every tensor storage that is alive, by address."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_no_tensor_of_the_cache_s_size_is_alive_but_the_int8_blocks(batch):
    model = tiny_model("llama", **MODEL)
    model.set_attn_implementation("int8_paged")
    model.generate(
        random_ids(batch, 30), past_key_values=PagedInt8Cache(model.config), max_new_tokens=3, do_sample=False
    )
    gc.collect()
    before = storages()
    cache = PagedInt8Cache(model.config)
    tokens = model.generate(random_ids(batch, 2000), past_key_values=cache, max_new_tokens=20, do_sample=False)
    gc.collect()
    new = sorted(set(storages().items()) - set(before.items()), key=lambda item: -item[1])
    blocks = [x for layer in cache.layers for segment in layer.storage.segments for x in segment]
    own = {block.untyped_storage().data_ptr() for block in blocks}
    one_layer = batch * 2000 * 2 * 64
    others = [size for address, size in new if address not in own and size >= one_layer / 8]
    assert others == [], "tensors of the order of a layer's keys, beside the blocks"
    assert sum(size for address, size in new if address in own) <= 1.05 * cache.nbytes_allocated + 16 * 2**21
    assert tokens.shape == (batch, 2020)


@pytest.mark.parametrize("tokens", [5, 16, 640])
def test_bytes_in_use_are_the_tokens_int8_values_and_scales_rounded_up_to_blocks(tokens):
    model = tiny_model("llama", **MODEL)
    model.set_attn_implementation("int8_paged")
    cache = PagedInt8Cache(model.config)
    with torch.no_grad():
        model(random_ids(2, tokens), past_key_values=cache)
    per_token = 4 * 2 * (2 * 64 + 2 * 2)
    first_tokens = 4 * 2 * 2 * 2 * 64 * 4  # as they are, in float32
    assert cache.nbytes_used == 2 * -(-tokens // 16) * 16 * per_token + first_tokens
    assert cache.nbytes_used <= cache.nbytes_allocated
    # 52 % of a 16-bit cache, 27 % of a 32-bit one, but for the last block of each sequence.
    sixteen_bit = 2 * tokens * 4 * 2 * 2 * 64 * 2
    assert cache.nbytes_used <= 0.52 * sixteen_bit + 2 * 16 * per_token + first_tokens
    cache.reset()
    assert cache.nbytes_used == 0


def test_growth_allocates_a_quarter_more_than_needed_at_most():
    model = tiny_model("llama", **MODEL)
    model.set_attn_implementation("int8_paged")
    cache = PagedInt8Cache(model.config)
    allocations = set()
    with torch.no_grad():
        model(random_ids(1, 1000), past_key_values=cache)
        for _ in range(300):
            model(random_ids(1, 1), past_key_values=cache)
            allocations.add(cache.nbytes_allocated)
            assert cache.nbytes_allocated <= 1.25 * cache.nbytes_used + 8 * 16 * 4 * 2 * 132
    assert len(allocations) <= 3, "the pool grows rarely"


def test_a_sliding_window_keeps_its_window_and_no_more():
    model = tiny_model("mistral", sliding_window=64)
    model.set_attn_implementation("int8_paged")
    cache = PagedInt8Cache(model.config)
    per_block = 3 * 16 * 2 * (2 * 16 + 4)
    first_tokens = 3 * 2 * 2 * 2 * 16 * 4
    with torch.no_grad():
        model(random_ids(2, 500), past_key_values=cache)
        for _ in range(100):
            model(random_ids(2, 1), past_key_values=cache)
            assert cache.nbytes_used <= 2 * (64 // 16 + 1) * per_block + first_tokens


class Synchronisations(TorchDispatchMode):
    """Counts the operations that would make the host wait for a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select", "item")

    def __init__(self):
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.seen[name] += 1
        result = func(*args, **kwargs or {})
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], result) if name == "_to_copy" else (args[1], args[0])
            if source.device.type != "cpu" and target.device.type == "cpu":
                self.seen["device to host"] += 1
        return result


class SpyBackend:
    """Stands for a device's kernels: records that they were launched, and with what."""

    NAME = "spy"

    def __init__(self):
        self.calls: list[tuple[str, torch.device]] = []

    def append(self, k_new, v_new, storage, tokens):
        self._record("append", storage.k, k_new, v_new, *vars(tokens).values())

    def attend(self, out, q, storage, tokens, scoring, fresh, first_tokens):
        assert fresh is None
        first = [] if first_tokens is None else vars(first_tokens).values()
        self._record("attend", storage.k, out, q, *vars(tokens).values(), *scoring, *first)

    def _record(self, name, *tensors):
        (device,) = {x.device for x in tensors if isinstance(x, torch.Tensor)}
        self.calls.append((name, device))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left_padded"])
def test_decode_never_waits_for_the_device(name, padded, monkeypatch):
    """A whole model on the meta device, which has no data: whatever needed a value on the host would fail there, and
    what waits or copies to the host is counted besides. Only a first prompt may wait: equal ones are looked for."""
    monkeypatch.setattr("hf_int8_paged.sequences.growing_room.same_prompts", lambda key_states: None)
    model = tiny_model(name).to("meta")
    model.set_attn_implementation("int8_paged")
    cache, spy = PagedInt8Cache(model.config), SpyBackend()
    mask = torch.ones(2, 23, dtype=torch.bool, device="meta") if padded else None
    keys = torch.empty(2, 2, 20, model.model.layers[0].self_attn.head_dim, device="meta")
    for layer in cache.layers:
        layer.lazy_initialization(keys, keys)
        layer.room.backend = spy
    for layer in cache.layers:
        cache.update(keys, keys, layer.index)
    spy.calls.clear()
    with torch.no_grad(), Synchronisations() as counted:
        for step in range(3):
            ids = torch.empty(2, 1, dtype=torch.long, device="meta")
            model(
                ids,
                past_key_values=cache,
                attention_mask=mask[:, : 21 + step] if padded else None,
                position_ids=torch.empty(2, 1, dtype=torch.long, device="meta"),
            )
    assert counted.seen == {}
    device = torch.device("meta")
    assert spy.calls == [("append", device), ("attend", device)] * len(cache.layers) * 3


def test_a_cache_goes_without_the_garbage_collector() -> None:
    """Blocks come back, and memory is freed, when the last name of a cache goes."""
    cache = PagedInt8Cache(tiny_model("llama").config)
    for layer in range(3):
        cache.update(torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16), layer)
    storage, pool = weakref.ref(cache.layers[0].storage), cache.pool
    gc.collect()
    gc.disable()
    try:
        del cache
        assert pool.nbytes_used == 0
        del pool
        assert storage() is None
    finally:
        gc.enable()
