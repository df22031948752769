"""One architecture of the coverage table, measured in this process."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DummyLayer
from transformers.utils import logging

from eval._coverage_overrides import NO_DYNAMIC_CACHE, OVERRIDES, PROMPTS, inputs_for
from eval._fake_quantized import FakeQuantizedCache
from eval._tiny_configs import tiny_model
from hf_int8_paged import PagedInt8Cache
from hf_int8_paged.cache_argument import CACHE_ARGUMENT
from hf_int8_paged.hybrid import PagedInt8HybridLayer
from hf_int8_paged.layer import PagedInt8Layer
from hf_int8_paged.layer_types import layer_types
from hf_int8_paged.seam.views import PagedView

NEW_TOKENS = 24
#: float32 rounding, summed over the layers: largest difference from the oracle, relative to the largest logit.
EXACT = 1e-5
#: Largest part of quantization's own effect by which kernels may differ from the oracle.
BOUND = 0.5
SPREADS = (0.2, 0.1, 0.05)


class NotComparable(Exception):
    """`DynamicCache` itself does not work here, or is not what the model uses."""


class _Force(LogitsProcessor):
    """Makes `generate` choose given tokens."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forced = torch.full_like(scores, -torch.inf)
        forced.scatter_(1, self.tokens[:, self.step : self.step + 1], 0.0)
        self.step += 1
        return forced  # type: ignore[return-value]


def measure(mapping: str, architecture: str, class_name: str) -> dict[str, Any]:
    """What a row of the table says. ``status``: ok, refused, failed, or apart (`DynamicCache` does not work)."""
    warnings.simplefilter("ignore")
    logging.set_verbosity(50)
    torch.set_num_threads(1)
    if architecture in NO_DYNAMIC_CACHE:
        return {"status": "apart", "reason": NO_DYNAMIC_CACHE[architecture]}
    try:
        return _measure(mapping, architecture, class_name)
    except NotComparable as error:
        return {"status": "apart", "reason": str(error)}
    except Exception as error:
        return {"status": "failed", "reason": _one_line(error), "traceback": traceback.format_exc()}


def _measure(mapping: str, architecture: str, class_name: str) -> dict[str, Any]:
    model, exact, tokens = _with_dynamic_cache(mapping, architecture, class_name)
    inputs = inputs_for(model, mapping, architecture)
    types = [kind for kind, _ in layer_types(model.config.get_text_config(decoder=True))]
    result: dict[str, Any] = {"layers": dict(Counter(types))}
    try:
        new_cache(PagedInt8Cache, model)
    except (NotImplementedError, ValueError) as error:
        return result | {"status": "refused", "reason": _one_line(error)}
    figures, problems, cache, calls = _compare(model, inputs, exact, tokens)
    paged = [layer for layer in _layers(cache) if isinstance(layer, PagedInt8Layer) and layer.is_initialized]
    result |= figures | {
        "routes": _routes(cache, calls),
        "widths": sorted({layer.room.shape[1:3] for layer in paged if layer.room.shape}),
    }
    if paged and not figures["effect"]:
        problems.append("quantization left no trace in the logits")
    padded = inputs | {"attention_mask": inputs["attention_mask"].clone()}
    padded["attention_mask"][1, : PROMPTS[0] - PROMPTS[1]] = 0
    model.set_attn_implementation("eager")
    try:
        exact = _logits(model, padded, new_cache(DynamicCache, model), None)
        assert exact.isfinite().all()
    except Exception:
        result["padded"] = {"reason": "not with DynamicCache"}
    else:
        # The keys of padding, which differ between implementations, are part of the keys' centre where it is not known.
        result["padded"], wrong, *_ = _compare(model, padded, exact, exact.argmax(dim=-1), center_keys=False)
        problems += [f"padded, {problem}" for problem in wrong]
    return result | ({"status": "failed", "reason": "; ".join(problems)} if problems else {"status": "ok"})


def _compare(
    model: PreTrainedModel, inputs: dict[str, Any], exact: torch.Tensor, tokens: torch.Tensor, **options: Any
) -> tuple[dict[str, Any], list[str], Cache, Counter]:
    """Figures and what is wrong with them; the cache under ``int8_paged``, and how often which route was taken."""
    model.set_attn_implementation("eager")
    oracle = _logits(model, inputs, new_cache(FakeQuantizedCache, model, **options), tokens)
    eager = _logits(model, inputs, new_cache(PagedInt8Cache, model, **options), tokens)
    model.set_attn_implementation("int8_paged")
    cache = new_cache(PagedInt8Cache, model, **options)
    with _counted() as calls:
        ours = _logits(model, inputs, cache, tokens)
    eagerly = oracle
    if any(any(row) for row in _padding(cache)):
        # Other implementations do not show the cache what is padding.
        model.set_attn_implementation("eager")
        told = new_cache(FakeQuantizedCache, model, paddings=_padding(cache), **options)
        oracle = _logits(model, inputs, told, tokens)
        model.set_attn_implementation("int8_paged")
    effect = oracle - exact
    figures = {
        "effect": _largest(effect) / _largest(exact),
        "eager": _largest(eager - eagerly) / _largest(eagerly),
        **_parts(ours, oracle, effect),
    }
    if max(figures["int8_paged"], figures["int8_paged_rms"]) > BOUND and _has_experts(model):
        # A router may choose another expert for a score that is rounded otherwise, which changes everything after it.
        # The reference kernels round as the oracle does.
        exactly = _logits(model, inputs, new_cache(PagedInt8Cache, model, backend="reference", **options), tokens)
        figures |= {"tipped": figures["int8_paged"]} | _parts(exactly, oracle, effect)
    problems = []
    if not figures["eager"] <= EXACT:
        problems.append(f"eager: {figures['eager']:.1e} from the oracle")
    if not max(figures["int8_paged"], figures["int8_paged_rms"]) <= BOUND:
        part, rms = figures["int8_paged"], figures["int8_paged_rms"]
        problems.append(f"int8_paged: {part:.2f} of the effect, rms {rms:.2f}")
    return figures, problems, cache, calls


