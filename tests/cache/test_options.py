"""Options that cannot be: refused when the cache is made, with the value and what would work."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlavaConfig

from hf_int8_paged import PagedInt8Cache, PagedInt8Pool
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from tests.models import tiny_model

CONFIG = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
PREALLOCATED = {"max_batch_size": 2, "max_cache_len": 64}


def without_addresses(x: object) -> str:
    """A test's name, the same in every process."""
    return re.sub(r" object at 0x\w+", "", str(x))


#: Options of a pool, of a cache too when it makes its own pool.
OF_THE_POOL = [
    ({"block_size": 16.0}, TypeError, r"block_size must be an integer, got 16.0 \(float\); block_size=16 would do"),
    ({"block_size": "16"}, TypeError, r"block_size must be an integer, got '16' \(str\)"),
    ({"block_size": True}, TypeError, r"block_size must be an integer, got True \(bool\)"),
    ({"block_size": None}, TypeError, "block_size must be an integer, got None"),
    ({"block_size": 24}, ValueError, "block_size must be a positive multiple of 16, got 24"),
    ({"max_tokens": 1.5}, TypeError, r"max_tokens must be an integer, got 1.5 \(float\)$"),
    ({"max_tokens": True}, TypeError, "max_tokens must be an integer, got True"),
    ({"max_tokens": -3}, ValueError, "max_tokens must be at least 1, got -3"),
    ({"max_tokens": 15}, ValueError, "max_tokens=15 is less than one block.*give at least 16"),
    ({"center_keys": "no"}, TypeError, r"center_keys must be True or False, got 'no' \(str\)"),
    ({"center_keys": 1}, TypeError, "center_keys must be True or False, got 1"),
    ({"center_keys": None}, TypeError, "center_keys must be True or False, got None"),
    ({"rotation": True}, ValueError, "unknown rotation True; choose one of hadamard, or None"),
    ({"rotation": ["hadamard"]}, ValueError, "unknown rotation .*; choose one of hadamard, or None"),
    ({"rotation": "walsh"}, ValueError, "unknown rotation 'walsh'; choose one of hadamard, or None"),
    ({"offloading": 1}, TypeError, r"offloading must be True or False, got 1 \(int\)"),
    ({"offload_only_non_sliding": None}, TypeError, "offload_only_non_sliding must be True or False, got None"),
    ({"offloading": True, "resident_layers": 1.5}, TypeError, "resident_layers must be an integer, got 1.5"),
    ({"offloading": True, "resident_layers": -1}, ValueError, "resident_layers must be at least 0, got -1"),
    ({"offloading": True, "offload_folder": 3}, TypeError, r"offload_folder must be a folder or None, got 3 \(int\)"),
    ({"offloading": True, "offload_folder": "/no/folder"}, ValueError, "offload_folder: no file can be made in '/no/f"),
    ({"backend": 3}, TypeError, r"backend must be a backend's name or None, got 3 \(int\)"),
    ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'; choose one of reference, cpu, triton"),
]
OF_THE_CACHE = [
    ({"max_cache_len": 64.0}, TypeError, r"max_cache_len must be an integer, got 64.0 \(float\); max_cache_len=64"),
    ({"max_cache_len": True}, TypeError, "max_cache_len must be an integer, got True"),
    ({"max_cache_len": 0}, ValueError, "max_cache_len must be at least 1, got 0"),
    ({"max_batch_size": "2", "max_cache_len": 64}, TypeError, "max_batch_size must be an integer, got '2'"),
    ({"sink_tokens": True}, TypeError, "sink_tokens must be an integer, got True"),
    ({"sink_tokens": None}, TypeError, "sink_tokens must be an integer, got None"),
    ({"sink_tokens": 17}, ValueError, "sink_tokens must be between 0 and 16, got 17"),
    ({"pool": 3}, TypeError, "pool must be a PagedInt8Pool or None, got 3"),
    ({"pool": PagedInt8Pool}, TypeError, "pool must be a PagedInt8Pool or None, got <class"),
    ({"device": 1.5}, TypeError, r"device must be a torch.device or its name, got 1.5 \(float\); this machine has cpu"),
    ({"device": "tpu"}, ValueError, "unknown device 'tpu'; this machine has cpu"),
    ({"device": "hpu:3"}, ValueError, "there is no device 'hpu:3' here; this machine has cpu"),
]
TOGETHER = [
    (PREALLOCATED | {"offloading": True}, "a preallocated cache does not offload layers: .*leave out max_batch_size"),
    ({"resident_layers": 2}, "resident_layers=2 needs offloading=True"),
    ({"offload_folder": "."}, "offload_folder='.' needs offloading=True"),
    ({"pool": PagedInt8Pool(), "offloading": True}, "^offloading: .* belong to the pool"),
    ({"max_batch_size": 2}, "max_batch_size=2 preallocates everything, which needs max_cache_len too"),
    (PREALLOCATED | {"max_tokens": 64}, "max_tokens=64 limits a cache that grows"),
    (PREALLOCATED | {"pool": PagedInt8Pool()}, "needs no pool; leave out one of the two"),
    ({"pool": PagedInt8Pool(), "max_tokens": 64}, "^max_tokens: .* belong to the pool"),
    ({"pool": PagedInt8Pool(), "rotation": None, "center_keys": False}, "^rotation, center_keys: .*the pool"),
]


