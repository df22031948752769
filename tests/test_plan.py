"""The planner: what it says of a config is what a cache really allocates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DynamicCache, LlamaConfig, PreTrainedModel

from eval._coverage_overrides import OVERRIDES
from eval._tiny_configs import tiny_model
from eval.coverage import architectures
from hf_int8_paged import CacheFullError, PagedInt8Cache, plan
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
    ],
)
def test_what_the_command_refuses(arguments, message, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small("llama").config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "nothing"), "--memory", "1GiB"]) == 1
    assert "nothing" in capsys.readouterr().err
