"""What a file of a cache goes through: kills in the middle of a save, damage, and forgery.

``python -m tests.drill.files`` kills 200 processes, damages 10,000 files and forges 2,000 headers, prints the counts
and writes them as JSON.

* A process that saves is killed at a random moment. Then the file is complete: the one before or the new one.
* A file with random damage is refused with a sentence, or equal to the undamaged one.
* A header with other values and right checksums is refused, or makes a cache that can be used: what somebody wrote on
  purpose may hold anything, but it must not be read outside of its tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from hf_int8_paged import CacheFileError, CacheFullError, PagedInt8Cache
from hf_int8_paged.persistence.header import ENTRY
from tests.drill.scenarios import CONFIG, HEADS, KINDS, LAYERS, rows

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "eval" / "results" / "file_drill.json"


def small_cache(kind: str, tokens: int = 40) -> PagedInt8Cache:
    """Two sequences, one of which was repeated, so that blocks are shared; three layers, two with a window."""
    cache = PagedInt8Cache(CONFIG, backend="reference", **KINDS[kind])
    for layer in range(LAYERS):
        cache.update(rows(layer, 2, tokens), rows(layer + 9, 2, tokens), layer)
    if kind == "growing":
        cache.batch_repeat_interleave(2)
    return cache


def contents(cache: PagedInt8Cache) -> list[bytes]:
    """Lengths, dense keys and values."""
    layers: list[Any] = cache.layers
    found = [bytes([int(cache.get_seq_length()), cache._batch or 0])]
    for layer in layers:
        first = max(layer.length - (layer.window or layer.length), 0)
        found += [x.numpy().tobytes() for x in layer.gather(first, layer.length, torch.float32)]
    return found


# -- kills -------------------------------------------------------------------------------------------------------------


def kill_drill(count: int, seed: int = 0) -> Counter[str]:
    """Kill ``count`` processes that save one after the other to the same file; returns what was found each time."""
    draw, found = random.Random(seed), Counter[str]()
    config = LlamaConfig(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, num_key_value_heads=4)
    caches = []
    for tokens in (600, 1100):
        cache = PagedInt8Cache(config, backend="reference")
        for layer in range(4):
            states = torch.randn(1, 4, tokens, 64)
            cache.update(states, states, layer)
        caches.append(cache)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of a pool do not follow into a forked process
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        began = time.monotonic()
        caches[0].save(path)
        takes = time.monotonic() - began
        sizes = {}
        for number in range(count):
            pid = os.fork()
            if not pid:
                _save_for_ever(caches, path)
            time.sleep(draw.uniform(0, 4 * takes))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            left = [file for file in path.parent.iterdir() if file != path]
            found["killed while a file was being written" if left else "killed between two saves"] += 1
            try:
                length = int(PagedInt8Cache.load(path, config, backend="reference").get_seq_length())
            except CacheFileError:
                found["lost or half"] += 1
            else:
                found[f"complete, with {length} tokens"] += 1
                sizes[number] = length
        caches[0].save(path)
        if [file for file in path.parent.iterdir() if file != path]:
            found["left behind after another save"] += 1
    torch.set_num_threads(before)
    return found


def _save_for_ever(caches: list[PagedInt8Cache], path: Path) -> None:
    try:
        for _ in range(10_000):
            for cache in caches:
                cache.save(path)
    finally:
        os._exit(1)


# -- damage ------------------------------------------------------------------------------------------------------------


def _place(draw: random.Random, data: bytearray) -> int:
    """Half of the damage goes to the header, which is a small part of a real file."""
    header = 8 + int.from_bytes(data[:8], "little")
    return draw.randrange(header if draw.random() < 0.5 and header < len(data) else len(data))


def flip(draw: random.Random, data: bytearray) -> None:
    data[_place(draw, data)] ^= 1 << draw.randrange(8)


def overwrite(draw: random.Random, data: bytearray) -> None:
    start = _place(draw, data)
    data[start : start + draw.randint(1, 64)] = draw.randbytes(draw.randint(1, 64))


def truncate(draw: random.Random, data: bytearray) -> None:
    del data[_place(draw, data) :]


def extend(draw: random.Random, data: bytearray) -> None:
    data += draw.randbytes(draw.randint(1, 64))


def remove(draw: random.Random, data: bytearray) -> None:
    start = _place(draw, data)
    del data[start : start + draw.randint(1, 64)]


def swap(draw: random.Random, data: bytearray) -> None:
    size = draw.randint(1, 32)
    a, b = sorted(draw.sample(range(len(data) - size), 2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def digit(draw: random.Random, data: bytearray) -> None:
    """Another digit in the header: numbers that parse, and mean something else."""
    header = 8 + int.from_bytes(data[:8], "little")
    digits = [i for i in range(8, min(header, len(data))) if chr(data[i]).isdigit()]
    if digits:
        data[draw.choice(digits)] = ord(draw.choice("0123456789"))


DAMAGE: dict[str, Callable[[random.Random, bytearray], None]] = {
    function.__name__: function for function in (flip, overwrite, truncate, extend, remove, swap, digit)
}


def damage_drill(count: int, seed: int = 0) -> Counter[str]:
    """Damage ``count`` files, load them; returns what was found. ``failure`` is what must not be."""
    draw, found = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        originals = []
        for kind in KINDS:
            cache = small_cache(kind)
            cache.save(path)
            originals.append((path.read_bytes(), contents(cache)))
        for number in range(count):
            whole, right = originals[number % 2]
            data, name = bytearray(whole), draw.choice(list(DAMAGE))
            DAMAGE[name](draw, data)
            path.write_bytes(data)
            try:
                loaded = PagedInt8Cache.load(path, CONFIG, backend="reference")
            except CacheFileError as error:
                found[f"{name}: refused" if str(path) in str(error) else "failure: a sentence without the file"] += 1
            except Exception as error:
                found[f"failure: {name} raises {type(error).__name__}: {error}"] += 1
            else:
                same = contents(loaded) == right
                found[f"{name}: {'equal' if same else 'failure: other contents'}"] += 1
    return found


# -- forgery -----------------------------------------------------------------------------------------------------------


def _leaves(value: Any, place: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [leaf for key, x in items for leaf in _leaves(x, (*place, key))]
    return below or [place]


def _forged(whole: bytes, draw: random.Random) -> tuple[bytes, str]:
    """The file with another value in its header, right checksums, and the name of the value."""
    length = int.from_bytes(whole[:8], "little")
    entries = json.loads(whole[8 : 8 + length])
    header = json.loads(entries["__metadata__"][ENTRY])
    *path, last = place = draw.choice(_leaves({key: value for key, value in header.items() if key != "model"}))
    inner = header
    for key in path:
        inner = inner[key]
    old = inner[last]
    others: list[Any] = [None, True, "full_attention", "float16", -1, 0, 1, 2, 3, 17, 40, 48, 4096, [], {}, 0.5]
    inner[last] = draw.choice([x for x in others if x != old or type(x) is not type(old)])
    entries["__metadata__"][ENTRY] = json.dumps(header)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    return text + whole[8 + length : -4] + zlib.crc32(text).to_bytes(4, "little"), ".".join(map(str, place))


def forgery_drill(count: int, seed: int = 0) -> Counter[str]:
    """Forge ``count`` headers; returns what was found."""
    draw, found = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        originals = []
        for kind in KINDS:
            small_cache(kind).save(path)
            originals.append(path.read_bytes())
        for number in range(count):
            data, where = _forged(originals[number % 2], draw)
            path.write_bytes(data)
            try:
                cache = PagedInt8Cache.load(path, CONFIG, backend="reference")
            except (CacheFileError, CacheFullError):
                found["refused"] += 1
                continue
            except Exception as error:
                found[f"failure: {where} raises {type(error).__name__}: {error}"] += 1
                continue
            found[_use(cache, where)] += 1
    return found


def _use(cache: PagedInt8Cache, where: str) -> str:
    try:
        contents(cache)
        batch = cache._batch or 2
        for layer in range(LAYERS):
            cache.update(rows(layer, batch, 1)[:, :HEADS], rows(layer, batch, 1)[:, :HEADS], layer)
        cache.reset()
    except (ValueError, CacheFullError):
        return "a cache that refuses the next step with a sentence"
    except Exception as error:
        return f"failure: {where} makes a cache that raises {type(error).__name__}: {error}"
    return "a cache that can be used"


def main() -> int:
    """Command line; the exit status says whether anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="processes to kill")
    parser.add_argument("--damaged", type=int, default=10_000, help="files to damage")
    parser.add_argument("--forged", type=int, default=2_000, help="headers to forge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help=f"write the counts there (such as {RESULT.relative_to(ROOT)})")
    options = parser.parse_args()
    drills = {
        "kills": kill_drill(options.kills, options.seed),
        "damaged": damage_drill(options.damaged, options.seed),
        "forged": forgery_drill(options.forged, options.seed),
    }
    failed = 0
    for name, found in drills.items():
        for what, count in sorted(found.items()):
            print(f"{name:8} {count:7} {what}")
            failed += count * ("failure" in what or "lost" in what or "left behind" in what)
    if options.json is not None:
        options.json.write_text(
            json.dumps({name: dict(sorted(x.items())) for name, x in drills.items()} | {"failures": failed}, indent=1)
            + "\n"
        )
    print(f"{failed} failures")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
