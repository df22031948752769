"""Beams, rollback, forks, shared pools: what `generate` and users do to a cache besides appending."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Cache

from hf_int8_paged import PagedInt8Cache, PagedInt8Pool
from tests.models import TINY, FakeQuantizedCache, fake_quantize, random_ids, tiny_model, tipped_roundings

from .shadowed_cache import ShadowedCache

#: Rows stored as they come: what a sequence stores then depends on nothing but itself.
PLAIN = {"rotation": None, "center_keys": False}
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 30}


def ready(name: str, **changes):
    model = tiny_model(name, **changes)
    model.set_attn_implementation("int8_paged")
    return model


class DenseTwin:
    """The same stored rows in plain tensors: what every table operation must amount to."""

    def __init__(self, layers: int):
        self.layers = layers
        self.keys: torch.Tensor | None = None

    def append(self, rows: torch.Tensor) -> None:
        exact = rows[:, :, :1]
        rows = fake_quantize(rows)
        if self.keys is None:
            rows[:, :, :1] = exact
        self.keys = rows if self.keys is None else torch.cat([self.keys, rows], dim=2)

    def check(self, cache: PagedInt8Cache) -> None:
        assert self.keys is not None
        for layer in cache.layers:
            assert torch.equal(layer.keys.clone(), self.keys)
            assert torch.equal(layer.values.clone(), -self.keys)


def append(cache: PagedInt8Cache, twin: DenseTwin, batch: int, tokens: int, seed: int) -> None:
    rows = torch.randn(batch, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))
    for layer in range(twin.layers):
        cache.update(rows, -rows, layer)
    twin.append(rows)


@pytest.mark.parametrize("tokens", [3, 16, 21, 64], ids=lambda n: f"{n}_tokens")
def test_table_operations_amount_to_tensor_operations(tokens, backend):
    cache, twin = PagedInt8Cache(ready("llama").config, backend=backend, **PLAIN), DenseTwin(3)
    append(cache, twin, 3, tokens, seed=0)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    twin.keys = twin.keys[[2, 0, 2]]
    twin.check(cache)
    append(cache, twin, 3, 5, seed=1)
    twin.check(cache)
    cache.batch_repeat_interleave(2)
    twin.keys = twin.keys.repeat_interleave(2, 0)
    append(cache, twin, 6, 1, seed=2)
    twin.check(cache)
    cache.crop(-4)
    twin.keys = twin.keys[:, :, :-4]
    append(cache, twin, 6, 20, seed=3)
    twin.check(cache)
    keep = torch.tensor([True, False, False, True, True, False])
    cache.batch_select_indices(keep)
    twin.keys = twin.keys[keep]
    append(cache, twin, 3, 17, seed=4)
    twin.check(cache)
    cache.reset()
    assert cache.nbytes_used == 0


MODES = {
    "beams": {"num_beams": 4},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "several_beams_returned": {"num_beams": 4, "num_return_sequences": 3},
    "several_samples_returned": {"do_sample": True, "num_return_sequences": 3},
    "prompt_lookup": {"prompt_lookup_num_tokens": 5},
}


def generate(model, ids: torch.Tensor, cache: Cache, **options) -> torch.Tensor:
    torch.manual_seed(11)
    return model.generate(ids, past_key_values=cache, **GREEDY | options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(set(TINY) - {"llama"}))  # test_decoding_matrix.py has all modes of that
def test_decoding_modes_give_the_oracle_s_tokens(name, mode):
    """The oracle moves real rows where the paged cache moves table entries."""
    model, ids = ready(name), random_ids(2, 45, seed=6)
    if mode == "prompt_lookup":
        ids = torch.cat([ids[:1, :20]] * 3, dim=1)
    model.set_attn_implementation("eager")
    expected = generate(model, ids, FakeQuantizedCache(model.config), **MODES[mode])
    assert torch.equal(generate(model, ids, PagedInt8Cache(model.config), **MODES[mode]), expected)
    model.set_attn_implementation("int8_paged")
    exact_kernels = PagedInt8Cache(model.config, backend="reference")
    assert torch.equal(generate(model, ids, exact_kernels, **MODES[mode]), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(set(TINY) - {"llama"}))
def test_decoding_modes_read_what_the_oracle_stores(name, mode, checked):
    """By the native kernels: before a rounding can tip, layer by layer."""
    model, ids = ready(name), random_ids(2, 45, seed=6)
    if mode == "prompt_lookup":
        ids = torch.cat([ids[:1, :20]] * 3, dim=1)
    generate(model, ids, ShadowedCache(model.config), **MODES[mode])
    assert len(checked.compared) >= 30


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_draft_model_assists_with_both_caches_paged(name):
    model, draft, ids = ready(name), ready(name, num_hidden_layers=1), random_ids(1, 40, seed=2)
    expected = generate(model, ids, PagedInt8Cache(model.config, backend="reference", **PLAIN))
    cache = PagedInt8Cache(model.config, backend="reference", **PLAIN)
    assisted = generate(model, ids, cache, assistant_model=draft)
    assert torch.equal(assisted, expected)


def test_eight_beams_hold_a_long_prompt_once():
    model, tokens, new = ready("llama"), 4000, 20
    cache = PagedInt8Cache(model.config)
    generate(model, random_ids(1, tokens, seed=8), cache, num_beams=8, max_new_tokens=new)
    (allocator,) = cache.pool.allocators.values()
    assert allocator.num_used <= tokens // 16 + 8 * (-(-new // 16) + 1)
    # The prompt's blocks were never more than once in the pool, not even for a moment.
    assert allocator.num_blocks <= 1.25 * (tokens // 16 + 8 * (-(-new // 16) + 1)) + 8


def test_equal_prompts_with_different_padding_do_not_share(backend):
    """The first layer's keys are equal; the later layers show that the sequences are not."""
    model, ids = ready("llama"), random_ids(1, 40).repeat(2, 1)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 10:14] = 0
    positions = torch.arange(40).repeat(2, 1)
    step = {"attention_mask": torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)}
    logits = []
    with torch.no_grad():
        for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
            cache = PagedInt8Cache(model.config, backend=backend, **PLAIN)
            model(ids[rows], attention_mask=mask[rows], position_ids=positions[rows], past_key_values=cache)
            one = {"attention_mask": step["attention_mask"][rows], "position_ids": torch.full((len(ids[rows]), 1), 40)}
            logits.append(model(ids[rows, :1], past_key_values=cache, **one).logits)
    together, alone = logits[0], torch.cat(logits[1:])
    assert (together - alone).abs().max() < tipped_roundings(model) < (together[0] - together[1]).abs().max() / 10


