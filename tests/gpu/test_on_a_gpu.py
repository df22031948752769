"""On a GPU: races, CUDA graphs and a whole model. The kernels' numerics are tested by tests/kernels, on the GPU too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.kernels import Scoring, Tokens, int8_kv_append_paged, int8_paged_decode_attention
from hf_int8_paged.kernels.triton import backend as triton_backend
from tests.kernels.helpers import Case, device_of, make_case, poisoned_layer, snapshot
from tests.models import random_ids, tiny_model

pytestmark = pytest.mark.gpu
DEVICE = device_of("triton")
#: Runs that must agree in every bit.
REPEATS = 50 if DEVICE.type == "cuda" else 2
SIZES: dict[str, dict[str, Any]] = {
    "one_long_sequence": {"lens": (1999,), "kv_heads": 2, "group": 4},
    "ragged": {"lens": (1, 17, 640, 300), "kv_heads": 3, "group": 3},
    "narrow": {"lens": (70, 500), "kv_heads": 1, "group": 8, "head_dim": 64, "q_len": 2},
}


@pytest.fixture(params=SIZES)
def case(request: pytest.FixtureRequest) -> Case:
    conditioned = {"dtype": torch.float16, "rotation": "hadamard", "center": True}
    return make_case("triton", **{"head_dim": 128, **conditioned, **SIZES[request.param]})


def test_decode_gives_the_same_bits_every_time(case: Case) -> None:
    outputs = [
        int8_paged_decode_attention(*case.arguments, out=torch.full_like(case.q, torch.nan)) for _ in range(REPEATS)
    ]
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert not outputs[0].isnan().any()


def test_extend_gives_the_same_bits_every_time(case: Case) -> None:
    storage, batch = case.storage, case.q.shape[0]
    q = torch.randn(batch, case.q.shape[1], 75, storage.head_dim, device=DEVICE).half()
    new = torch.randn(2, batch, storage.num_kv_heads, 75, storage.head_dim, device=DEVICE).half()
    outputs = [torch.full_like(q, torch.nan) for _ in range(REPEATS)]
    tokens = Tokens.at(case.block_table, case.context_lens)
    for out in outputs:
        triton_backend.attend(out, q, storage, tokens, Scoring(case.scale), (new[0], new[1]))
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    assert not outputs[0].isnan().any()


def test_append_gives_the_same_bits_every_time() -> None:
    new = torch.randn(2, 3, 2, 77, 128, device=DEVICE).bfloat16()
    table = torch.randperm(18, device=DEVICE).to(torch.int32).view(3, 6)
    before = torch.tensor([0, 5, 16], dtype=torch.int32, device=DEVICE)
    bits = []
    for _ in range(REPEATS):
        storage = poisoned_layer("triton", 18, 16, 2, 128, rotation="hadamard")
        int8_kv_append_paged(*new, storage, table, before)
        bits.append(snapshot(storage))
    assert all((bits[0][name] == other[name]).all() for other in bits for name in bits[0])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_model_generates_what_it_generates_with_the_reference(name: str) -> None:
    model: Any = tiny_model(name)
    model.to(DEVICE)
    model.set_attn_implementation("int8_paged")
    ids = random_ids(2, 45, seed=1).to(DEVICE)
    greedy = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    outputs = [
        model.generate(ids, past_key_values=PagedInt8Cache(model.config, backend=backend), **greedy)
        for backend in ("reference", "triton")
    ]
    assert torch.equal(*outputs)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter has no CUDA graphs")
def test_a_captured_step_follows_the_lengths_on_the_device(case: Case) -> None:
    out = torch.full_like(case.q, torch.nan)
    int8_paged_decode_attention(*case.arguments, out=out)  # compiles
    graph = torch.cuda.CUDAGraph()
    tokens = Tokens.at(case.block_table, case.context_lens)
    with torch.cuda.graph(graph):
        triton_backend.attend(out, case.q, case.storage, tokens, Scoring(case.scale))
    for shorter in (0, 3):
        case.context_lens.sub_(shorter).clamp_(min=case.q.shape[2])
        want = int8_paged_decode_attention(*case.arguments)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want)


@pytest.mark.skipif(DEVICE.type != "cuda" or torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_a_second_device_gives_the_bits_of_the_first_while_the_first_is_current(case: Case) -> None:
    second = torch.device("cuda", 1)
    want = int8_paged_decode_attention(*case.arguments)
    q, storage, *others = case.arguments
    moved = {name: getattr(storage, name) for name in ("k", "v", "k_scales", "v_scales", "key_center")}
    moved = {name: tensor if tensor is None else tensor.to(second) for name, tensor in moved.items()}
    others = [each.to(second) if isinstance(each, torch.Tensor) else each for each in others]
    with torch.cuda.device(0):
        out = int8_paged_decode_attention(q.to(second), replace(storage, **moved), *others)
    assert out.device == second
    assert torch.equal(out.to(want.device), want)
