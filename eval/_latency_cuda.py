"""`latency.py` on a GPU: our kernel, PyTorch's attention over dense float16, and a copy of device memory.

Times are those of the device, between two events. Before the first one the device is put to sleep for longer than the
host needs to launch, so what the host does in between is not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _latency_race import Case, Contestant, int8_calls, race, sdpa_calls, sets_for, warm_up_context
from torch.nn.attention import SDPBackend, sdpa_kernel

CASES = (
    Case(1, 8, 4, 128, 8192),
    Case(8, 8, 1, 128, 8192),
    Case(8, 8, 4, 128, 8192),
    Case(8, 8, 8, 128, 8192),
    Case(64, 8, 4, 128, 1024),
    Case(8, 3, 3, 64, 8192),
)
#: Of `torch.compile`.
FLEX_BACKEND = "inductor"
#: Cycles, about half a millisecond.
SLEEP = 1_000_000


class CudaContestant(Contestant):
    def step(self) -> None:
        call = self.calls[len(self.times) % len(self.calls)]
        self.warm_up()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP)
        start.record()
        call()
        end.record()
        end.synchronize()
        self.times.append(start.elapsed_time(end) / 1e3)


def flex_calls(case: Case, count: int, q: torch.Tensor, attend: Callable[..., Any]) -> list[Callable[[], Any]]:
    shape = (case.batch, case.kv_heads, case.context, case.head_dim)
    pairs = [[torch.randn(shape, device=q.device).to(q.dtype) for _ in "kv"] for _ in range(count)]
    return [partial(attend, q, k, v, enable_gqa=True) for k, v in pairs]


def flash_calls(case: Case, count: int, q: torch.Tensor) -> list[Callable[[], Any]]:
    """FlashAttention as torch has it: the calls of `sdpa_calls`, held to that kernel."""

    def held(call: Callable[[], Any]) -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return call()

    return [partial(held, call) for call in sdpa_calls(case, count, q)]


def compiled_flex(case: Case, q: torch.Tensor) -> Callable[..., Any] | None:
    """``flex_attention``, compiled; None, and a line that says why, where it does not work."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, dynamic=False, backend=FLEX_BACKEND)
    try:
        flex_calls(replace(case, context=128), 1, q, attend)[0]()
    except Exception as error:
        print(f"flex_attention does not compile here and takes no part: {error}".split("\n", 1)[0])
        return None
    return attend


def contestants(
    case: Case, cold_bytes: int, q: torch.Tensor, flex: Callable[..., Any] | None
) -> dict[str, tuple[list[Callable[[], Any]], int, Callable[[], Any]]]:
    """Name -> calls, bytes that each of them moves, and a short call."""
    int8_bytes, fp16_bytes = case.elements + 2 * case.elements // case.head_dim, 2 * case.elements
    int8_sets, fp16_sets = (sets_for(size, cold_bytes) for size in (int8_bytes, fp16_bytes))
    tiny = replace(case, context=warm_up_context(case))
    random = partial(int8_calls, q=q, random_order=True)
    source = torch.zeros(2 * cold_bytes, dtype=torch.int8, device=q.device)
    target = torch.empty_like(source)
    found = {
        "int8": (int8_calls(case, int8_sets, q=q), int8_bytes, int8_calls(tiny, 1, q=q)[0]),
        "int8_random_order": (random(case, int8_sets), int8_bytes, random(tiny, 1)[0]),
        "sdpa_fp16": (sdpa_calls(case, fp16_sets, q), fp16_bytes, sdpa_calls(tiny, 1, q)[0]),
        "flash_fp16": (flash_calls(case, fp16_sets, q), fp16_bytes, flash_calls(tiny, 1, q)[0]),
        "copy": (
            [partial(target.copy_, source)],
            2 * source.nbytes,
            partial(target[: 1 << 17].copy_, source[: 1 << 17]),
        ),
    }
    if flex is not None:
        # Compiled for each shape; the short call is of the same one.
        calls = flex_calls(case, fp16_sets + 1, q, flex)
        found["flex_fp16"] = (calls[1:], fp16_bytes, calls[0])
    return found


def run_case(case: Case, rounds: int, cold_bytes: int, device: torch.device, flex: bool = True) -> dict[str, Any]:
    """A race of all contestants, among which ``flex_attention`` has to be compiled first."""
    q = torch.randn(case.batch, case.kv_heads * case.group, 1, case.head_dim, device=device).half()
    found = contestants(case, cold_bytes, q, compiled_flex(case, q) if flex else None)
    return judged(case, race({name: CudaContestant(*parts) for name, parts in found.items()}, rounds))


def judged(case: Case, results: dict[str, dict[str, float]]) -> dict[str, Any]:
    int8, bandwidth = results["int8"], results["copy"]["gb_per_s"]
    rivals = {name: results[name]["median_ms"] for name in ("sdpa_fp16", "flash_fp16", "flex_fp16") if name in results}
    return {
        "case": vars(case),
        "contestants": results,
        "read_bandwidth_gb_per_s": bandwidth,
        **{f"speedup_over_{name}": ms / int8["median_ms"] for name, ms in rivals.items()},
        "share_of_read_bandwidth": int8["gb_per_s"] / bandwidth,
        "cost_of_random_order": results["int8_random_order"]["median_ms"] / int8["median_ms"],
    }


def report(result: dict[str, Any]) -> str:
    ours = result["contestants"]["int8"]
    speedups = [f"{name[13:]} {x:.2f}x" for name, x in result.items() if name.startswith("speedup_over_")]
    return (
        f"{Case(**result['case']).in_lines()}:\n    {ours['median_ms']:.4f} ms "
        f"[{ours['p10_ms']:.4f}, {ours['p90_ms']:.4f}]  as fast as {', '.join(speedups)}  "
        f"{ours['gb_per_s']:.0f} of {result['read_bandwidth_gb_per_s']:.0f} GB/s of a copy = "
        f"{result['share_of_read_bandwidth']:.0%}  random order {result['cost_of_random_order']:.2f}x"
    ).replace("\n", ", ", 2)
