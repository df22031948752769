"""`eval/fidelity.py`: fake quantization is what the pool does, and the figures are what they are called."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import _variants
import fidelity
import numpy as np
import pytest
import torch
from _divergence import divergence
from _variants import EXCEPTIONS, VARIANTS, Variant, VariantCache
from transformers import PreTrainedModel

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.tools.demo_model import DemoModelError, load_demo_model

from ..models import TIPPED, random_ids, tiny_model

#: How to make a cache of each variant.
CONDITIONING: dict[str, dict[str, Any]] = {
    "int8": {"rotation": None, "center_keys": False, "sink_tokens": 0},
    "int8-rotated": {"center_keys": False, "sink_tokens": 0},
    "int8-both": {"sink_tokens": 0},
    "sinks-1": {},
    "sinks-4": {"sink_tokens": 4},
}


class DoublePrecisionCache(PagedInt8Cache):
    """Stores the rows of a float64 model. The reference backend then attends in float64."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        prompt = self.layers[layer_idx].get_seq_length() == 0
        views = super().update(key_states.float(), value_states.float(), layer_idx, *args, **kwargs)
        return (key_states, value_states) if prompt else views


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, its norms too, which transformers computes in float32."""
    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, module)
    return model


def rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight


@torch.inference_mode()
def decode(model: PreTrainedModel, ids: torch.Tensor, prompt: int, variant: str, rows: int = 1) -> torch.Tensor:
    """Logits after the prompt, through the pool, a few rows at a time."""
    cache = DoublePrecisionCache(model.config, backend="reference", **CONDITIONING[variant])
    model.set_attn_implementation("int8_paged")
    model(ids[:, :prompt], past_key_values=cache)
    return torch.cat([model(chunk, past_key_values=cache).logits[0] for chunk in ids[:, prompt:].split(rows, dim=1)])


# In float64: a rounding error of float32 can give a key close to a tie another int8 value, and every layer after it
# other keys. Two ways to compute the same logits in float32 differ by up to half of what quantization changes.
@pytest.mark.parametrize("variant", CONDITIONING)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_one_pass_over_fake_quantized_rows_equals_decoding_token_by_token(name: str, variant: str) -> None:
    model, ids = in_float64(tiny_model(name)), random_ids(1, 75)
    one_pass = fidelity.logits_after_prompt(
        model, VariantCache(model.config, (VARIANTS | EXCEPTIONS)[variant]), ids, 17
    )
    dense = model(ids, use_cache=False).logits[0, 17:]
    torch.testing.assert_close(decode(model, ids, 17, variant), one_pass, rtol=0, atol=1e-5)
    assert (one_pass - dense).abs().mean() > 1e-3


@pytest.mark.slow
def test_the_same_for_300_tokens_of_a_real_model() -> None:
    try:
        model, tokenizer = load_demo_model()
    except DemoModelError as error:
        pytest.fail(f"the demo model is needed: {error}")
    text = "The history of the paged cache is a history of small blocks. " * 40
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :316]
    in_float64(model)
    one_pass = fidelity.logits_after_prompt(model, VariantCache(model.config, VARIANTS["sinks-1"]), ids, 16)
    torch.testing.assert_close(decode(model, ids, 16, "sinks-1", rows=15), one_pass, rtol=0, atol=1e-4)


def test_the_package_is_fed_in_chunks_that_decode_attention_serves() -> None:
    model, ids = tiny_model("llama"), random_ids(1, 60)
    model.set_attn_implementation("int8_paged")
    widths: list[int] = []
    cache = PagedInt8Cache(model.config)
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert fidelity.logits_after_prompt(model, cache, ids, 20).shape[0] == 40
    assert widths == [20, 16, 16, 8]


@pytest.mark.parametrize("dim", [64, 96, 256])
def test_conditioning_alone_changes_nothing(dim: int) -> None:
    exact = Variant("exact", lambda x: x, lambda d: 4 * d, rotate=True, center=True)
    k = torch.randn(2, 3, 20, dim, generator=torch.Generator().manual_seed(0)) + 5
    center = k.mean((0, 2))[:, None]
    # Two transforms of log2(dim) butterflies each and two sums, of numbers as large as a row.
    bound = 20 * 2.0**-24 * float(k.norm(dim=-1).max())
    torch.testing.assert_close(exact.keys(k, center), k, rtol=0, atol=bound)
    torch.testing.assert_close(exact.values(k), k, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("quantize", "group", "steps"),
    [
        (_variants.int8_per_row, 64, 127),
        (_variants.q8_0, 32, 127),
        (_variants.int4_in_groups_of_32, 32, 7),
    ],
    ids=["int8", "q8_0", "int4"],
)
def test_integer_formats_are_off_by_at_most_half_a_step(quantize, group: int, steps: int) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 5)[:, None]
    x[0] = 0
    step = x.unflatten(-1, (-1, group)).abs().amax(-1).repeat_interleave(group, -1) / steps
    # Half a step, and the float16 rounding of the scale on the largest element.
    assert ((quantize(x) - x).abs() <= step * (0.5 + steps * 2.0**-11) + 1e-12).all()
    assert (quantize(x) != x)[1:].any(-1).all()


def test_fp8_keeps_three_bits_of_mantissa() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 5)[:, None]
    x[0] = 0
    largest = x.abs().amax(-1, keepdim=True)
    # Half an ulp of 4 significant bits, or of the subnormals, which end at 2^-9 of a row that is scaled to 448.
    bound = torch.maximum(x.abs() * 2.0**-4, largest / 448 * 2.0**-10) + largest * 2.0**-11
    assert ((_variants.fp8_per_row(x) - x).abs() <= bound).all()


def test_divergence_is_what_its_definition_says() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(130, 50, generator=generator) * 4
    logits = dense + torch.randn(130, 50, generator=generator) * 0.5
    targets = torch.randint(0, 50, (130,), generator=generator)
    p, q = (np.exp(x.double().numpy()) for x in (dense, logits))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    found = divergence(logits, dense, targets)
    # In float32: two logarithms of sums of 50 terms, of logits of at most 20.
    atol = 2 * 50 * 2.0**-24 * 20
    np.testing.assert_allclose(found.kld, (p * np.log(p / q)).sum(-1), atol=atol)
    np.testing.assert_array_equal(found.same_top, p.argmax(-1) == q.argmax(-1))
    rows = np.arange(130)
    np.testing.assert_allclose(found.nll, -np.log(q[rows, targets]), atol=atol)
    np.testing.assert_allclose(found.nll_dense, -np.log(p[rows, targets]), atol=atol)
    assert divergence(dense, dense, targets).kld.max() == 0


def test_writes_table_json_and_picture_and_resumes(model_folder, text_file, tmp_path, run_script, capsys) -> None:
    def arguments(*variants: str) -> list:
        options = {"window": 60, "windows": 3, "prompt": 16, "device": "cpu", "greedy-prompts": 3, "greedy-tokens": 20}
        files = {"journal": "run.jsonl", "json": "out.json", "markdown": "out.md", "picture": "out.png"}
        pairs = [(f"--{k}", v) for k, v in options.items()] + [(f"--{k}", tmp_path / v) for k, v in files.items()]
        return ["--model", model_folder, "--text-file", text_file, *sum(pairs, ()), "--variants", *variants]

    run_script(fidelity, *arguments("int8", "package"))
    first = json.loads((tmp_path / "out.json").read_text())
    records = (tmp_path / "run.jsonl").read_text().splitlines()
    assert len(records) == 1 + 2 * (3 + 3)
    run_script(fidelity, *arguments("int8", "package", "int8-both"))
    result = json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / "run.jsonl").read_text().splitlines()[: len(records)] == records
    for name in ("int8", "package"):
        assert result["results"][name] == first["results"][name]
    figures = result["results"]["int8"]
    assert figures["positions"] == 3 * (60 - 16 - 1)
    assert figures["bytes_of_16_bit_percent"] == 100 * (16 + 2) / 32
    assert 0 < figures["kld_mean"] < figures["kld_p99"] <= figures["kld_max"]
    assert 0 <= figures["greedy_agreement_median"] <= 20
    # The same quantization of the same rows, but for tipped roundings. Divergence goes with the square of the change.
    ratio = result["results"]["package"]["kld_mean"] / figures["kld_mean"]
    assert (1 - TIPPED) ** 2 <= ratio <= (1 + TIPPED) ** 2
    table = (tmp_path / "out.md").read_text()
    assert table.count("\n") == 2 + 3
    assert table in capsys.readouterr().out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
