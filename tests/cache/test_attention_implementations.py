"""Every attention implementation that transformers registers reads the cache rightly, or refuses it with a sentence.

One layer, so that all implementations see the same stored keys: what they compute differs by float32 rounding, and no
rounding to int8 can tip.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.integrations import flex_attention as flex_integration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.batching import attention as batching_attention
from hf_int8_paged.seam.views import PagedView
from tests.models import random_ids, tiny_model

#: Implementations that are compared with SDPA; those with a package that is not here get a stand-in for it.
COMPARED = {
    "eager",
    "sdpa",
    "int8_paged",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
}
#: Implementations of continuous batching, which has a cache of its own.
REFUSED = {
    "paged|eager",
    "paged|sdpa",  # until 5.22
    "paged|flash_attention_2",
    "paged|flash_attention_3",
    "paged|flash_attention_4",
    batching_attention.NAME,
}
REGISTERED = sorted({"eager", *ALL_ATTENTION_FUNCTIONS})
#: float32 sums of at most 128 terms one after the other (heads of 16, 64 hidden, 96 intermediate, 26 tokens), on the
#: scale of the largest logit.
ROUNDING = 128 * torch.finfo(torch.float32).eps


def flash_stand_in(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Flash attention's interface, ``[batch, tokens, heads, dim]``; like the real one it asks for addresses."""
    for x in (q, k, v):
        assert not isinstance(x, PagedView)
        assert x.data_ptr()
    assert causal
    k, v = (x.transpose(1, 2) for x in (k, v))
    mask = torch.ones(q.shape[1], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[1])
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, mask, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def without_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention as torch would trace it, without the compiler, which takes a minute for each shape."""
    make_block_mask = torch_flex.create_block_mask

    def block_mask(**options: Any) -> Any:
        return make_block_mask(**options | {"_compile": False})

    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr("transformers.masking_utils.create_block_mask", block_mask)
    monkeypatch.setattr(flex_integration.WrappedFlexAttention, "__init__", lambda self, training: None)
    monkeypatch.setattr(flex_integration.WrappedFlexAttention, "__call__", lambda self: torch_flex.flex_attention)


def prompt_and_steps(name: str, model_name: str = "llama", **options: Any) -> torch.Tensor:
    model = tiny_model(model_name, num_hidden_layers=1)
    model.config._attn_implementation = name
    cache = PagedInt8Cache(model.config, backend="reference", **options)
    turns = random_ids(2, 27).split([20, 1, 5, 1], dim=1)
    with torch.no_grad():
        return torch.cat([model(ids, past_key_values=cache).logits for ids in turns], dim=1)


@pytest.mark.parametrize("name", REGISTERED)
def test_each_reads_the_cache_or_refuses_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in COMPARED or name in REFUSED, f"transformers registers {name}: decide what it does with the cache"
    without_compilation(monkeypatch)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    functions = (flash_stand_in,) * 3 + (flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: functions)
    if name in REFUSED:
        with pytest.raises((ValueError, RuntimeError), match=f"'{re.escape(name)}' serves continuous batching"):
            prompt_and_steps(name)
        return
    expected, got = prompt_and_steps("sdpa"), prompt_and_steps(name)
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["eager", "int8_paged", "flex_attention"])
@pytest.mark.parametrize("model_name", ["llama", "mistral"])
@pytest.mark.parametrize("options", [{}, {"max_batch_size": 2, "max_cache_len": 64}], ids=["growing", "preallocated"])
def test_masks_are_those_of_both_kinds_of_cache_and_of_windows(
    name: str, model_name: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flex attention's masks are functions, which are evaluated when the layer has stored the step's tokens."""
    without_compilation(monkeypatch)
    expected, got = (prompt_and_steps(x, model_name, **options) for x in ("sdpa", name))
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


@pytest.mark.parametrize("access", ["data_ptr", "const_data_ptr", "untyped_storage", "storage", "__dlpack__"])
def test_a_view_has_no_address_for_native_code(access: str) -> None:
    """Triton's launchers and ctypes ask for ``data_ptr``; torch would answer 0."""
    cache = PagedInt8Cache(tiny_model("llama").config)
    rows = torch.randn(2, 2, 9, 16)
    keys, _ = cache.update(rows, rows, 0)
    for view in (keys, cache.layers[0].keys):
        with pytest.raises(RuntimeError, match=r"lazy views without storage.*clone\(\)"):
            getattr(view, access)()
    assert keys.clone().data_ptr()
