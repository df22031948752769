"""The command ``hf-int8-paged``, also ``python -m hf_int8_paged``: demo, info, plan, serve and chat."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    from .demo import Comparison, Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 1 after an error that was printed."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-int8-paged", description="A paged INT8 KV cache for transformers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="demo|info|plan|serve|chat")

    demo = commands.add_parser("demo", help="generate with DynamicCache and with PagedInt8Cache, and compare")
    demo.add_argument("--model", help="a causal language model: name on the hub or folder (SmolLM2-135M-Instruct)")
    demo.add_argument("--prompt", help="text; default a passage of about 550 tokens and a question about it")
    demo.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="tokens to generate (64)")
    demo.add_argument("--device", help="such as cpu or cuda; default the accelerator if there is one")
    demo.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default float32 on the CPU, else bfloat16"
    )
    demo.add_argument("--json", action="store_true", help="print the result as JSON")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="versions, backends, and what is missing")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(run=_info)

    plan = commands.add_parser("plan", help="the longest context that fits into some memory, in 16 bit and in int8")
    plan.add_argument("model", help="name on the hub, or a folder or file with the config; no weights are read")
    plan.add_argument("--memory", required=True, help="for weights and cache, such as 24GiB")
    plan.add_argument("--batch", type=_positive, default=1, metavar="N", help="sequences (1)")
    plan.add_argument("--weights", help="bytes of the weights, such as 16GiB; default none")
    plan.add_argument("--json", action="store_true", help="print it as JSON")
    plan.add_argument("--picture", type=Path, metavar="FILE", help="draw the context over the memory")
    plan.set_defaults(run=_plan)

    _add_serve(commands)
    _add_chat(commands)
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser("serve", help="transformers' OpenAI-compatible server, with int8 continuous batching")
    _add_model(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    serve.add_argument(
        "--max-request-tokens", type=_positive, metavar="N", help="of a prompt and its answer (the model's context)"
    )
    engine = serve.add_argument_group("engine (transformers' ContinuousBatchingConfig)")
    engine.add_argument(
        "--num-blocks", type=_positive, metavar="N", help="blocks of page-size tokens; default by memory"
    )
    engine.add_argument("--page-size", type=_positive, metavar="N", help="tokens of a block, a multiple of 16 (256)")
    engine.add_argument("--max-batch-tokens", type=_positive, metavar="N", help="tokens of a step (8192)")
    engine.add_argument("--max-memory-percent", type=float, metavar="X", help="share of the free memory, 0 to 1")
    engine.add_argument("--scheduler-type", choices=("fifo", "prefill_first"), help="fifo")
    serve.set_defaults(run=_serve)


def _add_chat(commands: Any) -> None:
    chat = commands.add_parser("chat", help="a conversation, with a server or in this process")
    _add_model(chat)
    chat.add_argument("--url", help="of a server, such as http://127.0.0.1:8000/v1; default: in this process")
    chat.add_argument("--max-new-tokens", type=_positive, default=512, metavar="N", help="of an answer (%(default)s)")
    chat.set_defaults(run=_chat)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="name on the hub, or folder (SmolLM2-135M-Instruct)")
    parser.add_argument("--device", help="such as cpu or cuda; default the accelerator if there is one")
    parser.add_argument("--dtype", help="of the weights, such as bfloat16; default the checkpoint's")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _info(options: argparse.Namespace) -> int:
    from .info import as_text, collect

    info = collect()
    print(json.dumps(info, indent=2) if options.json else as_text(info))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from .plan import as_dict, picture, planned, print_plan

    try:
        plan = planned(options.model, options.memory, options.batch, options.weights)
        if options.json:
            print(json.dumps(as_dict(plan), indent=2))
        else:
            print_plan(plan, options.model)
        if options.picture is not None:
            picture(plan, options.model, options.picture)
    except ImportError as error:
        return _error(f"{error}; install what the command needs: pip install 'hf-int8-paged[demo,examples]'")
    except (OSError, ValueError, TypeError) as error:
        return _error(str(error).split("\n")[0])
    return 0


def _serve(options: argparse.Namespace) -> int:
    from .demo_model import DemoModelError, demo_model_folder
    from .serve import Server, ServerError, ServerOptions

    engine = ("num_blocks", "page_size", "max_batch_tokens", "max_memory_percent", "scheduler_type")
    try:
        model = options.model or str(demo_model_folder())
        server = Server(
            ServerOptions(
                model,
                options.host,
                options.port,
                options.device,
                options.dtype,
                options.max_request_tokens,
                {name: getattr(options, name) for name in engine},
            )
        )
    except (DemoModelError, ServerError, OSError, ValueError) as error:
        return _error(str(error))
    print(f"serving {model} at http://{options.host}:{server.port}/v1", file=sys.stderr)
    server.run()
    return 0


def _chat(options: argparse.Namespace) -> int:
    from .chat import ChatError, InProcess, OverHttp, converse

    try:
        if options.url:
            return converse(OverHttp(options.url, options.model, options.max_new_tokens))
        with InProcess(options.model, options.device, options.dtype, options.max_new_tokens) as partner:
            return converse(partner)
    except (ChatError, OSError, ValueError) as error:
        return _error(str(error))


def _demo(options: argparse.Namespace) -> int:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError as error:
        return _error(f"{error}; install what the demo needs: pip install 'hf-int8-paged[demo]'")
    from .demo import compare, default_prompt, load
    from .demo_model import DemoModelError

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    progress = Progress(*columns, console=Console(file=sys.stderr), transient=True)
    try:
        with progress:
            loading = progress.add_task("loading", total=None)
            on_step = lambda step: progress.update(loading, description=step)  # noqa: E731
            model, tokenizer = load(options.model, options.device, options.dtype, on_step)
            progress.remove_task(loading)
            count = options.max_new_tokens
            tasks = {name: progress.add_task(name, total=count) for name in ("DynamicCache", "PagedInt8Cache")}
            prompt = default_prompt() if options.prompt is None else options.prompt
            result = compare(model, tokenizer, prompt, count, lambda name: progress.advance(tasks[name]))
    except (DemoModelError, NotImplementedError, ValueError) as error:
        return _error(str(error))
    if options.json:
        print(json.dumps(result.as_dict(), indent=2))
    else:
        _print_comparison(result)
    return 0


def _error(message: str) -> int:
    print(f"hf-int8-paged: error: {message}", file=sys.stderr)
    return 1


def _print_comparison(result: Comparison) -> None:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from .demo import common_prefix

    dense, int8 = result.dynamic, result.int8
    console = Console()
    shared = dense.text[: common_prefix(dense.text, int8.text)]
    for run in (dense, int8):
        text = Text(shared).append(run.text[len(shared) :], style="yellow")
        console.print(Panel(text, title=f"{run.cache}, attention {run.attention}", title_align="left"))

    def row(name: str, cell, ratio: float | None) -> None:
        table.add_row(name, cell(dense), cell(int8), "" if ratio is None else f"{ratio:.1%}")

    def per_token(run: Run) -> str:
        return "-" if run.ms_per_token is None else f"{run.ms_per_token:.1f} ms"

    table = Table("", dense.cache, int8.cache, "int8 / dense")
    for column in table.columns[1:]:
        column.justify = "right"
    row("bytes of K and V in use", lambda run: decimal(run.bytes_in_use), result.bytes_ratio)
    row(
        "bytes of K and V allocated",
        lambda run: decimal(run.bytes_allocated),
        int8.bytes_allocated / dense.bytes_allocated,
    )
    times = dense.ms_per_token and int8.ms_per_token and int8.ms_per_token / dense.ms_per_token
    row("time per token (median)", per_token, times)
    row(
        "time to the first token",
        lambda run: f"{run.first_token_ms:.0f} ms",
        int8.first_token_ms / dense.first_token_ms,
    )
    console.print(table)
    threads = f", {result.torch_threads} threads" if result.device == "cpu" else ""
    console.print(
        f"{result.model}, {result.dtype} on {result.device}{threads}; int8 backend: {', '.join(int8.backends)}\n"
        f"{result.prompt_tokens} prompt tokens, {len(dense.tokens)} and {len(int8.tokens)} greedy tokens, "
        f"of which the first {result.agreement} agree",
        highlight=False,
        soft_wrap=True,
    )
    if "reference" in int8.backends:
        console.print("The reference backend is right but slow; `hf-int8-paged info` says what a faster one needs.")