@pytest.mark.parametrize(("options", "error", "message"), OF_THE_POOL, ids=without_addresses)
def test_an_option_of_the_pool_is_of_the_wrong_kind_or_out_of_range(options, error, message):
    for make in (PagedInt8Pool, lambda **given: PagedInt8Cache(CONFIG, **given)):
        with pytest.raises(error, match=message):
            make(**options)


@pytest.mark.parametrize(("options", "error", "message"), OF_THE_CACHE, ids=without_addresses)
def test_an_option_of_the_cache_is_of_the_wrong_kind_or_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        PagedInt8Cache(CONFIG, **options)


@pytest.mark.parametrize(("options", "message"), TOGETHER, ids=without_addresses)
def test_an_option_that_a_mode_cannot_honour_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PagedInt8Cache(CONFIG, **options)


def test_a_device_that_this_machine_lacks():
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    kind = torch.accelerator.current_accelerator().type if count else "cuda"
    for backend in (None, "reference"):
        with pytest.raises(ValueError, match=f"no device '{kind}:{count}' here; this machine has cpu"):
            PagedInt8Cache(CONFIG, device=f"{kind}:{count}", backend=backend)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "it got none"),
        (LlamaConfig, "it got the class LlamaConfig instead of an object"),
        ("gpt2", r"it got the name 'gpt2'; .*AutoConfig.from_pretrained\('gpt2'\)"),
        ({"num_hidden_layers": 2}, "it got a dict; AutoConfig.for_model"),
        (tiny_model("llama", num_hidden_layers=1), "it got the LlamaForCausalLM itself"),
        (3, r"it got 3 \(int\)"),
    ],
    ids=["none", "class", "name", "dict", "model", "number"],
)
@pytest.mark.parametrize("options", [{}, PREALLOCATED], ids=["growing", "preallocated"])
def test_something_else_than_a_config(config, message, options):
    with pytest.raises(TypeError, match=f"needs the model's config.*{message}.*PagedInt8Cache\\(model.config\\)"):
        PagedInt8Cache(config, **options)
    if config is None:
        with pytest.raises(TypeError, match=message):
            PagedInt8Cache(**options)


def test_the_class_instead_of_a_cache():
    model = tiny_model("llama")
    ids, mark = torch.tensor([[1, 2, 3]]), vars(PagedInt8Cache)["_is_user_defined"]
    for call in (model, model.generate):
        with pytest.raises(TypeError, match=r"got the class PagedInt8Cache.*give it PagedInt8Cache\(model.config\)"):
            call(ids, **{CACHE_ARGUMENT: PagedInt8Cache})
    # `generate` marks whatever it is given; the class's own attribute is how it is told what does not fit.
    assert vars(PagedInt8Cache)["_is_user_defined"] is mark


def test_the_text_part_of_a_multimodal_config_is_found():
    config = LlavaConfig(text_config=CONFIG)
    assert len(PagedInt8Cache(config)) == len(PagedInt8Cache(config, **PREALLOCATED)) == 2


def test_numpy_integers_and_booleans_are_taken_as_python_s():
    cache = PagedInt8Cache(
        CONFIG, block_size=np.int64(32), max_tokens=np.int32(64), center_keys=np.bool_(False), sink_tokens=np.uint8(2)
    )
    assert (cache.pool.block_size, cache.pool.max_tokens, cache.pool.center_keys) == (32, 64, False)
    assert type(cache.pool.block_size) is type(cache.pool.max_tokens) is int
    keys = torch.randn(1, 2, 20, 16)
    for layer in range(2):
        cache.update(keys, keys, layer)
    assert cache.get_seq_length() == 20
