"""`tvm_attn.attention` beside PyTorch's scaled_dot_product_attention on this processor, taking turns.

    python -m benchmarks.attention
    python -m benchmarks.attention --dtype bfloat16 --queries 2048 --threads 1 --json

The limit is the rate of this processor's multiply-adds, measured in the same run; exponentials are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from tvm_attn.cli import Parser, integer, new_table, print_tables, progress, run


@dataclass(frozen=True)
class Figures:
    """A case's times.

    Attributes:
        case: the case's name.
        ours, torch: median seconds of a call.
        ratio: the median of PyTorch's time divided by ours, pair by pair: how many times faster this package is.
        lowest, highest: the quartiles of that.
        gflops: 10^9 operations per second of the two products, of ours.
        of_limit: the same as a share of the processor's float32 rate; None for other dtypes.
    """

    case: str
    ours: float
    torch: float
    ratio: float
    lowest: float
    highest: float
    gflops: float
    of_limit: float | None


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _main(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks.attention", description=__doc__.splitlines()[0])
    size = integer(1, 1 << 16)
    parser.add_argument("--heads", type=size, default=12, metavar="H", help="default: %(default)s")
    parser.add_argument("--queries", type=size, default=1024, metavar="N", help="default: %(default)s")
    parser.add_argument("--keys", type=size, default=512, metavar="S", help="of cross attention; default: %(default)s")
    parser.add_argument("--width", type=size, default=64, metavar="D", help="of a head; default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=integer(), metavar="N", help="default: all cores")
    parser.add_argument("--pairs", type=integer(3), default=30, metavar="N", help="turns of each; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _main(args: argparse.Namespace) -> int:
    import torch
    import tvm

    from tvm_attn import attention, targets
    from tvm_attn.benchmark.machine import describe_machine
    from tvm_attn.benchmark.probe import measure_limits
    from tvm_attn.runtime.machine import thread_count

    threads = thread_count(args.threads)
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)

    def random(length: int) -> torch.Tensor:
        values = torch.randn(1, args.heads, length, args.width, generator=generator)
        return values.to(getattr(torch, args.dtype))

    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v, past = random(args.queries), random(args.queries), random(args.queries), random(args.keys)
    hidden = torch.rand(args.queries, args.queries, generator=generator) < 0.2
    hidden.fill_diagonal_(False)
    bias = torch.randn(args.queries, args.queries, generator=generator).to(q.dtype)
    n, s, causal_pairs = args.queries, args.keys, args.queries * (args.queries + 1) // 2
    cases: dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor], int]] = {
        "causal": (
            lambda: attention(q, k, v, causal=True, threads=threads),
            lambda: sdpa(q, k, v, is_causal=True),
            causal_pairs,
        ),
        "not causal": (lambda: attention(q, k, v, threads=threads), lambda: sdpa(q, k, v), n * n),
        "cross": (lambda: attention(q, past, past, threads=threads), lambda: sdpa(q, past, past), n * s),
        "boolean mask": (
            lambda: attention(q, k, v, mask=~hidden, threads=threads),
            lambda: sdpa(q, k, v, attn_mask=~hidden),
            n * n,
        ),
        "added mask": (
            lambda: attention(q, k, v, mask=bias, threads=threads),
            lambda: sdpa(q, k, v, attn_mask=bias),
            n * n,
        ),
    }
    found = []
    with progress(quiet=args.json) as show:
        show("measuring the processor")
        limits = measure_limits(targets.detect_cpu(), threads)
        for name, (ours, theirs, pairs) in cases.items():
            show(f"{name}: {args.pairs} turns of each")
            flops = 4 * pairs * args.heads * args.width
            limit = limits.float32_gflops if args.dtype == "float32" else None
            found.append(_measure(name, ours, theirs, args.pairs, flops, limit))
    if args.json:
        facts = {
            "machine": describe_machine(threads),
            "load": os.getloadavg()[0],
            "versions": {"tvm": tvm.__version__, "torch": torch.__version__},
            "sizes": {name: getattr(args, name) for name in ("heads", "queries", "keys", "width", "dtype")},
            "float32_gflops": limits.float32_gflops,
            "cases": [asdict(entry) for entry in found],
        }
        print(json.dumps(facts))
        return 0
    _print(args, threads, limits.float32_gflops, found)
    return 0


def _measure(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], pairs: int, flops: int, limit: float | None
) -> Figures:
    """Both take turns, so that whatever else the machine does reaches both."""
    for call in (ours, theirs):
        call()
    times = [(_seconds(ours), _seconds(theirs)) for _ in range(pairs)]
    ratios = sorted(second / first for first, second in times)
    low, middle, high = statistics.quantiles(ratios, n=4)
    best, torch_best = (statistics.median(column) for column in zip(*times, strict=True))
    gflops = flops / best / 1e9
    return Figures(name, best, torch_best, middle, low, high, gflops, None if limit is None else gflops / limit)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _print(args: argparse.Namespace, threads: int, limit: float, found: list[Figures]) -> None:
    title = f"{args.heads} heads x {args.queries} x {args.width}, {args.dtype}, {threads} threads; medians"
    table = new_table(title, ("case",), ("ms", "PyTorch, ms", "times faster", "quartiles", "GFLOP/s", "of limit"))
    for entry in found:
        table.add_row(
            entry.case,
            f"{entry.ours * 1e3:.2f}",
            f"{entry.torch * 1e3:.2f}",
            f"{entry.ratio:.2f}",
            f"{entry.lowest:.2f} to {entry.highest:.2f}",
            f"{entry.gflops:.0f}",
            "-" if entry.of_limit is None else f"{entry.of_limit:.0%}",
        )
    print_tables([table])
    print(f"limit: {limit:.0f} GFLOP/s of float32 multiply-adds; load of the machine {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    sys.exit(main())
