"""The demo: one model, one prompt, greedy generation with `DynamicCache` and with `PagedInt8Cache`, side by side."""

from __future__ import annotations

import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache
from transformers.generation.streamers import BaseStreamer

from .. import PagedInt8Cache
from ..cache_argument import CACHE_ARGUMENT
from .demo_model import load_demo_model, quiet_transformers

QUESTION = "What did Augustin-Jean Fresnel show in 1822? Answer with the words of the text."
#: Tokens generated before anything is timed, so that no contestant pays for first use.
_WARMUP_TOKENS = 4


class DemoError(ValueError):
    """The demo cannot run with what it was given. The message says what to change."""


@dataclass(frozen=True)
class Run:
    """One greedy generation."""

    cache: str
    attention: str
    #: Kernel backends that served the layers; none for a cache that is not ours.
    backends: list[str]
    tokens: list[int]
    text: str
    #: Time from the call to the first new token, in ms.
    first_token_ms: float
    #: Median time between two tokens after the first, in ms; None with a single token.
    ms_per_token: float | None
    #: Bytes of memory that hold keys and values (and scales), all layers.
    bytes_allocated: int
    #: Bytes of it that hold tokens.
    bytes_in_use: int


@dataclass(frozen=True)
class Comparison:
    """The same prompt, generated with both caches."""

    model: str
    device: str
    dtype: str
    torch_threads: int
    prompt_tokens: int
    dynamic: Run
    int8: Run

    @property
    def agreement(self) -> int:
        """Leading greedy tokens that are the same in both."""
        pairs = zip(self.dynamic.tokens, self.int8.tokens)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.dynamic.tokens), len(self.int8.tokens))
        )

    @property
    def bytes_ratio(self) -> float:
        """Bytes in use, int8 over dynamic."""
        return self.int8.bytes_in_use / self.dynamic.bytes_in_use

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "agreement": self.agreement, "bytes_ratio": self.bytes_ratio}


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def default_prompt() -> str:
    """A passage of about 550 tokens and a question about it: long enough for the size of a cache to mean something."""
    passage = Path(__file__).with_name("demo_passage.txt").read_text(encoding="utf-8")
    return f"{passage.strip()}\n\n{QUESTION}"


