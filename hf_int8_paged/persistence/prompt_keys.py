"""What a stored prompt is found by: hashes of its tokens, block by block, that begin with a hash of the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..options import decoder_config
from .fingerprint import fingerprint
from .prompt_inputs import length_limit, picture_ids, unsaid

#: Elements of each parameter that tell two models of one architecture apart.
_SAMPLE = 16
#: What `peft` says of each layer that it has adapted.
_ADAPTERS = ("active_adapter", "active_adapters", "disable_adapters", "merged_adapters", "scaling")


class Origin(NamedTuple):
    """What prompts are stored under beside their ids.

    Attributes:
        model: its hash.
        extra: names what the ids do not say, or None.
        unsaid: why the ids alone do not tell this model's prompts apart, or None if they do.
        pictures: ids that stand for a picture, a sound or a film.
        limit: tokens beyond which a prompt's beginning has other keys than a shorter prompt's, or None.
    """

    model: str
    extra: str | None
    unsaid: str | None
    pictures: frozenset[int]
    limit: int | None

    @classmethod
    def of(cls, model: Any, extra: str | None) -> Origin:
        """Of a model of transformers.

        Raises:
            TypeError: this is no model.
        """
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"a prompt store needs the model, whose weights tell it from others, and got {type(model).__name__}"
            )
        config: Any = model.config
        away = next((name for name, weight in _weights(model) if weight.is_meta), None)
        reason = unsaid(config) if away is None else f"{away} and maybe other weights of the model are elsewhere"
        return cls(model_key(model), None, reason, picture_ids(config), length_limit(decoder_config(config))).named(
            extra
        )

    def named(self, extra: str | None) -> Origin:
        """The same with another name for what the ids do not say.

        Raises:
            TypeError: it is no text.
        """
        if extra is not None and not isinstance(extra, str):
            raise TypeError(f"extra_key must be a text or None, got {extra!r}")
        return self._replace(extra=extra)

    def check(self, ids: np.ndarray) -> None:
        """Refuse a prompt of which the ids do not say all, unless a name does.

        Args:
            ids: int64 ``[tokens]``.

        Raises:
            ValueError: the message says what is missing.
        """
        reason = self.unsaid
        if reason is None and (found := ids[np.isin(ids, list(self.pictures))]).size:
            reason = f"id {found[0]} stands for a picture, a sound or a film, and is the same for all of them"
        if self.extra is None and reason is not None:
            raise ValueError(
                f"{reason}, so that the ids do not tell one prompt from another; name the rest by extra_key=..., a "
                "text that differs where that does (a hash of the input, for instance)"
            )

    def findable(self, lengths: set[int], ids: np.ndarray) -> set[int]:
        """Those of some lengths whose prefixes a prompt can go on from.

        Args:
            lengths: below ``len(ids)``, or that.
            ids: int64 ``[tokens]``, of the prompt.
        """
        if self.limit is not None and len(ids) > self.limit:
            lengths = {tokens for tokens in lengths if tokens > self.limit}  # shorter ones have other keys
        inside = np.isin(ids, list(self.pictures))
        inside = np.append(inside[:-1] & inside[1:], False)  # a model takes a picture as a whole
        return {tokens for tokens in lengths if not inside[tokens - 1]}

    def hashes(self, ids: np.ndarray, cache: Any) -> PrefixHashes:
        """Of a prompt's prefixes, as this cache stores rows."""
        pool, extra = cache.pool, "" if self.extra is None else f" {self.extra!r}"
        how = (pool.block_size, pool.rotation, pool.center_keys, pool.format, cache._sequences.sink_tokens)
        return PrefixHashes(f"{self.model} {how}{extra}", ids, pool.block_size)


def model_key(model: torch.nn.Module) -> str:
    """A hash of a model: of its config, of which adapters are in use, and of some elements of every parameter and
    buffer, so that two models of one config are told apart. A change of single other elements is not seen, and nothing
    of weights that are elsewhere.

    Args:
        model: of transformers.
    """
    config: Any = model.config
    said = hashlib.sha256(json.dumps(fingerprint(decoder_config(config)), sort_keys=True).encode())
    for name, weight in _weights(model):
        said.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.is_meta:
            continue
        flat = weight.detach().reshape(-1)
        count = min(_SAMPLE, len(flat))
        # In integers: floats round past the end.
        places = torch.arange(count, device="cpu") * (len(flat) - 1) // max(count - 1, 1)
        said.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    for name, module in model.named_modules():
        adapters = [getattr(module, attribute, None) for attribute in _ADAPTERS]
        adapters = [x if isinstance(x, bool | str | list | tuple | dict) else None for x in adapters]
        if any(x is not None for x in adapters):
            said.update(json.dumps([_plain(name), *adapters], sort_keys=True, default=str).encode())
    return said.hexdigest()


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and buffers that are saved with a model: quantized weights are some. The others are made of the
    config, and steps may change them."""
    for name, parameter in model.named_parameters():
        yield _plain(name), parameter
    for name, module in model.named_modules():
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in module._non_persistent_buffers_set:
                yield _plain(f"{name}.{own}"), buffer


def _plain(name: str) -> str:
    """The name that a module has before it is compiled."""
    return name.replace("_orig_mod.", "").replace("_orig_mod", "").lstrip(".")


def token_ids(ids: torch.Tensor | Sequence[int]) -> np.ndarray:
    """Ids of one sequence, int64 ``[tokens]``, of a tensor ``[tokens]`` or ``[1, tokens]`` or a sequence of integers.

    Raises:
        ValueError: several sequences.
        TypeError: no integers.
    """
    if isinstance(ids, torch.Tensor):
        tensor = ids.detach().cpu()
    else:
        try:
            tensor = torch.tensor(list(ids), dtype=torch.long, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"token ids must be integers, [tokens] or [1, tokens], got {type(ids).__name__}") from error
    if tensor.ndim == 2 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != 1:
        raise ValueError(f"a prompt is one sequence of tokens, [tokens] or [1, tokens], got {list(tensor.shape)}")
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise TypeError(f"token ids must be integers, got {tensor.dtype}")
    return tensor.numpy().astype("<i8")


class PrefixHashes:
    """Hashes of the prefixes of one prompt.

    Args:
        key: of the model and of how rows are stored.
        ids: int64 ``[tokens]``.
        block_size: tokens per block.
    """

    def __init__(self, key: str, ids: np.ndarray, block_size: int):
        self.ids, self.block_size = ids, block_size
        self._blocks = [hashlib.sha256(key.encode()).digest()]
        for start in range(0, len(ids) - block_size + 1, block_size):
            block = ids[start : start + block_size].tobytes()
            self._blocks.append(hashlib.sha256(self._blocks[-1] + block).digest())

    def of(self, tokens: int) -> str:
        """The hash of the first ``tokens`` ids."""
        whole, rest = divmod(tokens, self.block_size)
        if not rest:
            return self._blocks[whole].hex()
        return hashlib.sha256(self._blocks[whole] + self.ids[whole * self.block_size : tokens].tobytes()).hexdigest()
