"""The drill: an exception at every line of the package that an operation passes, and what the caller finds then.

``python -m tests.drill.drill`` injects at every point of every scenario and prints the counts; ``--sample 2000`` takes
points at random, ``--lines`` one at each line. After each injection the caller either repeats the operation, or resets
the cache and begins anew:

* the cache then holds exactly what an undisturbed one holds, or a sentence came (a ValueError or RuntimeError that
  names ``crop`` or ``reset``) whose advice leads there;
* ``reset()`` works, and what is stored afterwards is right;
* when the caches are deleted, no block of the pool is held, and all can be handed out.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import random
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from hf_int8_paged import CacheFullError, PagedInt8Cache
from hf_int8_paged.seam.attention import int8_paged_attention

from .injection import Point, collect_garbage, inject, one_of_each, only_new_garbage, points_of, time_limit
from .scenarios import KINDS, LAYERS, SCENARIOS, Scenario, Step, World

BACKENDS = ("cpu", "reference")
EXCEPTIONS = (MemoryError, KeyboardInterrupt)


class Injection(NamedTuple):
    """One injection; the caller then ``repeats`` the operation, or ``resets`` the cache."""

    scenario: str
    kind: str
    backend: str
    point: Point
    exception: type[BaseException]
    reaction: str

    def __str__(self) -> str:
        return (
            f"{self.scenario} ({self.kind}, {self.backend}): {self.exception.__name__} at {self.point}; "
            f"caller {self.reaction}"
        )


class Failure(Exception):
    """What an injection broke; the message is its kind."""


def contents(cache: PagedInt8Cache) -> tuple[Any, ...]:
    """All that can be seen of a cache: lengths, masks, dense keys and values, centres, places of first tokens."""
    layers: list[Any] = cache.layers
    found: list[Any] = [[int(cache.get_seq_length(i)) for i in range(LAYERS)], cache._sequences.batch_size]
    for layer in layers:
        found.append(layer.get_mask_sizes(1))
        if layer.keys is None:
            continue
        memory = getattr(layer.room, "memory", None)
        # A preallocated layer has positions that no query sees.
        first = layer.keys.content.start if memory is None else max(layer.length - (layer.window or layer.length), 0)
        keys, values = layer.gather(first, layer.length, torch.float32)
        found += [_bytes_of(keys), _bytes_of(values), _bytes_of(layer.storage.key_center)]
        if memory is None:
            places = cache._sequences.first_tokens
            found.append(None if places is None else [place.tolist() for place in places.on(torch.device("cpu"))])
        else:
            found.append(memory.first_tokens.places[:, : len(keys)].tolist())
    return tuple(found)


def _bytes_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], int]:
    return tuple(tensor.shape), zlib.crc32(tensor.contiguous().numpy().tobytes())


def outcome(world: World, scenario: Scenario) -> tuple[Any, ...]:
    """What all caches hold after the operation, and what they hold after one more step."""
    now = {name: contents(cache) for name, cache in world.caches.items()}
    if "main" in world.caches:
        Step(1, batch=world.main._sequences.batch_size or 2)(world)
    return now, {name: contents(cache) for name, cache in world.caches.items()}


def run(world: World, scenario: Scenario) -> tuple[Any, ...]:
    """The whole scenario, undisturbed."""
    for action in scenario.history:
        action(world)
    scenario.operation(world)
    return outcome(world, scenario)


@functools.cache
def right_outcomes(name: str, kind: str, backend: str) -> tuple[Any, Any]:
    """Of a fresh cache, and of one that ran the scenario before and was reset, whose keys have a centre already."""
    world, scenario = World(kind, backend), SCENARIOS[name]
    fresh = after_reset = run(world, scenario)
    if "main" in world.caches:
        world.main.reset()
        after_reset = run(world, scenario)
    check_accounting(world)
    return fresh, after_reset


def check(injection: Injection) -> str:
    """Inject and react. Returns what the caller met: ``same``, a sentence, ``reset`` or ``deleted``.

    Raises:
        Failure: anything else.
    """
    scenario = SCENARIOS[injection.scenario]
    fresh, after_reset = right_outcomes(injection.scenario, injection.kind, injection.backend)
    world = World(injection.kind, injection.backend)
    for action in scenario.history:
        action(world)
    error = inject(lambda: scenario.operation(world), injection.point, injection.exception)
    # A refusal of memory is told as a cache that is full.
    wanted = (MemoryError, CacheFullError) if injection.exception is MemoryError else injection.exception
    if error is not None and not isinstance(error, wanted):
        raise Failure(f"the operation raises {type(error).__name__}")
    met = "deleted"
    if "main" in world.caches:
        try:
            met = react(world, scenario, injection.reaction, error is None, fresh, after_reset)
        except (Failure, TimeoutError):
            raise
        except BaseException as unexpected:
            raise Failure(f"{type(unexpected).__name__} when the caller {injection.reaction}") from unexpected
    elif "twin" in world.caches and outcome(world, scenario) != fresh:
        raise Failure("another cache holds other values")
    check_accounting(world)
    return met


def react(world: World, scenario: Scenario, reaction: str, finished: bool, fresh: Any, after_reset: Any) -> str:
    """Do as the caller does after an injection, and compare what the cache then holds. Returns what the caller met."""
    met = "reset"
    if reaction == "repeats":
        met = "same" if finished else _repeat(world, scenario)
        if met != "sentence: reset" and outcome(world, scenario) != fresh:
            raise Failure(f"other values, {'in silence' if met == 'same' else 'after crop'}")
    world.caches = {"main": world.main}
    world.main.reset()
    if any(int(world.main.get_seq_length(i)) for i in range(LAYERS)):
        raise Failure("tokens after reset()")
    if run(world, scenario) not in (fresh, after_reset):
        raise Failure("other values after reset()")
    return met


def _repeat(world: World, scenario: Scenario) -> str:
    try:
        scenario.operation(world)
    except (ValueError, RuntimeError) as sentence:
        advice = re.search(r"crop\((-\d+)\)|reset\(\)", str(sentence))
        if advice is None:
            raise Failure(f"{type(sentence).__name__} without advice") from sentence
        if not advice[1]:
            return "sentence: reset"
        world.main.crop(int(advice[1]))
        scenario.operation(world)
        return "sentence: crop"
    return "same"


def check_accounting(world: World) -> None:
    """Delete all caches: every block must be free, none may have a holder, and all can be taken."""
    pool = world.pool
    world.caches.clear()
    collect_garbage()
    for allocator in () if pool is None else pool.allocators.values():
        counts = [allocator.ref_count(block) for block in range(allocator.num_blocks)]
        if allocator.num_used or allocator.num_free != len(counts) or any(counts):
            raise Failure("blocks are held after deletion")
        if sorted(allocator.allocate(len(counts))) != list(range(len(counts))):
            raise Failure("not all blocks can be handed out after deletion")


def _entry_of_attention() -> tuple[str, int]:
    """The line at which the attention function is entered. An exception there is still the model's own: nothing has
    begun that could be undone, and behind the last layer's ``update`` the step counts as done."""
    entered = int8_paged_attention.__code__  # of the function around it
    source, first = inspect.getsourcelines(entered)
    return entered.co_filename, first + next(i for i, line in enumerate(source) if line.strip() == "try:")


