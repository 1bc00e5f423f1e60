"""`tvm-attn tune`: search the schedules' decisions on this machine, write tuned records."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tvm_attn.cli import (
    Parser,
    existing_folder,
    integer,
    names,
    new_table,
    output_folder,
    print_tables,
    progress,
    real,
    run,
)
from tvm_attn.errors import UsageError

if TYPE_CHECKING:
    from tvm_attn.tuning.tuner import Progress, Task, Tuned

_EVERY_SECONDS = 10.0
"""Off a terminal, a line is printed so often."""


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _tune(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tvm-attn tune",
        description="Search the decisions of the schedule templates on this machine, and write tuned records, which "
        "builds use from then on. Ctrl-C loses nothing that was measured: the same command goes on from there.",
    )
    add = parser.add_argument
    add(
        "--target",
        default="auto",
        metavar="T",
        help="auto, cpu, cuda or vulkan: this machine's device, described in a new target file if there is none for "
        "it; or the name or file (.toml) of a target; default: %(default)s",
    )
    add(
        "--model",
        default="gpt2",
        help="whose kernels: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a checkpoint's folder, a hub id, or demo; "
        "default: %(default)s",
    )
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s")
    add("--quant", choices=("none", "int8", "int4"), default="none", help="default: %(default)s")
    add("--minutes", type=real, metavar="N", help="about how long to search; default: until nothing improves")
    add(
        "--trials",
        type=integer(1, 1_000_000),
        default=64,
        metavar="N",
        help="most candidates per kernel; default: %(default)s",
    )
    add("--kernels", type=names, metavar="FAMILY,...", help="search only these kernel families, e.g. linear,head")
    add("--out", type=output_folder, metavar="FOLDER", help="write records there instead of the user's data folder")
    add(
        "--work",
        type=output_folder,
        metavar="FOLDER",
        help="keep measurements there; default: ~/.cache/tvm-attn/tune/TARGET",
    )
    add("--force", action="store_true", help="write records although other programs used the machine")
    add("--no-whole-calls", action="store_true", help="keep records without comparing whole calls of the model")
    add("--report", type=output_folder, metavar="FOLDER", help="write JSON and pictures there; needs the extra plot")
    add("--dry-run", action="store_true", help="print what would be searched, and search nothing")
    add("--rpc", metavar="HOST:PORT", help="measure on devices of a tracker of TVM's RPC, in a trusted network only")
    add("--key", default="", help="with --rpc: the devices' key")
    add(
        "--export",
        type=output_folder,
        metavar="BATCH",
        help="write compiled candidates for tvm-attn run-batch elsewhere",
    )
    add("--import", type=Path, dest="import_", metavar="FILE", help="read the results of a batch, and write records")
    add("--list", action="store_true", help="print the targets that have tuned records")
    add("--compare", nargs=2, type=existing_folder, metavar=("A", "B"), help="print how two folders of records differ")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def _tune(args: argparse.Namespace) -> int:
    if args.list or args.compare:
        return _list(args) if args.list else _compare(args)
    if args.minutes is not None and not 0 < args.minutes < 1e6:
        raise UsageError(f"--minutes is {args.minutes:g}; give a positive number")
    if sum(map(bool, (args.rpc, args.export, args.import_))) > 1:
        raise UsageError("--rpc, --export and --import are different ways to measure elsewhere; give one of them")
    from tvm_attn import targets
    from tvm_attn.model.layout import check_types
    from tvm_attn.runtime.tvm_import import require_compiler

    start = time.perf_counter()
    # Names and paths first: importing the compiler takes seconds.
    if args.target not in ("auto", "cpu", "cuda", "vulkan"):
        check_types(targets.resolve(args.target), args.dtype, args.quant)
    require_compiler()

    from tvm_attn.model.weights import open_config

    config = open_config(args.model)

    from tvm_attn.tuning import tune as tuning
    from tvm_attn.tuning.tuner import Options

    options = Options(args.trials, args.minutes, args.force)
    with progress(quiet=args.json) as show:
        job = tuning.Job(config, args.target, args.dtype, args.quant, args.kernels, args.out, args.work, options)
        if args.dry_run:
            return _dry_run(job, args)
        if args.export:
            count = job.export(Path(args.export), show)
            return _say(args, {"batch": args.export, "candidates": count}, _EXPORTED.format(args.export, count))
        if args.import_:
            tuned = job.import_results(args.import_)
        else:
            lines = _Lines(show)
            place = job.remote(args.rpc, args.key) if args.rpc else None
            tuned = job.run(lines, show, place, whole_calls=not args.no_whole_calls and not args.rpc)
    if args.report:
        from tvm_attn.tuning.report import write_report

        write_report(tuned, Path(args.report))
    _print(tuned, time.perf_counter() - start, args)
    return 130 if tuned.interrupted else 0


_EXPORTED = (
    "wrote {0} with {1} candidates: copy it, run python {0}/run.py there, bring results.jsonl back, and run the same "
    "command with --import results.jsonl in the place of --export"
)


class _Lines:
    """Shows progress: in a bar on a terminal, elsewhere in a line every few seconds."""

    def __init__(self, show: Any) -> None:
        self._show, self._last, self._kernel = show, 0.0, ""

    def __call__(self, progress: Progress) -> None:
        detail = f", {progress.done} of {progress.total}"
        if progress.best_us is not None:
            detail += f": best {progress.best_us:.4g} us"
        if progress.speedup is not None:
            detail += f", {progress.speedup:.2f} x the default's speed"
        if progress.limit is not None:
            detail += f", {progress.limit:.0%} of the limit"
        if progress.seconds_left is not None:
            detail += f", about {max(1, round(progress.seconds_left / 60))} min left"
        share = progress.done / progress.total if progress.total else None
        now = time.monotonic()
        if sys.stderr.isatty():
            self._show(progress.kernel, share, detail)
        elif progress.kernel != self._kernel or now - self._last >= _EVERY_SECONDS:
            self._last, self._kernel = now, progress.kernel
            self._show(progress.kernel + detail)


def _say(args: argparse.Namespace, facts: dict[str, Any], line: str) -> int:
    print(json.dumps(facts) if args.json else line)
    return 0


def _dry_run(job: Any, args: argparse.Namespace) -> int:
    tasks: list[Task] = job.tasks
    rows = [
        {
            "kernel": task.name,
            "template": task.space.template.name,
            "share": task.share,
            "candidates": min(task.space.size, args.trials),
            "known": len(job.known(task)),
        }
        for task in tasks
    ]
    if args.json:
        print(json.dumps({"target": job.target.name, "kernels": rows}))
        return 0
    table = new_table(
        f"would be searched for {job.target.name}", ("kernel", "template"), ("share", "candidates", "measured")
    )
    for row in rows:
        table.add_row(row["kernel"], row["template"], f"{row['share']:.1%}", str(row["candidates"]), str(row["known"]))
    print_tables([table])
    print(
        f"{sum(row['candidates'] - row['known'] for row in rows)} candidates, about a second each for kernels of 124M"
    )
    return 0


def _list(args: argparse.Namespace) -> int:
    from tvm_attn._resources import data_dirs
    from tvm_attn.tuning.report import list_folders

    rows = list_folders(data_dirs("schedules"))
    if args.json:
        print(json.dumps({"targets": rows}))
        return 0
    table = new_table("tuned records", ("target", "from", "to", "folder"), ("records",))
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("target", "from", "to", "folder", "records")))
    print_tables([table])
    return 0


def _compare(args: argparse.Namespace) -> int:
    from tvm_attn.tuning.report import compare_folders

    rows = compare_folders(*args.compare)
    if args.json:
        print(json.dumps({"kernels": rows}))
        return 0
    table = new_table("records", ("kernel", "decisions"), ("A, us", "B, us", "A / B"))
    for row in rows:
        same = "same" if row["same"] else "differ"
        table.add_row(row["kernel"], same, f"{row['first_us']:.4g}", f"{row['second_us']:.4g}", f"{row['speedup']:.2f}")
    print_tables([table])
    return 0


def _print(tuned: Tuned, seconds: float, args: argparse.Namespace) -> None:
    from tvm_attn.tuning import report

    if args.json:
        print(json.dumps(report.to_dict(tuned) | {"seconds": seconds}))
        return
    numbers = ("us", "of peak", "x default", "x before", "measured", "failed")
    table = new_table(f"tuned for {tuned.target}", ("kernel", "decisions"), numbers)
    for found in tuned.found:
        record = found.record
        table.add_row(
            found.kernel,
            ", ".join(f"{name}={value}" for name, value in record.decisions.items()),
            f"{record.time_us:.4g}",
            "-" if record.fraction_of_peak is None else f"{record.fraction_of_peak:.0%}",
            "-" if found.speedup is None else f"{found.speedup:.2f}",
            "-" if found.gain is None else f"{found.gain:.2f}",
            str(found.measured),
            str(found.failed),
        )
    print_tables([table])
    if tuned.verdict is not None:
        calls = new_table("whole calls", ("call",), ("before, tokens/s", "after", "ratio", "+-"))
        for call in tuned.verdict.calls:
            ratio = (f"{call.ratio:.3f}", f"{call.error:.3f}")
            calls.add_row(call.case, f"{call.before:.4g}", f"{call.after:.4g}", *ratio)
        print_tables([calls])
        for record in tuned.verdict.withdrawn:
            print(f"withdrawn, because a whole call was slower with it: {record.template} {record.decisions}")
        print(report.sentence(tuned.verdict, args.model))
    for line in (*tuned.notes, *(f"not searched: {name}" for name in tuned.skipped)):
        print(line)
    for file in tuned.files:
        print(f"wrote {file}")
    if tuned.interrupted:
        print("interrupted; the same command continues from here")
    elif not tuned.files:
        print("no record was written: nothing is faster than what a build takes already")
    print(f"searched {len(tuned.found)} kernels in {seconds:.1f} s; measurements and logs are in {tuned.work}")


class _CallableModule(ModuleType):
    """`tvm_attn.tune` is both this module and the function of the Python interface: calling the module searches."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from tvm_attn.tuning.tune import tune

        return tune(*args, **kwargs)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _CallableModule
