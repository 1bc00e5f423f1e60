"""`tvm-attn bench`: how fast an artifact is, against the machine's limits."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from tvm_attn.cli import (
    Parser,
    existing_folder,
    integer,
    integers,
    open_artifact,
    output_file,
    print_tables,
    progress,
    run,
)
from tvm_attn.errors import BenchmarkError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from tvm_attn.benchmark.cases import Options
    from tvm_attn.benchmark.session import Benchmark, StartPeers


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _bench(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="tvm-attn bench", description="Measure an artifact's speed against this machine's limits.")
    add_arguments(parser)
    # This command used to have the option.
    parser.add_argument("--against", help=argparse.SUPPRESS)
    return parser


def _bench(args: argparse.Namespace) -> int:
    if args.against is not None:
        raise UsageError(
            "other runtimes are compared from a checkout of the sources: "
            f"python -m benchmarks.compare {args.artifact} --against {args.against}"
        )
    return measure(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `measure` takes."""
    parser.add_argument("artifact", metavar="ARTIFACT", type=existing_folder, help="folder that tvm-attn build wrote")
    parser.add_argument(
        "--prefill", type=integers(), metavar="T,...", help="prompt lengths; default: 1,16,128,512,1023 if they fit"
    )
    parser.add_argument(
        "--decode", type=integers(), metavar="C,...", help="context lengths; default: 1,128,512,1000 if they fit"
    )
    parser.add_argument(
        "--batch", type=integers(), default=(1, 8), metavar="B,...", help="sequences of a decode call; default: 1,8"
    )
    parser.add_argument(
        "--kernels", action="store_true", help="also time single kernels at the longest prompt and contexts"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda:0, or vulkan:0, whose limits are not measured; default: %(default)s"
    )
    parser.add_argument("--threads", type=integer(1, 4096), metavar="N", help="CPU threads; default: all cores")
    parser.add_argument(
        "--repeats",
        type=integer(1, 1000),
        default=3,
        metavar="N",
        help="rounds of each case, about 0.3 s each; default: %(default)s",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=lambda text: text if text == "-" else output_file(text),
        metavar="FILE",
        help="write every figure as JSON; without FILE, print it instead of tables",
    )
    parser.add_argument("--plot", type=output_file, metavar="FILE", help="draw tokens/s and the roofline as PNG")


def options(args: argparse.Namespace) -> Options:
    """What to measure, from the arguments that `add_arguments` adds."""
    from tvm_attn.benchmark.cases import Options

    return Options(
        artifact=args.artifact,
        prefill=args.prefill,
        decode=args.decode,
        batch=args.batch,
        threads=args.threads,
        rounds=args.repeats,
        kernels=args.kernels,
        device=args.device,
    )


def measure(
    args: argparse.Namespace,
    start_peers: StartPeers | None = None,
    more_tables: Callable[[Benchmark], Iterable[Table]] = lambda benchmark: (),
) -> int:
    """Measures, prints and writes what the arguments say; returns the exit status.

    Args:
        args: the parsed arguments that `add_arguments` adds.
        start_peers: starts the runtimes to compare with; see `tvm_attn.benchmark.session.run`.
        more_tables: gives tables to print after those of our own figures.
    """
    open_artifact(args.artifact, args.device)

    from tvm_attn.benchmark import cases

    cases.open_artifact(options(args))  # what does not fit is refused before TVM is imported
    if args.plot:
        import importlib.util

        if args.device != "cpu":
            raise BenchmarkError(f"--plot draws the limits of the processor, not of {args.device}; leave it out")
        if importlib.util.find_spec("matplotlib") is None:
            raise BenchmarkError("--plot needs matplotlib: pip install matplotlib (the extra plot)")

    from tvm_attn.benchmark import report, session

    with progress(quiet=args.json == "-") as show:
        benchmark = session.run(options(args), show, start_peers)
    if args.json == "-":
        print(json.dumps(report.to_dict(benchmark)))
    else:
        print_tables([*report.tables(benchmark), *more_tables(benchmark)])
        for reason in benchmark.skipped:
            print(f"left out: {reason}")
        if args.json:
            report.write_json(benchmark, args.json)
    if args.plot:
        from tvm_attn.benchmark import plot

        plot.write_plot(benchmark, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
