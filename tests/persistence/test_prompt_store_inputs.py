"""A prompt store answers for what it was asked, or says why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_int8_paged import PagedInt8Cache, PagedInt8Pool, PromptStore
from hf_int8_paged.persistence.fingerprint import difference, fingerprint
from hf_int8_paged.persistence.prompt_inputs import picture_ids, unsaid
from hf_int8_paged.persistence.prompt_keys import model_key
from tests.models import random_ids, tiny_model

from .histories import model_called
from .prompts import feed, stored

IDS = random_ids(1, 60)
SIZES: dict[str, Any] = {
    "vocab_size": 130, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def test_an_encoder_needs_a_name_for_its_input(tmp_path: Path) -> None:
    """Keys of its decoder depend on what the encoder read, which the decoder's ids do not say."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    model: Any = T5ForConditionalGeneration(config).eval()
    store, cache, texts = PromptStore(tmp_path), PagedInt8Cache(config), [random_ids(1, 20, seed=s) for s in (1, 2)]
    both = EncoderDecoderCache(cache, PagedInt8Cache(config))
    with torch.no_grad():
        model(texts[0], decoder_input_ids=IDS, past_key_values=both)
    with pytest.raises(ValueError, match=r"encoder's input.*extra_key="):
        store.get(model, IDS)
    with pytest.raises(ValueError, match=r"encoder's input.*extra_key="):
        store.put(cache, IDS, model)
    with pytest.raises(TypeError, match="self_attention_cache"):
        store.put(both, IDS, model, extra_key="first text")  # type: ignore[arg-type]
    store.put(cache, IDS, model, extra_key="first text")
    assert store.get(model, IDS, extra_key="second text")[1] == 0
    found, known = store.get(model, IDS, extra_key="first text")
    assert known == 59
    with torch.no_grad():
        wrapped = EncoderDecoderCache(found, PagedInt8Cache(config))
        ours = model(texts[0], decoder_input_ids=IDS[:, 59:], past_key_values=wrapped).logits
        cache.crop(-1)
        both = EncoderDecoderCache(cache, PagedInt8Cache(config))
        theirs = model(texts[0], decoder_input_ids=IDS[:, 59:], past_key_values=both).logits
    assert torch.equal(ours, theirs)


def a_model_that_sees(**changes: Any) -> Any:
    sizes = {**SIZES, "image_size": 28, "patch_size": 14}
    sizes.pop("vocab_size")
    text = LlamaConfig(**SIZES, bos_token_id=None, eos_token_id=None)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**sizes), text_config=text, image_token_index=129, **changes)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation("int8_paged")
    return model


def test_pictures_need_a_name(tmp_path: Path) -> None:
    """Two pictures have the same ids."""
    model, store = a_model_that_sees(), PromptStore(tmp_path)
    ids = torch.cat([random_ids(1, 20), torch.full((1, 30), 129), random_ids(1, 30, seed=1)], dim=1)
    cache = PagedInt8Cache(model.config)
    model.model.language_model(ids.clamp(max=128), past_key_values=cache)
    with pytest.raises(ValueError, match=r"id 129 stands for a picture.*extra_key="):
        store.get(model, ids)
    with pytest.raises(ValueError, match=r"id 129 stands for a picture.*extra_key="):
        store.put(cache, ids, model)
    store.put(cache, ids, model, extra_key="picture 1")
    assert store.get(model, ids, extra_key="picture 1")[1] == 79
    assert store.get(model, ids, extra_key="picture 2")[1] == 0
    # A text without pictures needs none. No prefix ends within a picture: there is no half of it to go on from.
    assert store.get(model, ids[:, :20])[1] == 0
    other = torch.cat([ids[:, :49], ids[:, 49:50], random_ids(1, 9, seed=7)], dim=1)
    assert store.get(model, other, extra_key="picture 1")[1] == 16


def test_what_configs_say_of_pictures_and_sounds() -> None:
    """Of text alone nothing; ids that stand for them, wherever the config has them; or that no id does."""
    for text in ("llama", "gpt2", "dbrx"):
        config = CONFIG_MAPPING[text]()
        assert (picture_ids(config), unsaid(config)) == (frozenset(), None)
    films = CONFIG_MAPPING["qwen2_vl"]()
    assert picture_ids(films) == {films.image_token_id, films.video_token_id}
    assert unsaid(films) is None
    nested = CONFIG_MAPPING["phi4_multimodal"]()
    assert picture_ids(nested) == {nested.vision_config.image_token_id, nested.audio_config.audio_token_id}
    for name in ("git", "moshi", "chameleon"):
        assert "for which no id stands" in str(unsaid(CONFIG_MAPPING[name]()))
    decoder: Any = CONFIG_MAPPING["gpt2"]()
    decoder.add_cross_attention = True
    assert "encoder's input" in str(unsaid(decoder))