def injections() -> Iterator[Injection]:
    """All there are."""
    entry = _entry_of_attention()
    for name, scenario in SCENARIOS.items():
        for kind in scenario.kinds:
            for backend in BACKENDS:
                world = World(kind, backend)
                for action in scenario.history:
                    action(world)
                for number, point in enumerate(points_of(functools.partial(scenario.operation, world))):
                    if point[:2] == entry:
                        continue
                    for exception in EXCEPTIONS:
                        yield Injection(name, kind, backend, point, exception, "repeats")
                    # A caller who repeats resets afterwards; one who resets at once gets every other exception.
                    yield Injection(name, kind, backend, point, EXCEPTIONS[number % 2], "resets")


def one_at_each_line(everywhere: Iterable[Injection], seed: int) -> list[Injection]:
    """One at every line that caches which grow pass, and one at every line that preallocated ones pass, all chosen at
    random. Whether layers are offloaded is left to chance."""
    return one_of_each(everywhere, lambda x: (x.kind == "preallocated", x.point.file, x.point.line), seed)


def drill(chosen: Sequence[Injection], show: int = 0) -> tuple[Counter[str], Counter[str]]:
    """Carry out these injections. Returns how often each outcome came, and how often each failure did.

    Args:
        chosen: what to inject.
        show: print so many failures of each kind of cache and failure.
    """
    outcomes: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    with only_new_garbage(), torch.no_grad():
        for injection in chosen:
            try:
                with time_limit():
                    outcomes[check(injection)] += 1
            except TimeoutError:
                failure = "hangs"
            except Failure as error:
                failure = str(error)
            except Exception as error:
                failure = f"{type(error).__name__} after deletion"
            else:
                continue
            failures[f"{injection.kind}: {failure}"] += 1
            if failures[f"{injection.kind}: {failure}"] <= show:
                print(f"{failure}: {injection}", flush=True)
    return outcomes, failures


def main() -> int:
    """Command line; the exit status says whether anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, help="so many injections, chosen at random (default: all)")
    parser.add_argument("--lines", action="store_true", help="one injection at each line, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument("--kind", choices=sorted(KINDS), help="of the cache (default: all)")
    parser.add_argument("--at", default="", help="points in files whose path, with the line, contains this")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--show", type=int, default=1, help="failures of each kind to print, of each tenth")
    options = parser.parse_args()
    began = time.monotonic()
    chosen = [x for x in injections() if options.only in x.scenario and options.kind in (None, x.kind)]
    chosen = [x for x in chosen if options.at in f"{x.point.file}:{x.point.line} "]
    points = len({injection[:4] for injection in chosen})
    print(f"{points} points, {len(chosen)} injections")
    if options.lines:
        chosen = one_at_each_line(chosen, options.seed)
        print(f"of them {len(chosen)}, one at each line, chosen with seed {options.seed}")
    if options.sample is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
        print(f"of them {len(chosen)}, chosen with seed {options.seed}")
    chunks = [chosen[i :: 10 * options.workers] for i in range(10 * options.workers)]
    outcomes, failures = Counter[str](), Counter[str]()
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as workers:
        for of_chunk in workers.map(drill, chunks, [options.show] * len(chunks)):
            outcomes.update(of_chunk[0])
            failures.update(of_chunk[1])
    for name, counts in (("outcome", outcomes), ("failure", failures)):
        for what, count in counts.most_common():
            print(f"{name:8} {count:7} {what}")
    print(f"{sum(failures.values())} failures of {len(chosen)} injections in {time.monotonic() - began:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
