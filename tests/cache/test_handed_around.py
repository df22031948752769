"""What libraries do with a cache besides generating: gather, rebuild, flatten and keep it, wrap it or forget to."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    T5Config,
    T5ForConditionalGeneration,
)

from eval import cache_api
from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from tests.models import random_ids, tiny_model

PREALLOCATED = {"max_batch_size": 2, "max_cache_len": 64}
IDS = random_ids(2, 21, seed=3)


def filled(name: str = "llama", ids: torch.Tensor = IDS, **options):
    model = tiny_model(name)
    model.set_attn_implementation("int8_paged")
    cache = PagedInt8Cache(model.config, **options)
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache})
    return model, cache


@torch.no_grad()
def next_logits(model, cache) -> torch.Tensor:
    return model(random_ids(len(IDS), 1, seed=9), **{CACHE_ARGUMENT: cache}).logits


# -- made of keys and values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_cache_made_of_another_s_layers_goes_on_as_it_does(name):
    """As data-parallel gathering and RAG's beam search make one. Quantizing what was dequantized finds the same
    integers, but for the keys' centre, which is another: at most half a step of the scale away. The prompt is shorter
    than Mistral's window."""
    model, cache = filled(name, IDS[:, :15], center_keys=False)
    twin = type(cache)(tuple(cache))
    assert twin.get_seq_length() == 15
    assert twin.is_sliding == cache.is_sliding
    assert twin.layers[0].get_max_length() == cache.layers[0].get_max_length()
    for mine, other in zip(twin.layers, cache.layers):
        for kind in ("keys", "values"):
            exact = getattr(other, kind).clone()
            steps = exact.abs().amax(dim=-1, keepdim=True) / 127
            # Rotated by a matrix of +-1 / 4, a row's largest element is at most 4 times as large as before.
            assert ((getattr(mine, kind).clone() - exact).abs() <= 4 * steps).all()
    # Made of dense rows, the cache stores what it stores when a model hands it those rows.
    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :15], **{CACHE_ARGUMENT: dense})
    made, fed = type(cache)(map(tuple, dense)), filled(name, IDS[:, :15])[1]
    assert torch.equal(next_logits(model, made), next_logits(model, fed))


def test_a_cache_s_layers_make_a_dynamic_cache_and_layers_without_tokens_stay_so():
    _, cache = filled()
    dense = DynamicCache(tuple(cache))
    assert dense.get_seq_length() == 21
    assert torch.equal(dense.layers[1].keys, cache.layers[1].keys.clone())
    empty = PagedInt8Cache(tuple(PagedInt8Cache(tiny_model("mistral").config)))
    assert (len(empty), empty.get_seq_length(), empty.is_sliding) == (3, 0, [True] * 3)
    keys = torch.randn(1, 2, 4, 16)
    half = PagedInt8Cache([(keys, keys), (None, None), (keys, keys, None)])  # one layer shares another's keys
    assert [type(layer).__name__ for layer in half.layers] == ["PagedInt8Layer", "DynamicLayer", "PagedInt8Layer"]
    half.update(keys, keys, 0)
    half.update(keys, keys, 2)
    assert half.get_seq_length() == 8


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([1, 2], TypeError, r"or \(keys, values\) or \(keys, values, window\) of each layer, but among them is a int"),
        ([(torch.zeros(1, 2, 3, 16),)], TypeError, "among them is a tuple"),
        ([(torch.zeros(1, 2, 3, 16), None)], TypeError, "among them is a tuple"),
        ([(torch.zeros(1, 2, n, 16),) * 2 for n in (20, 11)], ValueError, "have 11 and 20 tokens: sliding windows"),
    ],
)
def test_layers_that_make_no_cache(data, error, message):
    with pytest.raises(error, match=message):
        PagedInt8Cache(data)


def test_layers_make_no_preallocated_cache():
    with pytest.raises(ValueError, match="made of keys and values grows"):
        PagedInt8Cache(tuple(filled()[1]), **PREALLOCATED)


# -- flattened ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exporters():
    """transformers' exporters register every subclass of ``Cache``; afterwards they are taken back."""
    dynamo = pytest.importorskip("transformers.exporters.exporter_dynamo")
    if not hasattr(dynamo, "register_cache_pytrees_for_model"):
        pytest.skip("this release's exporters register no caches")
    known = set(pytree.SUPPORTED_NODES)
    dynamo.register_cache_pytrees_for_model(tiny_model("llama"))
    yield
    for cls in set(pytree.SUPPORTED_NODES) - known:
        pytree._deregister_pytree_node(cls)


@pytest.mark.parametrize("options", [{}, PREALLOCATED], ids=["growing", "preallocated"])
def test_flattening_is_refused(exporters, options):
    for cache in (PagedInt8Cache(tiny_model("llama").config, **options), filled(**options)[1]):
        with pytest.raises(TypeError, match=r"cannot be flattened.*deepcopy"):
            pytree.tree_flatten(cache)