def test_a_name_that_get_was_given_holds_for_put(tmp_path: Path) -> None:
    model, store = model_called("llama"), PromptStore(tmp_path)
    for given in (None, model):
        cache, known = store.get(model, IDS, extra_key="adapter a")
        feed(model, cache, IDS, known)
        store.put(cache, IDS, given)
        assert (store.get(model, IDS, extra_key="adapter a")[1], store.get(model, IDS)[1]) == (59, 0)
    store.put(cache, IDS, extra_key="adapter b")
    assert store.get(model, IDS, extra_key="adapter b")[1] == 59
    with pytest.raises(TypeError, match="extra_key must be a text"):
        store.get(model, IDS, extra_key=5)  # type: ignore[arg-type]


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "factor": 64.0,
            "long_factor": [1.5, 2, 3, 4, 6, 8, 10, 12], "original_max_position_embeddings": 64,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_a_prefix_does_not_cross_the_length_where_positions_turn_otherwise(tmp_path: Path, rope: str) -> None:
    """Beyond 64 tokens all positions are turned by other angles, so a longer prompt's beginning is another one."""
    name, parameters = ROPES[rope]
    limits = {"max_position_embeddings": 64 if rope == "dynamic" else 4096, "rope_parameters": dict(parameters)}
    if rope == "longrope":
        limits["original_max_position_embeddings"] = 64
    model, store, ids = tiny_model(name, **limits), PromptStore(tmp_path), random_ids(1, 120)
    model.set_attn_implementation("int8_paged")
    stored(store, model, ids)
    assert store.get(model, ids[:, :60])[1] == 0
    assert store.get(model, ids[:, :100])[1] == 0
    assert store.get(model, ids)[1] == 119  # whole
    assert store.get(model, torch.cat([ids, ids], dim=1))[1] == 120
    stored(store, model, ids[:, :64])
    assert store.get(model, ids[:, :60])[1] == 48
    assert store.get(model, ids[:, :64])[1] == 63
    assert store.get(model, ids[:, :65])[1] == 0


def test_lengths_that_ropes_depend_on_are_compared() -> None:
    def of(length: int, rope: dict[str, Any]) -> dict[str, Any]:
        return fingerprint(LlamaConfig(**SIZES, max_position_embeddings=length, rope_parameters=dict(rope)))

    dynamic, plain = ROPES["dynamic"][1], {"rope_type": "default", "rope_theta": 10000.0}
    assert difference(of(64, dynamic), of(128, dynamic)) is not None
    assert difference(of(64, plain), of(128, plain)) is None
    phi = Phi3Config(**SIZES, original_max_position_embeddings=64, rope_parameters=dict(ROPES["longrope"][1]))
    assert fingerprint(phi)["max_position_embeddings"] == phi.max_position_embeddings
    older = {name: value for name, value in of(64, dynamic).items() if name != "max_position_embeddings"}
    assert "max_position_embeddings is null in the file" in str(difference(older, of(64, dynamic)))


class Adapted(torch.nn.Module):
    """A layer as `peft` makes them."""

    def __init__(self, base: torch.nn.Module):
        super().__init__()
        self.base, self.active_adapter, self.disable_adapters, self.scaling = base, ["x"], False, {"x": 1.0, "y": 1.0}


def test_adapters_and_buffers_tell_models_apart() -> None:
    model: Any = model_called("llama")
    keys = {model_key(model)}
    layer = model.model.layers[0].self_attn
    layer.v_proj = adapted = Adapted(layer.v_proj)
    keys.add(model_key(model))
    for name, value in (("active_adapter", ["y"]), ("disable_adapters", True), ("scaling", {"x": 2.0, "y": 1.0})):
        setattr(adapted, name, value)
        keys.add(model_key(model))
    model.register_buffer("qweight", torch.ones(3, 5, dtype=torch.int32))
    keys.add(model_key(model))
    model.qweight[2, 4] = 7
    keys.add(model_key(model))
    assert len(keys) == 7
    before = model_key(model)
    model.register_buffer("inv_freq", torch.ones(3), persistent=False)  # made of the config, and changed by steps
    assert model_key(model) == before
    compiled: Any = torch.compile(model)
    assert model_key(compiled) == before


