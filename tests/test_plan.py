"""The planner: what it says of a config is what a cache really allocates."""

from __future__ import annotations

import ast
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    DynamicCache,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MllamaConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    T5Config,
    VisionEncoderDecoderConfig,
    ViTConfig,
    WhisperConfig,
)

from eval._coverage_overrides import OVERRIDES
from eval._tiny_configs import tiny_model
from eval.coverage import architectures
from hf_int8_paged import CacheFullError, PagedInt8Cache, PagedInt8Pool, plan
from hf_int8_paged.byte_sizes import bytes_as_text, parse_bytes
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.layer import PagedInt8Layer
from hf_int8_paged.tools.cli import main

#: Of the coverage table: heads shared and not, windows of one and of several kinds, latents, keys and values of
#: different widths, and states beside keys or in their place.
ARCHITECTURES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "gptj", "bloom",
    "falcon", "gpt_bigcode", "cohere2", "olmo2", "smollm3", "gpt_oss", "starcoder2", "deepseek_v3", "glm4",
    "lfm2_moe", "falcon_h1", "qwen3_next", "jamba",
)  # fmt: skip
CLASSES = {name: class_name for mapping, name, class_name in architectures() if mapping == "causal"}


def small(name: str) -> PreTrainedModel:
    return tiny_model(name, CLASSES[name], "causal", OVERRIDES.get(name, {}), 0.1)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_plan_is_within_one_percent_of_what_is_allocated(name: str) -> None:
    model = small(name)
    said = plan(model.config, "1GiB", batch=2, dtype=torch.float32)
    for tokens in (37, 90):
        ids = torch.randint(3, 60, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        model.set_attn_implementation("eager")
        caches: tuple[Any, Any] = PagedInt8Cache(model.config), DynamicCache(config=model.config)
        for cache in caches:
            model(ids, **{CACHE_ARGUMENT: cache})
        assert said.int8_bytes(tokens) == pytest.approx(caches[0].nbytes_allocated, rel=0.01)
        paged = [i for i, layer in enumerate(caches[0].layers) if isinstance(layer, PagedInt8Layer)]
        dense = sum(x.nbytes for i in paged for x in (caches[1].layers[i].keys, caches[1].layers[i].values))
        assert said.dense_bytes(tokens) == pytest.approx(dense, rel=0.01)
    assert sum(kind.layers for kind in said.kinds) == len(paged)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_context_that_a_plan_promises_fits_and_a_longer_one_does_not(name: str) -> None:
    """Given as ``max_bytes``; token by token, and at once."""
    model = small(name)
    model.set_attn_implementation("int8_paged")
    said = plan(model.config, "200KB", dtype=torch.float32)
    assert said.dense_tokens is not None
    assert said.int8_tokens is not None
    assert said.dense_tokens < 0.4 * said.int8_tokens  # float32, heads of 16
    for steps in ([said.int8_tokens], [said.int8_tokens - 20] + [1] * 20):
        cache = PagedInt8Cache(model.config, max_bytes="200KB")
        for tokens in steps:
            with torch.no_grad():
                model(torch.ones(1, tokens, dtype=torch.long), **{CACHE_ARGUMENT: cache})
        assert cache.nbytes_allocated <= 200_000
        with pytest.raises(CacheFullError), torch.no_grad():
            model(torch.ones(1, 16, dtype=torch.long), **{CACHE_ARGUMENT: cache})


def test_the_figures_of_the_readme() -> None:
    """Llama-3.1-8B at its full context."""
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8)
    said = plan(config, "24GiB", weights="16GiB")
    assert said.dense_bytes(131072) == 16 << 30
    assert said.int8_bytes(131072) == pytest.approx(8.1 * 2**30, rel=0.01)
    assert said.dense_tokens == 65536
    # 66,560 bytes a token, and one token in 16 bit, 131,072 bytes; whole blocks.
    assert said.int8_tokens == ((8 << 30) - 131072) // 66560 // 16 * 16


def test_windows_alone_take_any_number_of_tokens() -> None:
    said = plan(small("mistral").config, "1MiB")
    assert (said.dense_tokens, said.int8_tokens) == (None, None)
    assert plan(small("mistral").config, 100).int8_tokens == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small("gemma2").config.save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--memory", "2MiB", "--weights", "1 MiB", "--batch", "3"]
    assert main([*arguments, "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    expected = plan(AutoConfig.from_pretrained(tmp_path), "2MiB", weights="1MiB", batch=3)
    assert said["int8_tokens"] == expected.int8_tokens
    assert [kind["kind"] for kind in said["kinds"]] == ["sliding_attention", "full_attention"]
    assert main([*arguments, "--picture", str(tmp_path / "plan.png")]) == 0
    printed = capsys.readouterr().out
    assert f"{expected.int8_tokens:,}" in printed
    assert f"{expected.dense_tokens:,}" in printed
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "24 gigs"], "memory: '24 gigs' is no number of bytes"),
        (["--memory", "24GiB", "--weights", "x"], "weights: 'x' is no number of bytes"),
        (["--memory", "0"], "memory must be at least 1, got 0\n"),
        (["--memory", "1GiB", "--weights", "3GiB"], "weights=3221225472 bytes (3 GiB) leave nothing of memory="),
        (["--memory", "1GiB", "--weights", "1GiB"], "(1 GiB) leave nothing of memory=1073741824 (1 GiB)"),
    ],
)
def test_what_the_command_refuses(arguments, message, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small("llama").config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "nothing"), "--memory", "1GiB"]) == 1
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("memory", "limit"), [("100", '"100 bytes"'), ("999999", "999999"), ("8GiB", '"8 GiB"')])
def test_the_limit_that_is_printed_is_the_memory_that_there_is(memory, limit, tmp_path: Path, capsys) -> None:
    """A rounded number would be more; and caches take it."""
    small("llama").config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--memory", memory, "--weights", "0"]) == 0
    assert f"PagedInt8Cache(config, max_bytes={limit})" in capsys.readouterr().out
    assert PagedInt8Pool(max_bytes=ast.literal_eval(limit)).max_bytes == parse_bytes(memory)


