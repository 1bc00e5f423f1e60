"""`tvm-attn tune`: search the schedules' decisions on this machine, write tuned records."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tvm_attn.cli import Parser, Show, integer, names, new_table, output_folder, print_tables, progress, run

if TYPE_CHECKING:
    from tvm_attn.tuning.tuner import Progress, Tuned


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _tune(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tvm-attn tune",
        description="Search the decisions of the schedule templates on this machine, and write tuned records. "
        "Ctrl-C keeps what was found, and the same command continues from there.",
    )
    parser.add_argument("--target", required=True, help="cpu (this machine), a target that fits, or FILE.toml")
    parser.add_argument(
        "--model",
        default="gpt2",
        help="whose kernels: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a checkpoint's folder, a hub id, or demo; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s"
    )
    parser.add_argument("--quant", choices=("none", "int8", "int4"), default="none", help="default: %(default)s")
    parser.add_argument(
        "--trials",
        type=integer(1, 1_000_000),
        default=64,
        metavar="N",
        help="most candidates per kernel; default: %(default)s",
    )
    parser.add_argument(
        "--kernels", type=names, metavar="FAMILY,...", help="search only these kernel families, e.g. linear,head"
    )
    parser.add_argument(
        "--out",
        type=output_folder,
        metavar="FOLDER",
        help="write records there instead of this checkout's schedules/",
    )
    parser.add_argument(
        "--work",
        type=output_folder,
        metavar="FOLDER",
        help="keep measurements and logs there; default: ~/.cache/tvm-attn/tune/TARGET",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _tune(args: argparse.Namespace) -> int:
    from tvm_attn import targets
    from tvm_attn.model.layout import check_types
    from tvm_attn.runtime.tvm_import import require_compiler

    start = time.perf_counter()
    # Names and paths first: importing the compiler takes seconds.
    for target in targets.check_names(args.target):
        check_types(target, args.dtype, args.quant)
    require_compiler()

    from tvm_attn.model.weights import open_config

    config = open_config(args.model)

    from tvm_attn.tuning.tuner import tune

    with progress(quiet=args.json) as show:
        tuned = tune(
            config,
            args.target,
            args.dtype,
            args.quant,
            args.trials,
            args.kernels,
            args.out,
            args.work,
            lambda progress: _show(show, progress),
        )
    seconds = time.perf_counter() - start
    if args.json:
        result = asdict(tuned) | {"seconds": seconds}
        print(json.dumps(result, default=str))
    else:
        _print(tuned, seconds)
    return 130 if tuned.interrupted else 0


def _show(show: Show, progress: Progress) -> None:
    detail = "" if progress.best_us is None else f": best {progress.best_us:.4g} us"
    if progress.speedup is not None:
        detail += f", {progress.speedup:.2f} x the default's speed"
    share = progress.done / progress.total if progress.total else None
    show(progress.kernel, share, detail)


def _print(tuned: Tuned, seconds: float) -> None:
    numbers = ("us", "of peak", "x default", "measured", "failed")
    table = new_table(f"tuned for {tuned.target}", ("kernel", "decisions"), numbers)
    for found in tuned.found:
        record = found.record
        table.add_row(
            found.kernel,
            ", ".join(f"{name}={value}" for name, value in record.decisions.items()),
            f"{record.time_us:.4g}",
            "-" if record.fraction_of_peak is None else f"{record.fraction_of_peak:.0%}",
            "-" if found.speedup is None else f"{found.speedup:.2f}",
            str(found.measured),
            str(found.failed),
        )
    print_tables([table])
    for file in tuned.files:
        print(f"wrote {file}")
    if tuned.interrupted:
        print("interrupted; the same command continues from here")
    print(f"searched {len(tuned.found)} kernels in {seconds:.1f} s; measurements and logs are in {tuned.work}")


class _CallableModule(ModuleType):
    """`tvm_attn.tune` is both this module and the function of the Python interface: calling the module searches."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from tvm_attn.tuning.tuner import tune

        return tune(*args, **kwargs)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _CallableModule