def test_forks_share_blocks_and_go_their_own_ways():
    model, prompt = ready("gemma2"), random_ids(1, 200, seed=1)
    cache = PagedInt8Cache(model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    used = cache.nbytes_used
    forks = [cache.fork(), copy.deepcopy(cache)]
    assert cache.nbytes_used == used
    questions = [random_ids(1, n, seed=n) for n in (30, 7, 18)]
    expected = []
    for question in questions:
        alone = PagedInt8Cache(model.config)
        with torch.no_grad():
            model(prompt, past_key_values=alone)
        expected.append(generate(model, torch.cat([prompt, question], dim=1), alone))
    for branch, question, tokens in zip([*forks, cache], questions, expected):
        assert torch.equal(generate(model, torch.cat([prompt, question], dim=1), branch), tokens)


def test_a_fork_that_is_dropped_gives_its_blocks_back():
    pool = PagedInt8Pool()
    model = ready("llama")
    cache = PagedInt8Cache(model.config, pool=pool)
    generate(model, random_ids(2, 50), cache)
    used = pool.nbytes_used
    fork = cache.fork()
    generate(model, torch.cat([random_ids(2, 80), random_ids(2, 9)], dim=1), fork)
    assert pool.nbytes_used > used
    del fork
    assert pool.nbytes_used == used
    del cache
    assert pool.nbytes_used == 0


def test_the_prefix_caching_recipe_of_the_transformers_documentation():
    model = ready("llama")
    prefix = random_ids(1, 70, seed=1)
    prompt_cache = PagedInt8Cache(model.config)
    with torch.no_grad():
        prompt_cache = model(prefix, past_key_values=prompt_cache).past_key_values
    for seed in (2, 3):
        inputs = torch.cat([prefix, random_ids(1, 12, seed=seed)], dim=1)
        tokens = generate(model, inputs, copy.deepcopy(prompt_cache))
        alone = PagedInt8Cache(model.config)
        with torch.no_grad():
            model(prefix, past_key_values=alone)
        assert torch.equal(tokens, generate(model, inputs, alone))
    assert prompt_cache.get_seq_length() == 70


def test_caches_of_one_pool_do_not_disturb_each_other():
    model, pool = ready("mistral"), PagedInt8Pool(**PLAIN)
    prompts = [random_ids(2, n, seed=n) for n in (33, 60)]
    caches = [PagedInt8Cache(model.config, pool=pool) for _ in prompts]
    alone = [PagedInt8Cache(model.config, **PLAIN) for _ in prompts]
    with torch.no_grad():
        for pair in (caches, alone):
            for cache, prompt in zip(pair, prompts):
                model(prompt, past_key_values=cache)
        for step in range(40):
            ids = random_ids(2, 1, seed=step)
            for ours, other in zip(caches, alone):
                assert torch.equal(model(ids, past_key_values=ours).logits, model(ids, past_key_values=other).logits)


def test_left_padding_is_given_back():
    model, prompts = ready("llama"), [random_ids(1, n, seed=n) for n in (7, 100)]
    ids = torch.cat([torch.nn.functional.pad(p, (100 - p.shape[1], 0)) for p in prompts])
    cache = PagedInt8Cache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=(ids != 0).long(), past_key_values=cache)
    (allocator,) = cache.pool.allocators.values()
    assert allocator.num_used == 2 + 7  # positions 80 to 100 of the short one, all of the long one


