"""Every way to generate, over a dozen architectures, with this cache and with transformers' own.

    make test-upstream

transformers' `GenerationTesterMixin` is in none of its distributions on the registry, so its ways to generate are
called here (modes.py). Each is run four times, the cache put where `generate` would make a `DynamicCache` by itself:

1. with `DynamicCache`: what fails here may fail with ours. The result of ours has the same names, lengths, shapes and
   dtypes as this one;
2. with the fake-quantized dense cache, whose numbers ours must have, within a tolerance that comparison.py derives;
3. with ours, under ``eager``, ``sdpa`` or ``int8_paged``;
4. where the way has a relation to another (from embeddings as from ids, continued as at once): that one, with ours.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import (
    Cache,
    DynamicCache,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    set_seed,
)
from transformers.utils import logging

from eval._coverage_overrides import OVERRIDES, inputs_for
from eval._coverage_run import BOUND, EXACT, _Force, _has_experts, _padding
from eval._fake_quantized import FakeQuantizedCache
from eval._tiny_configs import tiny_model
from eval.coverage import architectures
from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT

from .comparison import Result, largest_difference, mean_log_probabilities, structure
from .injection import generating_with
from .modes import MODES, PADDING, Mode, attentions, generate

#: One of each kind of attention and of position, of each kind of layer beside it, and both kinds of model.
ARCHITECTURES = [
    "llama",
    "mistral",  # windows
    "gemma2",  # windows on every other layer, capped scores
    "gemma3_text",
    "qwen3",
    "phi3",
    "gpt_neox",
    "opt",  # learned positions
    "bloom",  # ALiBi
    "cohere2",
    "mixtral",  # experts
    "gpt_oss",  # experts, windows, sink logits
    "falcon_h1",  # keys and a recurrent state in every layer
    "qwen3_next",  # linear attention on most layers
    "bart",
    "t5",  # position bias
]
#: Prompts of a batch: three, as mistakes in a batch of two may cancel out.
PROMPTS = 3
#: Standard deviation of the weights: attention that is sharp enough for a wrong key to show.
SPREAD = 0.2
#: `sdpa` takes the same way through the cache as `eager`; one architecture of each kind tries it.
WITH_SDPA = ["llama", "mistral", "falcon_h1", "bart"]
#: Most tokens of a preallocated cache, more than any way needs.
CAPACITY = 64

#: A preallocated cache refuses these, whose layers hold keys and a recurrent state at once.
NOT_PREALLOCATED = {"falcon_h1"}


@pytest.fixture(autouse=True)
def _quietly() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity(50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(before)


@functools.cache
def _model(architecture: str) -> tuple[PreTrainedModel, str]:
    """The model and the mapping of transformers that it is from."""
    wanted = "seq2seq" if architecture in ("bart", "t5") else "causal"
    mapping, _, class_name = next(x for x in architectures() if x[:2] == (wanted, architecture))
    model = tiny_model(architecture, class_name, mapping, OVERRIDES.get(architecture, {}), SPREAD)
    generation: Any = model.generation_config
    generation.eos_token_id = generation.forced_bos_token_id = generation.forced_eos_token_id = None
    generation.pad_token_id = 0
    return model, mapping


def _inputs(architecture: str, mode: Mode) -> dict[str, Any]:
    model, mapping = _model(architecture)
    inputs = inputs_for(model, mapping, architecture)
    inputs = {name: torch.cat([x, x[:1].roll(1, dims=1)]) for name, x in inputs.items()}
    if mode.padded:
        inputs["attention_mask"][1, :PADDING] = 0
    return inputs


def _run(architecture: str, mode: Mode, attention: str, make: Callable[..., Cache]) -> tuple[Result, list[Cache]]:
    """The result of one way to generate, and the caches that were made for it."""
    model = _model(architecture)[0]
    model.set_attn_implementation(attention)
    set_seed(0)
    with generating_with(make) as made:
        given: dict[str, Any] = {}
        if mode.preallocated:
            made.append(make(model.config))
            given = {CACHE_ARGUMENT: made[0]}
        return mode.run(model, _inputs(architecture, mode), **given), made


def _forced(
    architecture: str, mode: Mode, attention: str, make: Callable[..., Cache], tokens: torch.Tensor
) -> torch.Tensor:
    """Logits ``[rows, NEW_TOKENS, vocabulary]`` along ``tokens``, with each prompt as often as there are rows for."""
    model = _model(architecture)[0]
    model.set_attn_implementation(attention)
    inputs = _inputs(architecture, mode)
    copies = len(tokens) // PROMPTS
    inputs = {name: x.repeat_interleave(copies, dim=0) for name, x in inputs.items()}
    with generating_with(make):
        return generate(model, inputs, logits_processor=LogitsProcessorList([_Force(tokens)])).logits


def _dynamic(config: PreTrainedConfig) -> Cache:
    return DynamicCache(config=config)


def _static(config: PreTrainedConfig) -> Cache:
    return StaticCache(config=config, max_cache_len=CAPACITY)


def _ours(mode: Mode, **options: Any) -> Callable[[PreTrainedConfig], Cache]:
    if mode.padded:
        options["center_keys"] = False  # or the keys of padding are part of the centre where it is not known
    if mode.preallocated:
        options |= {"max_batch_size": 3 * PROMPTS, "max_cache_len": CAPACITY}
    return lambda config: PagedInt8Cache(config, **options)


def _oracle(mode: Mode, paddings: tuple[tuple[int, ...], ...]) -> Callable[[PreTrainedConfig], Cache]:
    """Makes fake-quantized caches that know of padding what ours were told, one after the other."""
    told = iter(paddings)
    return lambda config: FakeQuantizedCache(config, center_keys=not mode.padded, padding=next(told, ()))


@functools.cache
def _theirs(architecture: str, mode: Mode, attention: str) -> Result | str:
    """The result with transformers' own cache, or the error in one line."""
    try:
        return _run(architecture, mode, attention, _static if mode.preallocated else _dynamic)[0]
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