def load(
    name: str | None,
    device: str | None = None,
    dtype: str | None = None,
    on_step: Callable[[str], None] | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: a model on the hub, or a folder; ``None`` takes the demo model.
        device: such as ``"cpu"`` or ``"cuda"``; default the accelerator if there is one.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; default float32 on the CPU, else bfloat16.
        on_step: called with a short description of each step that takes time.

    Raises:
        DemoError: no such model, not a causal language model, damaged files, or no such device.
        DemoModelError: the demo model cannot be had.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        device = accelerator.type if accelerator else "cpu"
    try:
        torch.zeros(1, device=device).item()  # read back, which the device "meta" cannot
    except (RuntimeError, AssertionError, ValueError) as error:
        raise DemoError(f"device {device!r} cannot be used: {_shortly(error)}; try --device cpu") from error
    torch_dtype = getattr(torch, dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16"))
    with _quietly():
        if name is None:
            return load_demo_model(device=device, dtype=torch_dtype, on_progress=on_step)
        if on_step:
            on_step(f"loading {name}")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype, attn_implementation="sdpa")
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise DemoError(
                f"cannot load {name!r} as a causal language model. --model takes a name on the hub, which must be "
                f"reachable, or a folder that save_pretrained wrote. transformers said: {_shortly(error)}"
            ) from error
        return model.to(device).eval(), tokenizer


def compare(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    on_token: Callable[[str], None] | None = None,
) -> Comparison:
    """Generate greedily with `DynamicCache` (attention "sdpa"), then with `PagedInt8Cache` ("int8_paged").

    Args:
        model: a causal language model. Its attention implementation is restored afterwards.
        tokenizer: its tokenizer; with a chat template, the prompt becomes a user's message.
        prompt: text.
        max_new_tokens: most tokens to generate; fewer if the model ends its answer with `DynamicCache`. With
            `PagedInt8Cache` it generates as many, so that bytes can be compared.
        on_token: called with the name of the cache for every token.

    Raises:
        DemoError: the prompt is empty, or with the new tokens longer than the model's context.
    """
    inputs = _encode(tokenizer, prompt).to(model.device)
    prompt_tokens = inputs["input_ids"].shape[1]
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and prompt_tokens + max_new_tokens > longest:
        raise DemoError(
            f"the prompt has {prompt_tokens} tokens, and with {max_new_tokens} new ones that exceeds the "
            f"model's {longest}; shorten the prompt or lower --max-new-tokens"
        )
    attention_before = model.config._attn_implementation
    runs: list[Run] = []
    try:
        with _quietly():
            for attention, cache_class in (("sdpa", DynamicCache), ("int8_paged", PagedInt8Cache)):
                model.set_attn_implementation(attention)
                _generate(model, tokenizer, inputs, cache_class(config=model.config), _WARMUP_TOKENS)
                cache = cache_class(config=model.config)
                most, least = (max_new_tokens, 0) if not runs else (len(runs[0].tokens), len(runs[0].tokens) - 1)
                runs.append(_generate(model, tokenizer, inputs, cache, most, least, on_token))
    finally:
        model.set_attn_implementation(attention_before)
    return Comparison(
        model=str(model.config.name_or_path),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        torch_threads=torch.get_num_threads(),
        prompt_tokens=prompt_tokens,
        dynamic=runs[0],
        int8=runs[1],
    )


def kv_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes of keys, values and scales that a cache has allocated, and bytes of them that are in use."""
    if isinstance(cache, PagedInt8Cache):
        return cache.nbytes_allocated, cache.nbytes_used
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    tensors = [x for x in kept if isinstance(x, torch.Tensor)]
    return sum(x.untyped_storage().nbytes() for x in tensors), sum(x.nbytes for x in tensors)


def _backends(cache: Cache) -> list[str]:
    if not isinstance(cache, PagedInt8Cache):
        return []
    storages = (cache.pool.storages.get(index) for index in range(len(cache.layers)))
    return sorted({storage.backend for storage in storages if storage is not None})


class _Clock(BaseStreamer):
    """Notes when each token came."""

    def __init__(self, on_token: Callable[[], None]):
        self.on_token = on_token
        self.times = [time.perf_counter()]
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.on_token()

    def end(self) -> None:
        pass


def _generate(
    model: Any,
    tokenizer: Any,
    inputs: Any,
    cache: Cache,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    on_token: Callable[[str], None] | None = None,
) -> Run:
    name = type(cache).__name__
    clock = _Clock((lambda: on_token(name)) if on_token else lambda: None)
    options = {"temperature": None, "top_p": None, "top_k": None, "do_sample": False, "num_beams": 1}
    limits = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    out = model.generate(**inputs, **{CACHE_ARGUMENT: cache}, streamer=clock, **limits, **options)
    tokens = out[0, inputs["input_ids"].shape[1] :].tolist()
    steps = [1000 * (b - a) for a, b in zip(clock.times, clock.times[1:])]
    allocated, in_use = kv_bytes(cache)
    return Run(
        cache=name,
        attention=model.config._attn_implementation,
        backends=_backends(cache),
        tokens=tokens,
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        first_token_ms=steps[0],
        ms_per_token=statistics.median(steps[1:]) if len(steps) > 1 else None,
        bytes_allocated=allocated,
        bytes_in_use=in_use,
    )


def _encode(tokenizer: Any, prompt: str) -> Any:
    if not prompt.strip():
        raise DemoError("the prompt is empty; give --prompt some text")
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)


def _shortly(error: Exception) -> str:
    """An error's message in a line or three; torch's and transformers' may list all there is."""
    return textwrap.shorten(str(error), 320, placeholder=" ...")


@contextmanager
def _quietly() -> Iterator[None]:
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
