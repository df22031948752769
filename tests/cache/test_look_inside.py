"""`describe`, `plot` and `repr`: what they say is what the cache holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, MambaConfig

from hf_int8_paged import PagedInt8Cache, PagedInt8Pool
from tests.models import random_ids, tiny_model


def step(model: Any, cache: Any, batch: int, tokens: int) -> None:
    with torch.no_grad():
        model(random_ids(batch, tokens), past_key_values=cache)


@pytest.mark.parametrize("options", [{}, {"max_batch_size": 4, "max_cache_len": 90}], ids=["growing", "preallocated"])
def test_a_description_counts_what_is_there(options: dict[str, Any], backend: str) -> None:
    model = tiny_model("gemma2")
    cache = PagedInt8Cache(model.config, backend=backend, **options)
    dense: Any = DynamicCache(config=model.config)
    for one in (cache, dense):
        step(model, one, 2, 70)
    said = cache.describe()
    assert (said.sequences, said.tokens) == (2, 70)
    assert said.bytes_used == cache.nbytes_used
    assert said.bytes_allocated == cache.nbytes_allocated
    assert said.bytes_dense == sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    assert said.backends == (backend,)
    windows, full = said.groups if said.groups[0].name.startswith("sliding") else reversed(said.groups)
    assert (full.layers, full.blocks_used) == (2, 2 * 5)
    assert (windows.layers, windows.blocks_shared) == (2, 0)
    for group in said.groups:
        assert f"{group.blocks_used} blocks, {group.blocks_shared} shared; {group.blocks_free} free" in str(said)
    assert repr(cache) == f"PagedInt8Cache(4 layers, 2 sequences of 70 tokens{', preallocated' if options else ''})"


def test_shared_blocks_and_limits_are_named() -> None:
    model = tiny_model("llama")
    cache = PagedInt8Cache(model.config, max_bytes="1MiB")
    assert "0 of 0 tokens" in str(cache.describe())
    assert "not chosen yet" in str(cache.describe())
    step(model, cache, 1, 40)
    assert cache.describe().groups[0].blocks_shared == 0
    twin = cache.fork()
    assert cache.describe().groups[0].blocks_shared == 3
    step(model, twin, 1, 1)
    assert cache.describe().groups[0].blocks_shared == 2
    assert "of at most 1 MiB" in str(cache.describe())
    html = cache.describe()._repr_html_()
    assert html.count("<tr>") == len(cache.describe().rows())
    assert all(value.replace("'", "&#x27;") in html for _, value in cache.describe().rows())


def test_a_picture_shows_every_block_by_its_owner() -> None:
    model = tiny_model("gemma2")
    pool = PagedInt8Pool()
    cache, other = PagedInt8Cache(model.config, pool=pool), PagedInt8Cache(model.config, pool=pool)
    step(model, cache, 2, 70)
    step(model, other, 1, 40)
    figure = cache.plot()
    assert len(figure.axes) == 2
    for axes, group in zip(figure.axes, cache._sequences.groups.values()):
        colours = axes.images[0].get_array().reshape(-1, 4)[:, :3]
        owners = {tuple(colours[block]) for row in group.table.ids for block in row if block >= 0}
        assert len(owners) == 2
        free = [b for b in range(group.table.allocator.num_blocks) if not group.table.allocator.ref_count(b)]
        assert all((colours[block] == 1).all() for block in free)
        held = {tuple(colours[b]) for b in other._sequences.groups[group.name].table.held()}
        assert len(held - owners) == 1
        assert f"{len(free)} free" in axes.get_title(loc="left")
    with pytest.raises(ValueError, match="has 2 groups of layers, but 1 axes"):
        cache.plot(figure.axes[0])
    with pytest.raises(ValueError, match="preallocated cache shares no blocks"):
        PagedInt8Cache(model.config, max_batch_size=1, max_cache_len=40).plot()


def test_a_picture_of_more_sequences_than_colours_says_so() -> None:
    cache = PagedInt8Cache(tiny_model("llama").config)
    for batch, expected in ((8, []), (11, ["3 more, colours again"])):
        cache.reset()
        step(tiny_model("llama"), cache, batch, 20)
        labels = [text.get_text() for text in cache.plot().axes[0].get_legend().get_texts()]
        assert labels[:8] == [f"sequence {row}" for row in range(8)]
        assert labels[8:-3] == expected


@pytest.mark.parametrize("axes", [None, []])
def test_there_is_no_picture_of_a_cache_without_blocks(axes: Any) -> None:
    cache = PagedInt8Cache(MambaConfig(num_hidden_layers=2))
    with pytest.raises(ValueError, match="no layer of this cache holds keys and values in blocks"):
        cache.plot(axes)
