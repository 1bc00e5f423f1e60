"""`python -m tvm_attn.bench`: how fast a compiled model is, against the machine's limits and other runtimes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tvm_attn.cli import run
from tvm_attn.errors import BenchmarkError

if TYPE_CHECKING:
    from tvm_attn.benchmark.session import Benchmark


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _bench(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tvm_attn.bench",
        description="Measure a compiled model against this machine's limits and other runtimes on the same weights.",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help="folder that tvm_attn.build wrote")
    parser.add_argument(
        "--against",
        type=_names,
        default=(),
        metavar="NAMES",
        help="torch, onnxruntime, openvino, ctranslate2, llamacpp, separated by commas, each NAME or NAME:PRECISION "
        "(default: the artifact's dtype); on CUDA torch, torch-flash, torch-cudnn, torch-graph, torch-compile, "
        "transformers; those that are not installed are named and left out",
    )
    parser.add_argument(
        "--prefill", type=_numbers, metavar="T,...", help="prompt lengths; default: 1,16,128,512,1023 where they fit"
    )
    parser.add_argument(
        "--decode", type=_numbers, metavar="C,...", help="context lengths; default: 1,128,512,1000 where they fit"
    )
    parser.add_argument(
        "--batch", type=_numbers, default=(1, 8), metavar="B,...", help="sequences of a decode call; default: 1,8"
    )
    parser.add_argument(
        "--kernels", action="store_true", help="time single kernels at the longest prompt and contexts, too"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda:0, or vulkan:0, whose limits are not measured; default: %(default)s"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of every system; default: all cores")
    parser.add_argument(
        "--repeats",
        type=_positive,
        default=3,
        metavar="N",
        help="rounds of each case; in each, every system runs it for about 0.3 s in turn; default: %(default)s",
    )
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="the Python that has the peers installed"
    )
    parser.add_argument("--json", metavar="FILE", help="write every figure as JSON; - prints it instead of tables")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw tokens/s and the roofline as PNG")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(number) for number in text.split(",") if number.strip()))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be positive, not {number}")
    return number


def _bench(args: argparse.Namespace) -> int:
    from tvm_attn.benchmark import plot, report, session

    if args.plot:
        if args.device != "cpu":
            raise BenchmarkError(f"--plot draws the limits of the processor, not of {args.device}; leave it out")
        plot.check_available()
    options = session.Options(
        artifact=args.artifact,
        prefill=args.prefill,
        decode=args.decode,
        batch=args.batch,
        against=args.against,
        peer_python=args.peer_python,
        threads=args.threads,
        rounds=args.repeats,
        kernels=args.kernels,
        device=args.device,
    )
    with _progress() as progress:
        benchmark = session.run(options, progress)
    if args.json == "-":
        print(json.dumps(report.to_dict(benchmark)))
    else:
        _print(benchmark)
        if args.json:
            report.write_json(benchmark, Path(args.json))
    if args.plot:
        plot.write_plot(benchmark, args.plot)
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A function that shows what happens next and how much is done: a bar on a terminal's stderr, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda message, share: bar.update(task, description=message, completed=share)


def _print(benchmark: Benchmark) -> None:
    from tvm_attn.benchmark.report import tables

    # Off a terminal, rich assumes 80 columns and would cut the figures.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in tables(benchmark):
        console.print(table)
    for reason in benchmark.skipped:
        print(f"left out: {reason}")


if __name__ == "__main__":
    sys.exit(main())