def test_weights_that_are_elsewhere_need_a_name(tmp_path: Path) -> None:
    """accelerate keeps them away from the model until they are needed."""
    model, store = model_called("llama"), PromptStore(tmp_path)
    layer: Any = model.model.layers[0].mlp
    layer.up_proj.weight = torch.nn.Parameter(torch.empty(96, 64, device="meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight.*elsewhere.*extra_key="):
        store.get(model, IDS)
    cache, known = store.get(model, IDS, extra_key="tiny llama, revision 1")
    assert known == 0
    feed(model_called("llama"), cache, IDS)
    store.put(cache, IDS)
    cache, known = store.get(model, IDS, extra_key="tiny llama, revision 1")
    assert known == 59
    assert {layer.room.shape.device.type for layer in cache.layers} == {"cpu"}


def test_the_default_device_plays_no_part(tmp_path: Path) -> None:
    model, store = model_called("llama"), PromptStore(tmp_path)
    cache = PagedInt8Cache(model.config)
    feed(model, cache, IDS)
    with torch.device("meta"):
        store.put(cache, IDS[0].tolist(), model)
        cache, known = store.get(model, IDS[0].tolist())
    assert known == 59
    assert torch.isfinite(feed(model, cache, IDS, known)).all()


def test_padding_is_refused(tmp_path: Path) -> None:
    """Its ids are the same as those of a prompt that really begins so."""
    model, store = model_called("llama"), PromptStore(tmp_path)
    for padding, sink_tokens in ((3, 1), (40, 1), (40, 0)):
        mask = torch.ones_like(IDS)
        mask[:, :padding] = 0
        cache = PagedInt8Cache(model.config, sink_tokens=sink_tokens)
        feed(model, cache, IDS, attention_mask=mask)
        with pytest.raises(ValueError, match=r"holds padding.*without"):
            store.put(cache, IDS, model)
    assert len(store) == 0


def test_what_is_no_cache_and_no_model_is_named(tmp_path: Path) -> None:
    model, store = model_called("llama"), PromptStore(tmp_path)
    with pytest.raises(TypeError, match=r"takes a PagedInt8Cache.*got a DynamicCache"):
        store.put(DynamicCache(), IDS, model)  # type: ignore[arg-type]
    cache = PagedInt8Cache(model.config)
    feed(model, cache, IDS)
    for use in (lambda x: store.get(x, IDS), lambda x: store.put(cache, IDS, x)):
        with pytest.raises(TypeError, match=r"needs the model, whose weights tell it from others.*LlamaConfig"):
            use(model.config)
    for ids in ("hello", {"input_ids": IDS}, [[1, 2], [3]], 5):
        with pytest.raises(TypeError, match="token ids must be integers"):
            store.get(model, ids)  # type: ignore[arg-type]


def test_a_cache_that_was_emptied_is_no_longer_the_models(tmp_path: Path) -> None:
    model, other, store = model_called("llama"), tiny_model("llama", initializer_range=0.21), PromptStore(tmp_path)
    stored(store, model, IDS[:, :40])
    emptied = (PagedInt8Cache.reset, lambda cache: cache.crop(-40), lambda cache: cache.batch_select_indices([]))
    for empty in emptied:
        cache, _ = store.get(model, IDS)
        assert cache.fork()._prompt_key is not None
        empty(cache)
        feed(other, cache, IDS)
        with pytest.raises(ValueError, match="which model computed the cache is not known"):
            store.put(cache, IDS)


def test_options_are_checked_where_they_are_given(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'blocksize'.*block_size"):
        PromptStore(tmp_path, blocksize=32)
    with pytest.raises(TypeError, match=r"pool.*get\(model, ids, pool=\.\.\.\)"):
        PromptStore(tmp_path, pool=PagedInt8Pool())
    with pytest.raises(ValueError, match="block_size must be a positive multiple of 16, got 24"):
        PromptStore(tmp_path, block_size=24)
    with pytest.raises(ValueError, match="cache_max_bytes must be at least 1, got 0"):
        PromptStore(tmp_path, cache_max_bytes=0)
    with pytest.raises(ValueError, match=r"made with offloading=True.*pool"):
        PromptStore(tmp_path, offloading=True).get(model_called("llama"), IDS, pool=PagedInt8Pool())


def test_caches_have_a_limit_of_their_own(tmp_path: Path) -> None:
    model, store = model_called("llama"), PromptStore(tmp_path, max_bytes="1GiB", cache_max_bytes="1MiB")
    for expected in (0, 59):
        cache, known = store.get(model, IDS)
        assert (known, cache.pool.max_bytes) == (expected, 1 << 20)
        feed(model, cache, IDS, known)
        store.put(cache, IDS)
