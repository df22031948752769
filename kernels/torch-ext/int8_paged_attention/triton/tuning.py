"""Options of the decode kernel for each chip: a committed table, and tuning where HF_INT8_PAGED_TUNE=1 asks for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path

import torch
import triton

from .tiles import PART


@dataclass(frozen=True)
class Chip:
    """What the launcher must know of a device."""

    name: str  # "sm_90", "gfx942", ...
    num_processors: int


@dataclass(frozen=True)
class Config:
    """Options of the decode kernel.

    Attributes:
        max_registers: per thread; None leaves it to the compiler.
        programs_per_processor: programs for each multiprocessor: as many as fit, since all of them begin at once and
            share the work evenly (`schedule`). Even two have more bytes on their way than memory's latency asks for.
    """

    max_registers: int | None = None
    programs_per_processor: int = 2


#: By chip, head_dim (rounded up to `PART`) and third term of the query, and where these do not decide it, by block size
#: and group too: where the compiler's own choice of registers would keep a third program from a multiprocessor, spill
#: inside the loop, or ask for K and V in more trips to memory. At head_dim 256 each is the best of a dozen limits, by
#: the counts of docs/gpu_audit.json.
CONFIGS: dict[tuple[str | int | bool, ...], Config] = {
    ("sm_80", 64, False): Config(168, 3),
    ("sm_80", 256, False): Config(250),
    ("sm_80", 256, True): Config(252),
    ("sm_90", 64, False): Config(168, 3),
    ("sm_90", 256, False): Config(244),
    ("sm_90", 256, False, 16): Config(248),
    ("sm_100", 64, False): Config(168, 3),
    ("sm_100", 256, False): Config(252),
    ("sm_100", 256, False, 16): Config(251),
    ("sm_100", 256, False, 64, 8): Config(232),
    ("sm_100", 256, True, 16, 1): Config(253),
    ("sm_100", 256, True, 16, 8): Config(253),
    ("sm_100", 256, True, 64, 1): Config(251),
    ("sm_100", 256, True, 64, 8): Config(251),
}


def committed_config(chip: Chip, head_dim: int, third_term: bool, block_size: int, group: int) -> Config:
    """The entry of `CONFIGS` that says most about such calls."""
    key = (chip.name, -(-head_dim // PART.value) * PART.value, third_term, block_size, group)
    return next((CONFIGS[key[:count]] for count in (5, 4, 3) if key[:count] in CONFIGS), Config())


def config_for(
    chip: Chip, head_dim: int, third_term: bool, block_size: int, group: int, measure: Callable[[Config], float]
) -> Config:
    """The committed options, or with HF_INT8_PAGED_TUNE=1 and a GPU the fastest.

    Tuning takes seconds, once: its result is kept in the user's cache folder, and read only where tuning is asked for.

    Args:
        chip: the chip.
        head_dim: width of the keys.
        third_term: whether the query is split into three int8 terms.
        block_size: tokens of a block.
        group: query heads per KV head.
        measure: time of decode attention with these options.
    """
    committed = committed_config(chip, head_dim, third_term, block_size, group)
    if os.environ.get("HF_INT8_PAGED_TUNE") != "1" or not torch.cuda.is_available():
        return committed
    path = tuned_file()
    try:
        tuned = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tuned = {}
    kind = f"{chip.name}, head_dim {head_dim}, group {group}, {2 + third_term} terms, triton {triton.__version__}"
    if kind not in tuned:
        if torch.cuda.is_current_stream_capturing():
            return committed
        registers = (None, 128, 168, 208) if chip.name.startswith("sm_") else (None,)
        candidates = {committed, *(Config(*options) for options in product(registers, (2, 3, 4, 6)))}
        tuned[kind] = astuple(min(candidates, key=measure))
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(tuned, indent=1) + "\n", encoding="utf-8")
        new.replace(path)
    return Config(*tuned[kind])


def tuned_file() -> Path:
    """Where tuned options are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf-int8-paged" / "triton_tuned.json"