def test_a_row_of_padding_only_disturbs_nobody():
    model, ids = ready("llama"), random_ids(2, 50)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1] = 0
    cache, alone = PagedInt8Cache(model.config, **PLAIN), PagedInt8Cache(model.config, **PLAIN)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        model(ids[:1], past_key_values=alone)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        both = model(ids[:, :1], attention_mask=mask, past_key_values=cache).logits
        one = model(ids[:1, :1], past_key_values=alone).logits
    assert both.isfinite().all()
    assert (both[:1] - one).abs().max() < tipped_roundings(model)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_holes_of_padding_between_turns(name):
    """Right padding of a first turn lies in the middle after the second."""
    model = ready(name)
    turns = [random_ids(1, n, seed=n) for n in (20, 25)]
    with torch.no_grad():
        cache, alone = PagedInt8Cache(model.config, **PLAIN), PagedInt8Cache(model.config, **PLAIN)
        padded = torch.nn.functional.pad(turns[0], (0, 40))
        mask = (padded != 0).long()
        positions = torch.arange(60)[None].clamp(max=19)
        model(padded, attention_mask=mask, position_ids=positions, past_key_values=cache)
        model(turns[0], past_key_values=alone)
        mask = torch.cat([mask, torch.ones(1, 25, dtype=torch.long)], dim=1)
        positions = torch.arange(20, 45)[None]
        ours = model(turns[1], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        other = model(turns[1], position_ids=positions, past_key_values=alone).logits
    if name == "llama":
        assert (ours - other).abs().max() < tipped_roundings(model)
    assert ours.isfinite().all()


def test_a_prompt_longer_than_the_window_is_not_cropped_without_recording():
    """Block 0 was never written: position 15, which the sliding layers would see again, is not held."""
    model = ready("mistral")
    cache = PagedInt8Cache(model.config)
    with torch.no_grad():
        model(random_ids(1, 36), past_key_values=cache)
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            cache.crop(-2)
    assert cache.get_seq_length() == 36
