"""`generate` with the paged cache: the same tokens under every attention implementation, and the oracle's logits."""

from __future__ import annotations

import pytest
import torch
from transformers import Cache, DynamicCache

from hf_int8_paged import PagedInt8Cache
from tests.models import IMPLEMENTATIONS, TINY, FakeQuantizedCache, random_ids, tiny_model

GREEDY = {"do_sample": False, "pad_token_id": 0}


def generate(model, ids, cache: Cache | None = None, **kwargs):
    cache = PagedInt8Cache(model.config) if cache is None else cache
    return model.generate(ids, past_key_values=cache, **GREEDY | kwargs)


@torch.no_grad()
def logits_per_step(model, ids: torch.Tensor, prompt: int, cache: Cache, chunk: int = 1) -> torch.Tensor:
    """Feed a prompt, then the rest in chunks; logits ``[batch, tokens, vocabulary]`` of every position."""
    pieces = [ids[:, :prompt], *ids[:, prompt:].split(chunk, dim=1)]
    return torch.cat([model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], dim=1)


def assert_like_oracle(
    model, ids: torch.Tensor, prompt: int, chunk: int = 1, bound: float = 0.5, **cache_options
) -> None:
    """Logits at every step equal the fake-quantized model's.

    Under eager attention both compute the same numbers in the same order, so they agree to float32 rounding: contents,
    windows and chunks are right. Attention from the blocks rounds otherwise (the native kernels split queries and
    weights into 15 bits), which tips elements of later keys over rounding ties: one step of int8, where quantization
    itself moves every element by up to half a step. So that difference is bounded by a part (``bound``) of what
    quantization changes, in the mean square and at its largest. One wrong or missing key exceeds it.
    """
    model.set_attn_implementation("eager")
    exact = logits_per_step(model, ids, prompt, DynamicCache(config=model.config), chunk)
    oracle = logits_per_step(model, ids, prompt, FakeQuantizedCache(model.config), chunk)
    ours_eager = logits_per_step(model, ids, prompt, PagedInt8Cache(model.config, **cache_options), chunk)
    assert (ours_eager - oracle).abs().max() <= 1e-5 * oracle.abs().max()
    model.set_attn_implementation("int8_paged")
    ours = logits_per_step(model, ids, prompt, PagedInt8Cache(model.config, **cache_options), chunk)
    effect, difference = oracle - exact, ours - oracle
    assert effect.abs().max() > 0, "quantization left no trace: the oracle is not reading the quantized cache"
    assert difference.square().mean().sqrt() <= bound * effect.square().mean().sqrt()
    assert difference.abs().max() <= bound * effect.abs().max()


@pytest.mark.parametrize("name", TINY)
def test_logits_at_every_step_are_those_of_the_fake_quantized_model(name):
    assert_like_oracle(tiny_model(name), random_ids(2, 90, seed=3), prompt=37)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("chunk", [3, 16, 17, 40], ids=lambda n: f"chunks_of_{n}")
def test_logits_of_chunks_are_those_of_the_fake_quantized_model(name, chunk):
    assert_like_oracle(tiny_model(name), random_ids(2, 120, seed=4), prompt=29, chunk=chunk)


@pytest.mark.parametrize("prompt", range(1, 34), ids=lambda n: f"prompt_of_{n}")
def test_every_prompt_length_modulo_the_block_size(prompt):
    assert_like_oracle(tiny_model("llama"), random_ids(1, prompt + 20, seed=prompt), prompt)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128], ids=lambda n: f"blocks_of_{n}")
def test_every_block_size(block_size):
    assert_like_oracle(tiny_model("mistral"), random_ids(3, 200, seed=5), prompt=61, block_size=block_size)


