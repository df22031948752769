"""Seconds per generated token of llama.cpp over contexts of several lengths, its cache in f16 and in q8_0.

`eval/bench_peers.py` calls it in an environment that has llama-cpp-python, whose low-level functions it uses. Both
caches are read by flash attention, which q8_0 values need.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from _turns import WARMUP, Turn, parse, skip, take_turns, token_ids, versions, write

BATCH = 512


def decode(llama: Any, context: Any, ids: Sequence[int]) -> None:
    tokens = (llama.llama_token * len(ids))(*ids)  # a batch points at them
    status = llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(ids)))
    if status:
        raise RuntimeError(f"llama_decode of {len(ids)} tokens gave status {status}")
    llama.llama_synchronize(context)


def new_context(llama: Any, model: Any, tokens: int, threads: int, cache_type: int) -> Any:
    options = llama.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = tokens, BATCH, BATCH
    options.n_threads = options.n_threads_batch = threads
    options.type_k = options.type_v = cache_type
    options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
    return llama.llama_init_from_model(model, options)


def copy_sequence(llama: Any, source: Any, target: Any) -> None:
    size = llama.llama_state_seq_get_size(source, 0)
    state = (ctypes.c_uint8 * size)()
    if not llama.llama_state_seq_get_data(source, state, size, 0):
        raise RuntimeError("llama.cpp gave no state of a sequence")
    if not llama.llama_state_seq_set_data(target, state, size, 0):
        raise RuntimeError("llama.cpp did not take the state of a sequence")


def filled(llama: Any, make: Any, lengths: Sequence[int], room: int) -> dict[int, Any]:
    """A context for each length that holds so many tokens. Only the longest computes them; others get copies."""
    contexts = {length: make(length + room) for length in sorted(lengths)}
    *_, longest = contexts.values()
    ids = token_ids(max(lengths))
    done = 0
    for length, context in contexts.items():
        for start in range(done, length, BATCH):
            decode(llama, longest, ids[start : min(start + BATCH, length)])
        done = length
        if context is not longest:
            copy_sequence(llama, longest, context)
    return contexts


def turn(llama: Any, context: Any) -> float:
    start = time.perf_counter()
    decode(llama, context, [1000])
    return time.perf_counter() - start


def main() -> None:
    args = parse(__doc__)
    try:
        import llama_cpp as llama
    except ImportError as error:
        skip(args.json, f"llama.cpp was skipped, as llama-cpp-python cannot be imported: {error}.")
        return
    silent = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(args.gguf).encode(), llama.llama_model_default_params())
    turns: dict[tuple[str, int], Turn] = {}
    for name, cache_type in (("f16", llama.GGML_TYPE_F16), ("q8_0", llama.GGML_TYPE_Q8_0)):

        def make(tokens: int, cache_type: int = cache_type) -> Any:
            return new_context(llama, model, tokens, args.threads, cache_type)

        for length, context in filled(llama, make, args.contexts, WARMUP + args.rounds).items():
            turns[name, length] = partial(turn, llama, context)
    content = {
        "versions": versions(["llama-cpp-python"]),
        "settings": {"flash_attention": True, "build": llama.llama_print_system_info().decode().strip(" |")},
        "times": take_turns(turns, args.rounds),
    }
    write(args.json, content)


if __name__ == "__main__":
    main()
