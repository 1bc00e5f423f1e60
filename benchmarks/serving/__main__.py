"""How `tvm-attn serve` does under load, on loopback.

    python -m benchmarks.serving dist/gpt2 --peer llamacpp --json load.json
    python -m benchmarks.serving dist/gpt2 --soak 60 --json soak.json

Without `--soak`: throughput, time to the first token and between tokens for several numbers of clients, in turns with
`Model.generate` on as many prompts and with another server; and how the time between tokens changes while long prompts
arrive. The clients run in this process, on the same cores. Every answer is compared with that of `generate`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import string
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np

import tvm_attn
from benchmarks.serving.load import Answer, Prompt, ask, new_body, new_client, percentiles, run_load
from benchmarks.serving.servers import ServerProcess, llama_server, our_server
from benchmarks.serving.soak import soak
from tvm_attn import cli
from tvm_attn.cli import Parser, existing_folder, integer, integers, new_table, output_file, print_tables, progress
from tvm_attn.errors import BenchmarkError
from tvm_attn.runtime.artifact import Artifact
from tvm_attn.runtime.decoding import GenerationStats
from tvm_attn.runtime.machine import thread_count
from tvm_attn.runtime.model import Model

_LONG_PROMPT = 900
_STREAMS = 8  # that go on while long prompts arrive
_LETTERS = string.ascii_letters
_SIMILAR = {"none": None, "int8": "q8_0", "int4": "q4_0"}


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return cli.run(lambda: _main(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.serving", description="Load tests of tvm-attn serve on loopback.")
    parser.add_argument("artifact", metavar="ARTIFACT", type=existing_folder, help="folder that tvm-attn build wrote")
    parser.add_argument("--peer", choices=["llamacpp"], help="another server to compare with, on the same weights")
    parser.add_argument(
        "--clients", type=integers(1), default=(1, 8, 32, 64), metavar="N,...", help="default: 1,8,32,64"
    )
    parser.add_argument("--prompt-tokens", type=integer(1), default=64, metavar="N", help="default: 64")
    parser.add_argument("--new-tokens", type=integer(2), default=64, metavar="N", help="default: 64")
    parser.add_argument("--rounds", type=integer(1), default=2, metavar="N", help="requests of each client; default: 2")
    parser.add_argument(
        "--repeats", type=integer(1), default=3, metavar="N", help="of everything, in turns; default: 3"
    )
    parser.add_argument(
        "--max-batch", type=integer(1, 4096), default=32, metavar="N", help="of our server; default: 32"
    )
    parser.add_argument("--threads", type=integer(1, 4096), metavar="N", help="CPU threads; default: all cores")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument(
        "--soak", type=integer(1), metavar="MINUTES", help="mixed load with clients that go away, instead"
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="of the prompts; default: 0")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all figures, after every part")
    return parser


def _main(args: argparse.Namespace) -> int:
    threads = thread_count(args.threads)
    artifact = Artifact(args.artifact)
    with ExitStack() as stack:
        show = stack.enter_context(progress())
        show(f"loading {args.artifact}")
        model = tvm_attn.load(args.artifact, args.device, threads=threads, max_batch=args.max_batch)
        show("starting the server")
        ours = stack.enter_context(
            our_server(
                args.artifact,
                max_batch=args.max_batch,
                queue=4 * max(args.clients),
                threads=threads,
                device=model.device,
            )
        )
        results: dict[str, Any] = {
            "artifact": args.artifact.name,
            "device": model.device,
            "threads": threads,
            "versions": {"tvm_attn": tvm_attn.__version__},
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "options": {name: value for name, value in vars(args).items() if name not in ("artifact", "json")},
        }

        def save() -> None:
            if args.json is not None:
                part = args.json.with_name(args.json.name + ".part")
                part.write_text(json.dumps(results, indent=1) + "\n")
                os.replace(part, args.json)

        if args.soak:
            if model.tokenizer is None:
                raise BenchmarkError("the soak compares texts, and the artifact has no tokenizer; use the demo model")
            report: dict[str, Any] = {}
            results["soak"] = report
            passed = soak(model, ours, args.soak * 60.0, args.seed, report, save, show)
            save()
            print(json.dumps({name: value for name, value in report.items() if name != "memory"}, indent=1))
            return 0 if passed else 1
        servers = [ours]
        if args.peer:
            show("writing the weights for llama.cpp")
            precision = _SIMILAR[artifact.quantization] or artifact.dtype
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tvm-attn-serving-")))
            servers.append(stack.enter_context(llama_server(artifact, precision, threads, scratch)))
            results["peer"] = {"name": servers[1].name, "precision": precision}
        _load(args, model, servers, results, save, show)
        results["long prompts"] = _long_prompts(args, model, ours, show)
        save()
    _print(results)
    return 0


def _prompts(model: Model, count: int, tokens: int, rng: np.random.Generator) -> list[Prompt]:
    """Prompts of random tokens: of the tokenizer, or of bytes that are letters if there is none (see `BYTES`)."""
    tokenizer, found = model.tokenizer, list[Prompt]()
    if tokenizer is None:
        return [
            Prompt(tuple(text.encode()), text)
            for text in ("".join(rng.choice(list(_LETTERS), tokens)) for _ in range(count))
        ]
    ends = set(model.config.eos_token_ids)
    legal = [i for i in range(tokenizer.vocab_size) if i not in ends and tokenizer.written(i).isalpha()]
    while len(found) < count:
        # Text of random tokens seldom has the same tokens again; it is cut to have as many.
        text = tokenizer.decode(rng.choice(legal, 2 * tokens).tolist())
        ids = tokenizer.encode(text)[:tokens]
        text = tokenizer.decode(ids)
        if tokenizer.encode(text) == ids and len(ids) == tokens:
            found.append(Prompt(tuple(ids), text))
    return found


def _load(
    args: argparse.Namespace, model: Model, servers: list[ServerProcess], results: dict[str, Any], save: Any, show: Any
) -> None:
    rng = np.random.default_rng(args.seed)
    results["load"] = runs = []
    # The first requests of a process are slower.
    for server in servers:
        run_load(server, 2, _prompts(model, 4, args.prompt_tokens, rng), args.new_tokens, lambda share: None)
    for repeat in range(args.repeats):
        for clients in args.clients:
            what = f"repeat {repeat + 1} of {args.repeats}, {clients} client{'' if clients == 1 else 's'}"
            prompts = _prompts(model, clients * args.rounds, args.prompt_tokens, rng)
            show(f"{what}: generate")
            begin = time.perf_counter()
            completions: list[Any] = []
            for first in range(0, len(prompts), clients):
                batch = [list(prompt.ids) for prompt in prompts[first : first + clients]]
                completions += model.generate(batch, max_new_tokens=args.new_tokens, stop_token_ids=())
            seconds = time.perf_counter() - begin
            run: dict[str, Any] = {"clients": clients, "generate": len(prompts) * args.new_tokens / seconds}
            for server in servers:
                say = partial(show, f"{what}: {server.name}")
                load, answers = run_load(server, clients, prompts, args.new_tokens, say)
                run[server.name] = asdict(load)
                if server is servers[0]:
                    pairs = zip(answers, completions, strict=True)
                    if wrong := sum(tuple(answer.token_ids) != known.token_ids for answer, known in pairs):
                        raise BenchmarkError(f"{wrong} of {len(answers)} answers are not those of generate")
            runs.append(run)
            save()


def _long_prompts(args: argparse.Namespace, model: Model, server: ServerProcess, show: Any) -> dict[str, Any]:
    """Time between the tokens of running streams, alone and while long prompts arrive."""
    context = model.config.n_positions
    length = min(_LONG_PROMPT, context - 8)
    rng = np.random.default_rng(args.seed + 1)
    short = min(16, context // 8)
    new_tokens = context - short
    chunk = model.engine.prefill_chunk

    async def measure(arrivals: int) -> tuple[list[float], list[tuple[float, float]]]:
        stats: list[tuple[float, float]] = []
        prompts = _prompts(model, _STREAMS, short, rng)
        longs = _prompts(model, arrivals, length, rng)
        async with new_client(server) as client:
            streams = [asyncio.create_task(ask(client, new_body(server, prompt, new_tokens))) for prompt in prompts]
            await asyncio.sleep(0.05)  # they have begun, and a small model has not ended them
            for prompt in longs:
                if any(stream.done() for stream in streams):
                    break
                answer = await ask(client, new_body(server, prompt, 1))
                stats.append((answer.start, answer.end))
                await asyncio.sleep(0.01)
            answers: list[Answer] = await asyncio.gather(*streams)
        spans = [(a, b) for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)]
        if arrivals:
            spans = [(a, b) for a, b in spans if any(a < end and b > start for start, end in stats)]
        return [b - a for a, b in spans], stats

    quiet, busy, waits = [], [], []
    for repeat in range(args.repeats):
        show(f"long prompts, repeat {repeat + 1} of {args.repeats}")
        quiet += asyncio.run(measure(0))[0]
        gaps, stats = asyncio.run(measure(20))
        busy += gaps
        waits += [end - start for start, end in stats]
    if not quiet or not busy:
        raise BenchmarkError("the streams had ended before a long prompt came; take a larger model")
    chunk_seconds = []
    for _ in range(5):
        # The last full chunk of such a prompt, which attends to all others: what comes before it is in a slot already.
        ids = list(_prompts(model, 1, max(length // chunk * chunk, min(chunk + 1, length)), rng)[0].ids)
        model.generate(ids[: max(len(ids) - chunk, 1)], max_new_tokens=1, stop_token_ids=())
        stats_of = GenerationStats()
        model.generate(ids, max_new_tokens=1, stop_token_ids=(), stats=stats_of)
        chunk_seconds.append(stats_of.prefill_seconds)
    return {
        "streams": _STREAMS,
        "prompt_tokens": length,
        "chunk_tokens": chunk,
        "chunk_seconds": statistics.median(chunk_seconds),
        "quiet": percentiles(quiet),
        "while_prompts_arrive": percentiles(busy),
        "prompt_seconds": percentiles(waits),
        "growth_p99_in_chunks": (percentiles(busy)["p99"] - percentiles(quiet)["p99"])
        / statistics.median(chunk_seconds),
    }


def _print(results: dict[str, Any]) -> None:
    runs = results["load"]
    names = [name for name in runs[0] if name not in ("clients", "generate")]
    columns = ("clients", "tokens/s", "of generate", "first token p50", "p99", "between p50", "p99", "cores")
    table = new_table(f"{results['artifact']} on {results['device']}", ("server",), columns)
    for clients in dict.fromkeys(run["clients"] for run in runs):
        same = [run for run in runs if run["clients"] == clients]
        generate = statistics.median(run["generate"] for run in same)
        table.add_row("Model.generate", str(clients), f"{generate:.0f}", "", "", "", "", "", "")
        for name in names:
            ratio = statistics.median(run[name]["tokens_per_second"] / run["generate"] for run in same)
            # A server whose tokens make no text sends no events that could be timed.
            times = [
                f"{1e3 * _median(same, name, kind, p):.1f} ms" if all(run[name][kind] for run in same) else "-"
                for kind in ("first_token", "between_tokens")
                for p in ("p50", "p99")
            ]
            figures = [
                f"{_median(same, name, 'tokens_per_second'):.0f}",
                f"{ratio:.2f}",
                *times,
                f"{_median(same, name, 'server_cores'):.2f}",
            ]
            table.add_row(name, str(clients), *figures)
    print_tables([table])
    long = results["long prompts"]
    print(
        f"{long['streams']} streams, between tokens: p99 {1e3 * long['quiet']['p99']:.1f} ms, while prompts of "
        f"{long['prompt_tokens']} tokens arrive {1e3 * long['while_prompts_arrive']['p99']:.1f} ms; a chunk of "
        f"{long['chunk_tokens']} tokens takes {1e3 * long['chunk_seconds']:.1f} ms: "
        f"{long['growth_p99_in_chunks']:.2f} chunks more"
    )


def _median(runs: list[dict[str, Any]], *keys: str) -> float:
    """Of a figure that is found in every run under these keys."""
    values: list[Any] = [reduce(getitem, keys, run) for run in runs]
    return float(statistics.median(values))


if __name__ == "__main__":
    sys.exit(main())
