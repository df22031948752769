"""What a stored prompt is found by: hashes of its tokens, block by block, that begin with a hash of the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..options import decoder_config
from .fingerprint import fingerprint

#: Elements of each parameter that tell two models of one architecture apart.
_SAMPLE = 16


def model_key(model: torch.nn.Module) -> str:
    """A hash of a model: of its config, and of some elements of every parameter, so that two models of one config are
    told apart. A change of single other elements is not seen.

    Args:
        model: of transformers.
    """
    config: Any = model.config
    said = hashlib.sha256(json.dumps(fingerprint(decoder_config(config)), sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLE, len(flat)), device="cpu").long()
        said.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        said.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return said.hexdigest()


def token_ids(ids: torch.Tensor | Sequence[int]) -> np.ndarray:
    """Ids of one sequence, int64 ``[tokens]``, of a tensor ``[tokens]`` or ``[1, tokens]`` or a sequence of integers.

    Raises:
        ValueError: several sequences.
        TypeError: no integers.
    """
    tensor = ids.detach().cpu() if isinstance(ids, torch.Tensor) else torch.tensor(list(ids), dtype=torch.long)
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