@pytest.mark.parametrize("options", [{}, PREALLOCATED], ids=["growing", "preallocated"])
def test_pickling_is_refused(options):
    for write in (pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())):
        with pytest.raises(TypeError, match=r"cannot be flattened, exported or pickled.*cache\.save\(path\)"):
            write(filled(**options)[1])


# -- under inference mode ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("tokens", [5, 21])  # 5 are too few to centre the keys on, so that happens outside
def test_a_growing_cache_filled_under_inference_mode_goes_on_outside(tokens, backend):
    model = tiny_model("llama")
    model.set_attn_implementation("int8_paged")
    results = []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = PagedInt8Cache(model.config, backend=backend)
        with mode():
            model(IDS[:, :tokens], **{CACHE_ARGUMENT: cache})
        with torch.no_grad():
            steps = [model(random_ids(2, n, seed=n), **{CACHE_ARGUMENT: cache}).logits for n in (1, 20, 1)]
            cache.reorder_cache(torch.tensor([1, 1]))
            cache.crop(-3)
            steps.append(model(random_ids(2, 1), **{CACHE_ARGUMENT: cache}).logits)
        results.append(torch.cat(steps, dim=1))
    assert torch.equal(*results)


def test_a_preallocated_cache_filled_under_inference_mode_goes_on_outside():
    results = []
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            model, cache = filled(**PREALLOCATED)
        results.append([next_logits(model, cache), next_logits(model, cache)])
    assert torch.equal(torch.stack(results[0]), torch.stack(results[1]))


# -- in an encoder-decoder model ---------------------------------------------------------------------------------------


def bart():
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=128, d_model=32, max_position_embeddings=64, **sizes, **heads)
    return BartForConditionalGeneration(config).eval()


def t5():
    config = T5Config(vocab_size=128, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("options", [{}, PREALLOCATED], ids=["growing", "preallocated"])
@pytest.mark.parametrize("make", [bart, t5])
@torch.no_grad()
def test_an_unwrapped_cache_of_an_encoder_decoder_model(make, options):
    model = make()
    cache = PagedInt8Cache(model.config, **options)
    for call in (
        lambda: model(IDS, decoder_input_ids=IDS[:, :3], **{CACHE_ARGUMENT: cache}),
        lambda: model.generate(IDS, **{CACHE_ARGUMENT: cache}, max_new_tokens=3, do_sample=False),
    ):
        with pytest.raises(ValueError, match=r"wrap it: EncoderDecoderCache\(PagedInt8Cache\(model.config\), "):
            call()
        assert int(cache.get_seq_length()) == 0
    wrapped = EncoderDecoderCache(cache, PagedInt8Cache(model.config))
    tokens = model.generate(IDS, **{CACHE_ARGUMENT: wrapped}, max_new_tokens=6, do_sample=False)
    again = EncoderDecoderCache(PagedInt8Cache(model.config), PagedInt8Cache(model.config))
    assert torch.equal(model.generate(IDS, **{CACHE_ARGUMENT: again}, max_new_tokens=6, do_sample=False), tokens)
    wrapped.reset()
    assert torch.equal(model.generate(IDS, **{CACHE_ARGUMENT: wrapped}, max_new_tokens=6, do_sample=False), tokens)


@pytest.mark.parametrize("name", ["self_attention_cache", "cross_attention_cache", "is_updated", "check_dynamic_cache"])
def test_names_of_an_encoder_decoder_cache_say_that_one_is_needed(name):
    cache = cache_api.growing()
    assert not hasattr(cache, name)
    with pytest.raises(AttributeError, match=rf"no '{name}': .*wrap it"):
        getattr(cache, name)


@pytest.mark.parametrize("name", ["to_legacy_cache", "key_cache", "prefetch_stream"])
def test_names_of_older_caches_say_what_there_is_instead(name):
    cache = cache_api.growing()
    assert not hasattr(cache, name)
    with pytest.raises(AttributeError, match=rf"PagedInt8Cache has no '{name}': \w"):
        getattr(cache, name)
    with pytest.raises(AttributeError, match=r"has no 'no_such_name'$"):
        _ = cache.no_such_name


def test_a_preallocated_cache_has_no_pool_and_says_so():
    with pytest.raises(AttributeError, match="'pool': everything is preallocated"):
        _ = cache_api.preallocated().pool


# -- as its docstring says ---------------------------------------------------------------------------------------------


def test_the_example_of_the_docstring():
    """It shows the newest release's name of the argument, and says the older one."""
    text = PagedInt8Cache.__doc__ or ""
    code = text.split("```python")[1].split("```")[0]
    assert "cache=cache" in code
    assert "past_key_values=cache" in text.split("```python")[0]
    lines = [line.strip() for line in code.splitlines() if line.strip()]
    script = "\n".join(line[4:] for line in lines if line[:3] in (">>>", "..."))
    script = script.replace(" cache=cache", f" {CACHE_ARGUMENT}=cache")
    source, _, last = script.rpartition("\n")
    space: dict = {}
    exec(source, space)
    assert str(eval(last, space)) == lines[-1]
