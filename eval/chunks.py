"""How fast a chunk of new tokens attends to a past: our kernel, and PyTorch's attention over dense keys and values.

The contestants take turns in one process, so that their ratios hold on a machine that does other things too; the result
says how loaded it was.

* ``int8``: the backend's ``attend`` with fresh keys and values, as the cache calls it.
* ``sdpa``: PyTorch's attention over keys and values that are dense already, and repeated for every query head.
* ``gather_sdpa``: the same after the past was dequantized, as the cache does where a backend has no kernel.

The memory that a call needs at its peak, beside its output and the blocks, is compared with that of a dense past.

    python eval/chunks.py --threads 1 --json eval/results/chunks_1.json
    python eval/chunks.py --threads 2 --json eval/results/chunks_2.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _common import DTYPES, positive, provenance, write_json
from torch.nn.functional import scaled_dot_product_attention

from hf_int8_paged.kernels import Scoring, Tokens, alloc_paged_int8_layer, load_backend
from hf_int8_paged.seam.masks import causal_rows

BLOCK_SIZE = 16
#: Rows of the chunk whose memory is measured.
MEMORY_CHUNK = 512


class Case(NamedTuple):
    kv_heads: int
    group: int
    head_dim: int
    past: int
    chunk: int


class Work:
    """One chunk over one past, and the contestants' calls on it."""

    def __init__(self, case: Case, dtype: torch.dtype):
        kv_heads, group, head_dim, past, chunk = case
        blocks = -(-past // BLOCK_SIZE)
        self.group, self.scoring = group, Scoring(head_dim**-0.5)
        self.storage = alloc_paged_int8_layer(
            blocks, BLOCK_SIZE, kv_heads, head_dim, device=torch.device("cpu"), rotation="hadamard", center_keys=True
        )
        for values, scales in ((self.storage.k, self.storage.k_scales), (self.storage.v, self.storage.v_scales)):
            values.random_(-127, 128)
            scales.uniform_(0.015, 0.03)
        table = torch.randperm(blocks).to(torch.int32)[None]
        self.tokens = Tokens.at(table, torch.tensor([past], dtype=torch.int32))
        self.backend = load_backend(self.storage.backend)
        self.q = torch.randn(1, kv_heads * group, chunk, head_dim).to(dtype)
        self.k, self.v = (torch.randn(1, kv_heads, chunk, head_dim).to(dtype) for _ in "kv")
        self.mask = causal_rows(chunk, past + chunk, self.q.device)
        self.out = torch.full_like(self.q, torch.nan)  # so that its memory is there
        self.dense_past_bytes = 2 * kv_heads * past * head_dim * dtype.itemsize

    def int8(self) -> torch.Tensor:
        self.backend.attend(self.out, self.q, self.storage, self.tokens, self.scoring, (self.k, self.v))
        return self.out

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of past and chunk, for every query head."""
        past = int(self.tokens.context_lens_before)
        k, v = self.backend.gather(self.storage, self.tokens, 0, past, self.q.dtype)
        both = torch.cat([k, self.k], 2), torch.cat([v, self.v], 2)
        return both if self.group == 1 else tuple(x.repeat_interleave(self.group, 1) for x in both)  # type: ignore[return-value]

    def sdpa(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(self.q, k, v, attn_mask=self.mask)

    def gather_sdpa(self) -> torch.Tensor:
        return self.sdpa(*self.dense())


def race(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, float]]:
    """All in turns, until ``seconds`` have passed, but at least three times each after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[next(iter(calls))]) < 4:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {
        name: {"median_ms": statistics.median(own[1:]) * 1e3, "min_ms": min(own[1:]) * 1e3, "calls": len(own) - 1}
        for name, own in times.items()
    }


def run_case(case: Case, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    work = Work(case, dtype)
    calls: dict[str, Callable[[], Any]]
    calls = {"int8": work.int8, "sdpa": partial(work.sdpa, *work.dense()), "gather_sdpa": work.gather_sdpa}
    ours, theirs = work.int8().float(), work.gather_sdpa().float()
    results = race(calls, seconds)
    ratios = {f"speedup_over_{name}": results[name]["median_ms"] / results["int8"]["median_ms"] for name in calls}
    difference = float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())
    return {"case": case._asdict(), "contestants": results, **ratios, "largest_difference": difference}


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Resident memory that a call needs at its peak beyond what there was before it; None but on Linux."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes(status, "VmRSS")
        call()
        return max(_status_bytes(status, "VmHWM") - before, 0)
    except OSError:
        return None


def _status_bytes(status: Path, name: str) -> int:
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) << 10


def run_memory(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    work = Work(case, dtype)
    peaks = {name: peak_bytes(call) for name, call in (("int8", work.int8), ("gather_sdpa", work.gather_sdpa))}
    shares = {name: None if peak is None else peak / work.dense_past_bytes for name, peak in peaks.items()}
    return {"case": case._asdict(), "dense_past_bytes": work.dense_past_bytes, "peak_bytes": peaks, "shares": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="(default: all, %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (default: %(default)s)")
    parser.add_argument("--heads", type=positive, nargs=2, default=(2, 2), metavar=("KV_HEADS", "GROUP"))
    parser.add_argument("--head-dims", type=positive, nargs="+", default=[64, 128])
    parser.add_argument("--pasts", type=positive, nargs="+", default=[1024, 8192, 32768], help="tokens of the past")
    parser.add_argument("--chunks", type=positive, nargs="+", default=[17, 64, 512, 2048], help="tokens of the chunk")
    parser.add_argument("--memory-past", type=positive, default=65536, help="tokens below the measured peak")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    heads: tuple[int, int] = args.heads[0], args.heads[1]
    made, dtype = provenance(torch.device("cpu"), timed=True), DTYPES[args.dtype]
    results, memory = [], []
    # Before the races: what one call leaves allocated would hide what the next one needs. But threads have been made.
    tiny = Work(Case(1, 4, 16, BLOCK_SIZE, MEMORY_CHUNK), dtype)
    tiny.int8(), tiny.gather_sdpa()
    for head_dim in args.head_dims:
        memory.append(run_memory(Case(*heads, head_dim, args.memory_past, MEMORY_CHUNK), dtype))
        print(report_memory(memory[-1]), flush=True)
    for head_dim in args.head_dims:
        for past in args.pasts:
            for chunk in args.chunks:
                results.append(run_case(Case(*heads, head_dim, past, chunk), dtype, args.seconds))
                print(report(results[-1]), flush=True)
    if args.json:
        write_json(args.json, {**made, "dtype": args.dtype, "results": results, "memory": memory})


def report(result: dict[str, Any]) -> str:
    case, times = Case(**result["case"]), result["contestants"]
    return (
        f"head_dim {case.head_dim:3d} past {case.past:5d} chunk {case.chunk:4d}: {times['int8']['median_ms']:8.2f} ms, "
        f"SDPA {result['speedup_over_sdpa']:.2f}x, gather and SDPA {result['speedup_over_gather_sdpa']:.2f}x as long"
    )


def report_memory(result: dict[str, Any]) -> str:
    case, shares = Case(**result["case"]), result["shares"]
    said = ", ".join(f"{name} {'unknown' if share is None else f'{share:.2%}'}" for name, share in shares.items())
    dense = f"a dense past of {result['dense_past_bytes'] / 2**20:.0f} MiB"
    return f"head_dim {case.head_dim:3d} past {case.past:5d} chunk {case.chunk:4d}: peak, as a share of {dense}: {said}"


if __name__ == "__main__":
    main()