@pytest.mark.parametrize("count", [0, 1, 999, 1023, 1024, 1023.6, 1024**2 - 1, 999999, 10**12, 10**20, 10**30])
def test_every_number_of_bytes_that_is_printed_can_be_read(count) -> None:
    assert parse_bytes(bytes_as_text(count)) == pytest.approx(count, rel=5e-4, abs=0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "num_attention_heads": 0}, "cannot be read: ZeroDivisionError"),
        ({"model_type": "llama", "num_hidden_layers": "x"}, "'num_hidden_layers'.*expected int, got str"),
        ({"model_type": "gpt2", "n_head": 0}, "gpt2.*ZeroDivisionError|ZeroDivisionError.*"),
        ({"model_type": "gpt2", "n_embd": 0}, "layers with no heads, or of no width"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "names no layer that holds keys"),
        ({"model_type": "resnet"}, "'resnet' generates no text and keeps no keys and values"),
        ({"model_type": "vit"}, "'vit' generates no text"),
        ({"model_type": "clip"}, "'clip' generates no text"),
        ({"model_type": "bert"}, "'bert' generates no text.*with is_decoder=True it would"),
    ],
)
def test_configs_that_no_plan_can_be_made_of(config, message, tmp_path: Path, capsys) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert main(["plan", str(path), "--memory", "1GiB"]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1


@pytest.mark.parametrize("model", ["/nonexistent", "./nothing", "", "a/b/c", "~/nothing here"])
def test_a_path_where_nothing_is_is_not_taken_for_a_name_on_the_hub(model, capsys) -> None:
    assert main(["plan", model, "--memory", "1GiB"]) == 1
    assert f"there is no file or folder {model!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size must be a positive multiple of 16"),
        ({"block_size": 17}, ValueError, "block_size must be a positive multiple of 16"),
        ({"sink_tokens": -1}, ValueError, "sink_tokens must be between 0 and"),
        ({"sink_tokens": 99}, ValueError, "sink_tokens must be between 0 and"),
        ({"batch": "2"}, TypeError, "batch must be an integer, got '2'"),
        ({"batch": 1.5}, TypeError, "batch must be an integer, got 1.5"),
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"dtype": None}, TypeError, "dtype must be a torch.dtype or its name"),
        ({"dtype": "zeros"}, ValueError, "dtype must be a torch.dtype or its name"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of floating point"),
        ({"format": "int4"}, ValueError, "int4"),
        ({"weights": -1}, ValueError, "weights must be at least 0, got -1"),
        ({"memory": None}, TypeError, "memory must be a number of bytes"),
    ],
)
def test_arguments_are_checked(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        plan(LlamaConfig(), **{"memory": "1MiB", **arguments})


def test_a_dtype_may_be_given_by_its_name_and_weights_may_be_nothing() -> None:
    config = LlamaConfig()
    for name in ("float32", "torch.float32"):
        assert plan(config, "1GiB", dtype=name, weights=0)[:7] == plan(config, "1GiB", dtype=torch.float32)[:7]


def test_a_plan_can_be_sent_to_another_process() -> None:
    said = plan(LlamaConfig(), "8GiB", batch=3)
    again = pickle.loads(pickle.dumps(said))
    assert again[:8] == said[:8]
    assert (again.int8_bytes(100), again.dense_bytes(100)) == (said.int8_bytes(100), said.dense_bytes(100))


def test_cross_attention_is_named_where_there_is_one(tmp_path: Path, capsys) -> None:
    """Keys and values of 4 layers, 384 wide, in 16 bit, for each of the 1,500 positions that the encoder always has."""
    config = WhisperConfig(d_model=384, decoder_layers=4)
    said = plan(config, "1GiB", batch=2)
    assert said.cross_attention == (2 * 4 * 384 * 2 * 2, 1500)
    assert said.max_positions == config.max_target_positions
    assert plan(LlamaConfig(), "1GiB").cross_attention is None
    assert plan(T5Config(), "1GiB").cross_attention == (6 * 512 * 2 * 2, None)
    pair = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), GPT2Config())
    assert plan(pair, "1GiB").cross_attention == (12 * 768 * 2 * 2, None)
    assert plan(MllamaConfig(), "1GiB").cross_attention == (8 * 8 * 128 * 2 * 2, None)
    config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--memory", "1GiB", "--batch", "2"]) == 0
    assert "cross-attention come on top and count as weights: 12 KiB for each token" in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--memory", "1GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cross_attention"] == {"bytes_per_token": 6144, "max_tokens": 1500}


def test_models_that_are_not_of_transformers_and_decoders_that_do_not_say_so_are_planned() -> None:
    class Own(LlamaConfig):
        model_type = "of-somebody"

    for config in (Own(), GPTNeoXConfig(), Qwen2_5_VLConfig().get_text_config(), BertConfig(is_decoder=True)):
        assert plan(config, "8GiB").int8_tokens