@pytest.mark.parametrize("name", TINY)
def test_every_attention_implementation_generates_the_same_tokens(name):
    model, ids = tiny_model(name), random_ids(2, 37)
    texts = {}
    for implementation in IMPLEMENTATIONS[name]:
        model.set_attn_implementation(implementation)
        texts[implementation] = generate(model, ids, max_new_tokens=40)
    for implementation, tokens in texts.items():
        assert torch.equal(tokens, texts["int8_paged"]), implementation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models_generate(dtype):
    model = tiny_model("llama").to(dtype)
    model.set_attn_implementation("int8_paged")
    cache = PagedInt8Cache(model.config)
    tokens = generate(model, random_ids(2, 21), cache, max_new_tokens=12)
    assert tokens.shape == (2, 33)
    assert cache.layers[0].keys.dtype == dtype


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_left_padded_batch_equals_its_prompts_alone(name):
    """Without the key centre, which is the mean of the whole first batch: stored bits would depend on batch mates."""
    model = tiny_model(name)
    model.set_attn_implementation("int8_paged")
    prompts = [random_ids(1, n, seed=n) for n in (7, 16, 33, 50)]
    width = max(p.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.tensor([[0] * (width - p.shape[1]) + [1] * p.shape[1] for p in prompts])
    cache = PagedInt8Cache(model.config, center_keys=False)
    together = generate(model, ids, cache, attention_mask=mask, max_new_tokens=24)[:, width:]
    caches = [PagedInt8Cache(model.config, center_keys=False) for _ in prompts]
    alone = [generate(model, p, c, max_new_tokens=24)[0, p.shape[1] :] for p, c in zip(prompts, caches)]
    for row, expected in zip(together, alone):
        assert torch.equal(row, expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("size", [5, 16, 32, 64], ids=lambda n: f"chunks_of_{n}")
def test_chunked_prefill_reads_its_past_from_the_cache(name, size):
    """Token for token what the oracle gives, chunk by chunk."""
    model, ids = tiny_model(name), random_ids(2, 101)
    model.set_attn_implementation("eager")
    expected = generate(model, ids, FakeQuantizedCache(model.config), max_new_tokens=16, prefill_chunk_size=size)
    model.set_attn_implementation("int8_paged")
    assert torch.equal(generate(model, ids, max_new_tokens=16, prefill_chunk_size=size), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_cache_is_used_for_several_turns(name):
    model, turns = tiny_model(name), [random_ids(1, n, seed=n) for n in (23, 5, 40, 1)]
    conversations = {}
    for implementation, cache_class in (("eager", FakeQuantizedCache), ("int8_paged", PagedInt8Cache)):
        model.set_attn_implementation(implementation)
        cache, ids = cache_class(model.config), torch.empty(1, 0, dtype=torch.long)
        for turn in turns:
            ids = generate(model, torch.cat([ids, turn], dim=1), cache, max_new_tokens=11)
        conversations[implementation] = ids
    assert torch.equal(conversations["int8_paged"], conversations["eager"])


def test_sampling_with_a_seed_is_the_same_under_every_implementation():
    model, ids = tiny_model("llama"), random_ids(2, 30)
    samples = []
    for implementation in IMPLEMENTATIONS["llama"]:
        model.set_attn_implementation(implementation)
        torch.manual_seed(7)
        samples.append(generate(model, ids, do_sample=True, temperature=0.7, max_new_tokens=20))
    assert all(torch.equal(sample, samples[0]) for sample in samples)


def test_a_cache_is_empty_again_after_reset():
    model, ids = tiny_model("mistral"), random_ids(2, 50)
    model.set_attn_implementation("int8_paged")
    cache = PagedInt8Cache(model.config)
    first = generate(model, ids, cache, max_new_tokens=30)
    allocated = cache.nbytes_allocated
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes_used == 0
    assert torch.equal(generate(model, ids, cache, max_new_tokens=30), first)
    assert cache.nbytes_allocated == allocated
    cache.reset()
    assert generate(model, random_ids(5, 9), cache, max_new_tokens=3).shape == (5, 12)


def test_unusual_masks_are_obeyed():
    """A 4-D mask that hides one key from one step: the answer is that of dense attention over the same cache.

    One layer, so that both read the same blocks, on the backend that computes in float32: what is left is the order
    of sums of at most 128 terms (40 keys, heads of 16, widths of 64 and 96). The arithmetic of other backends has
    bounds of its own, in tests/cache/test_attention_routes.py.
    """
    model, ids = tiny_model("llama", num_hidden_layers=1), random_ids(1, 40)
    mask = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    mask[..., 17] = False
    logits = {}
    for implementation in ("int8_paged", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = PagedInt8Cache(model.config, backend="reference")
        with torch.no_grad():
            model(ids[:, :39], past_key_values=cache)
            plain = model(ids[:, 39:], past_key_values=cache, attention_mask=None).logits
            cache.reset()
            model(ids[:, :39], past_key_values=cache)
            logits[implementation] = model(ids[:, 39:], past_key_values=cache, attention_mask=mask).logits
    rounding = 128 * torch.finfo(torch.float32).eps * plain.abs().max()
    assert (logits["int8_paged"] - logits["sdpa"]).abs().max() < rounding
    assert (logits["int8_paged"] - plain).abs().max() > 10 * rounding


def test_without_our_cache_the_attention_function_is_plain_attention():
    model, ids = tiny_model("gemma2"), random_ids(2, 45)
    model.set_attn_implementation("eager")
    expected = model.generate(ids, max_new_tokens=20, **GREEDY)
    model.set_attn_implementation("int8_paged")
    assert torch.equal(model.generate(ids, max_new_tokens=20, **GREEDY), expected)
