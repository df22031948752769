"""Which architectures of transformers work with `PagedInt8Cache`: every one of its causal-LM and seq2seq-LM mappings.

For each, a tiny random model generates with `DynamicCache`; then three other caches are fed the same tokens and the
logits of every step are compared:

* the fake-quantized oracle under eager attention: what quantization alone changes (the *effect*);
* ours under eager attention: the oracle's numbers in the same order, so equal to float32 rounding;
* ours under ``int8_paged``: within a part of the effect, as kernels round otherwise.

    python -m eval.coverage --markdown docs/coverage.md
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from eval._coverage_table import markdown, summary

#: Seconds that one architecture may take.
TIME_LIMIT = 600
MAPPINGS = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
#: Processes are forked off a server that has torch and transformers in memory already, where forking exists.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def architectures() -> list[tuple[str, str, str]]:
    """(mapping, architecture, model class) of all."""
    return [
        (mapping, architecture, class_name if isinstance(class_name, str) else class_name[0])
        for mapping, names in MAPPINGS.items()
        for architecture, class_name in names.items()
    ]


def _child(pipe: Connection, mapping: str, architecture: str, class_name: str) -> None:
    from eval._coverage_run import measure

    pipe.send(measure(mapping, architecture, class_name))


def run_one(mapping: str, architecture: str, class_name: str) -> dict[str, Any]:
    """Measure one architecture in a process of its own: a crash or a hang there is a result like any other."""
    context: Any = multiprocessing.get_context(_METHOD)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, mapping, architecture, class_name), daemon=True)
    process.start()
    theirs.close()
    result: dict[str, Any] = {"mapping": mapping, "architecture": architecture, "class": class_name}
    try:
        if ours.poll(TIME_LIMIT):
            return result | ours.recv()
        return result | {"status": "failed", "reason": f"took longer than {TIME_LIMIT} s"}
    except EOFError:
        process.join()
        return result | {"status": "failed", "reason": f"the process ended with code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def run(selected: list[tuple[str, str, str]], workers: int) -> list[dict[str, Any]]:
    """Results in the order of ``selected``."""
    if _METHOD == "forkserver":
        multiprocessing.get_context(_METHOD).set_forkserver_preload(["eval._coverage_run"])
    results = []
    with ThreadPoolExecutor(workers) as pool:
        for result in pool.map(lambda one: run_one(*one), selected):
            results.append(result)
            print(
                f"{result['mapping']:8}{result['architecture']:28}{result['status']:10}{result.get('reason', '')[:150]}"
            )
            sys.stdout.flush()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="architectures (default: all)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    args = parser.parse_args()
    known = {architecture for _, architecture, _ in architectures()}
    if unknown := set(args.names) - known:
        parser.error(f"transformers' mappings have no {', '.join(sorted(unknown))}")
    results = run([one for one in architectures() if not args.names or one[1] in args.names], args.workers)
    print(summary(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(results), encoding="utf-8")
    return int(any(result["status"] == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