@functools.cache
def _as_stored(architecture: str, mode: Mode, attention: str, paddings: tuple[tuple[int, ...], ...] = ()) -> Result:
    """The result with the fake-quantized dense cache."""
    return _run(architecture, mode, attention, _oracle(mode, paddings))[0]


@functools.cache
def _effect(architecture: str, attention: str) -> float:
    """Largest change of a logit by quantization, along `DynamicCache`'s greedy tokens."""
    greedy = MODES[0]
    exact = _theirs(architecture, greedy, attention)
    assert isinstance(exact, Result), exact
    stored = _forced(architecture, greedy, attention, _oracle(greedy, ()), exact.tokens)
    return (stored - exact.logits).abs().max().item()


@functools.cache
def _related(architecture: str, mode: Mode, attention: str) -> bool:
    """Whether there is a relation, and it holds with transformers' own cache."""
    theirs = _theirs(architecture, mode, attention)
    assert isinstance(theirs, Result)
    if theirs.relation is None:
        return False
    if not theirs.in_rows:
        return torch.equal(theirs.tokens, theirs.relation.tokens)
    return largest_difference(theirs, theirs.relation) <= EXACT * theirs.logits.abs().max().item()


def _check_values(architecture: str, mode: Mode, attention: str, ours: Result, made: list[Cache]) -> str:
    """Compare with the oracle. Returns the name of the tolerance."""
    dense = "eager" if attention == "int8_paged" else attention
    paddings: tuple[tuple[int, ...], ...] = ()
    if mode.padded and attention == "int8_paged":
        paddings = tuple(_padding(cache)[0] for cache in made)
    oracle = _as_stored(architecture, mode, dense, paddings)
    bound = EXACT * oracle.logits[oracle.logits.isfinite()].abs().max().item()
    name = "exact"
    effect = max(_effect(architecture, dense), bound)
    if attention == "int8_paged":
        name, bound = ("candidates", 2 * effect) if mode.candidates else ("kernel", BOUND * effect)
    elif mode.preallocated:
        name, bound = "tipped", BOUND * effect
    others = [oracle]
    if ours.relation is not None and _related(architecture, mode, dense):
        others.append(ours.relation)
    for other in others:
        if ours.in_rows:
            difference = largest_difference(ours, other)
            assert difference <= bound, f"logits differ by {difference:.1e}, more than {name} allows: {bound:.1e}"
        elif name == "exact":
            assert (ours.scores - other.scores).abs().max() <= 2 * bound
            gaps = (other.scores[:, None] - other.scores).abs().fill_diagonal_(torch.inf)
            assert torch.equal(ours.tokens, other.tokens) or gaps.min() <= 4 * bound, "other sequences won"
    if not ours.in_rows:
        rows, copies = len(paddings[0]) // PROMPTS if paddings else 1, len(ours.tokens) // PROMPTS
        paddings = tuple(tuple(padding for padding in p[::rows] for _ in range(copies)) for p in paddings)
        logits = _forced(architecture, mode, dense, _oracle(mode, paddings), ours.tokens)
        difference = (ours.scores - mean_log_probabilities(logits, ours.tokens)).abs().max().item()
        assert difference <= 2 * bound, f"scores differ by {difference:.1e}, more than 2 x {name}: {2 * bound:.1e}"
    return name


# Results to compare with are kept; so one process takes all of an architecture.
CASES = [
    pytest.param(architecture, attention, marks=pytest.mark.xdist_group(architecture))
    for architecture in ARCHITECTURES
    for attention in ["eager", "int8_paged"] + ["sdpa"] * (architecture in WITH_SDPA)
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize(("architecture", "attention"), CASES)
def test_generates_as_with_transformers_own_cache(
    architecture: str, mode: Mode, attention: str, record_property: Callable
) -> None:
    model = _model(architecture)[0]
    dense = "eager" if attention == "int8_paged" else attention
    if mode.decoder_only and model.config.is_encoder_decoder:
        pytest.skip("for decoder-only models")
    if mode.run is attentions and attention != "eager":
        pytest.skip("only eager attention has weights to return")
    if mode.preallocated and architecture in NOT_PREALLOCATED:
        with pytest.raises(NotImplementedError, match="a cache that grows serves it"):
            _run(architecture, mode, attention, _ours(mode))
        record_property("outcome", "refused, not preallocated")
        return
    theirs = _theirs(architecture, mode, dense)
    if isinstance(theirs, str):
        record_property("reason", theirs)
        try:
            _run(architecture, mode, attention, _ours(mode))
        except Exception:
            record_property("outcome", "refused alike")
        else:
            record_property("outcome", "only with ours")
        return
    ours, made = _run(architecture, mode, attention, _ours(mode))
    assert made, "generate made no cache"
    assert all(isinstance(cache, PagedInt8Cache) and cache.get_seq_length() for cache in made)
    assert structure(ours.output) == structure(theirs.output)
    try:
        tolerance = _check_values(architecture, mode, attention, ours, made)
    except AssertionError:
        if attention != "int8_paged" or not _has_experts(model):
            raise
        ours, made = _run(architecture, mode, attention, _ours(mode, backend="reference"))
        _check_values(architecture, mode, attention, ours, made)
        tolerance = "router"
    if theirs.relation is not None and not _related(architecture, mode, dense):
        record_property("reason", f"{mode.name}: transformers' own cache does not keep the relation either")
    same = torch.equal(ours.output.sequences, theirs.output.sequences)
    record_property("outcome", "same tokens" if same else f"other tokens, within {tolerance}")