def _parts(ours: torch.Tensor, oracle: torch.Tensor, effect: torch.Tensor) -> dict[str, float]:
    """The difference from the oracle as a part of quantization's effect, at its largest and in the mean square."""
    difference = ours - oracle
    return {
        "int8_paged": _largest(difference) / max(_largest(effect), EXACT * _largest(oracle)),
        "int8_paged_rms": _rms(difference) / max(_rms(effect), EXACT * _rms(oracle)),
    }


def _has_experts(model: PreTrainedModel) -> bool:
    return any("experts" in name or "router" in name for name, _ in model.named_modules())


def _with_dynamic_cache(
    mapping: str, architecture: str, class_name: str
) -> tuple[PreTrainedModel, torch.Tensor, torch.Tensor]:
    """The model, its logits with `DynamicCache` ``[batch, steps, vocabulary]``, and the tokens ``[batch, steps]``."""
    for spread in SPREADS:
        try:
            model = tiny_model(architecture, class_name, mapping, OVERRIDES.get(architecture, {}), spread)
            cache = new_cache(DynamicCache, model)
            logits = _logits(model, inputs_for(model, mapping, architecture), cache, None)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise NotComparable(f"{_one_line(error)} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})") from error
        if logits.isfinite().all():
            break
    else:
        raise NotComparable("logits are not finite")
    if not any(_holds_something(layer) for layer in _layers(cache)):
        raise NotComparable(f"{class_name} does not use the cache it is given")
    return model, logits, logits.argmax(dim=-1)


def new_cache(cache_class: Callable, model: PreTrainedModel, paddings: Sequence[tuple] = (), **options: Any) -> Cache:
    """A cache for the model; where it has two, for the sequence itself and for cross-attention.

    Args:
        paddings: for each, tokens of padding in front of every sequence.
    """
    count = 2 if model.config.is_encoder_decoder else 1
    own = [{"padding": padding} for padding in paddings] or [{}] * count
    caches = [cache_class(config=model.config, **options, **mine) for mine in own]
    return EncoderDecoderCache(*caches) if count == 2 else caches[0]


def _padding(cache: Cache) -> list[tuple]:
    """What the paged caches were told of padding: tokens in front of every sequence."""
    caches: list[Any] = [cache]
    if isinstance(cache, EncoderDecoderCache):
        caches = [cache.self_attention_cache, cache.cross_attention_cache]
    sinks = [x._sequences.first_tokens for x in caches]
    return [() if held is None else tuple(held.first.tolist()) for held in sinks]


def _logits(model: PreTrainedModel, inputs: dict[str, Any], cache: Cache, tokens: torch.Tensor | None) -> torch.Tensor:
    """Logits at every step, ``[batch, steps, vocabulary]``; greedy, or along ``tokens``."""
    older_mamba = CACHE_ARGUMENT != "cache" and "mamba" in type(model).__name__.lower()
    name = "cache_params" if older_mamba else CACHE_ARGUMENT
    model.generation_config.eos_token_id = None
    model.generation_config.forced_bos_token_id = model.generation_config.forced_eos_token_id = None
    torch.manual_seed(0)
    generate: Any = model.generate
    out = generate(
        **inputs,
        **{name: cache},
        logits_processor=LogitsProcessorList([] if tokens is None else [_Force(tokens)]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack([step.float() for step in out.logits], dim=1)


@contextmanager
def _counted() -> Iterator[Counter]:
    """Counts calls of attention kernels and dense copies made from blocks."""
    calls: Counter = Counter()
    attend, tokens = PagedInt8Layer.attend, PagedView.tokens

    def counted_attend(self, *args, **kwargs):
        calls["kernel"] += 1
        return attend(self, *args, **kwargs)

    def counted_tokens(self):
        fresh = self.content.fresh
        calls["dense view"] += fresh is None or fresh[0].shape[2] < self.shape[2]
        return tokens(self)

    PagedInt8Layer.attend, PagedView.tokens = counted_attend, counted_tokens  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        PagedInt8Layer.attend, PagedView.tokens = attend, tokens  # type: ignore[method-assign]


def _routes(cache: Cache, calls: Counter) -> list[str]:
    own = [
        layer
        for layer in _layers(cache)
        if isinstance(layer, PagedInt8HybridLayer) or not isinstance(layer, PagedInt8Layer | DummyLayer)
    ]
    return [route for route in ("kernel", "dense view") if calls[route]] + ["transformers' layer"] * bool(own)


def _layers(cache: Cache) -> list:
    if isinstance(cache, EncoderDecoderCache):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return cache.layers


def _holds_something(layer: Any) -> bool:
    states = getattr(layer, "has_previous_state", {})
    return getattr(layer, "keys", None) is not None or any(states.values())


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
