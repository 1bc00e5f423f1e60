"""`python -m tvm_attn.list_kernels`: the kernels of a model on a target, and the schedule of each."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tvm_attn.cli import run, status

if TYPE_CHECKING:
    from tvm_attn.schedule.plan import Planned


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _list(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tvm_attn.list_kernels",
        description="List the kernels that a model needs on a target, and for each its schedule template, the "
        "template's decisions, and whether they come from a tuned record or are defaults.",
    )
    parser.add_argument("--target", required=True, help="cpu (this machine), or a name from targets/*.toml")
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
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _list(args: argparse.Namespace) -> int:
    from tvm_attn import targets

    target = targets.resolve(args.target)
    with status() as progress:
        progress("scheduling the kernels")
        from tvm_attn.compiler.plan import kernel_plan
        from tvm_attn.model.weights import open_config

        planned = kernel_plan(open_config(args.model), target, args.dtype, args.quant)
    if args.json:
        kernels = [entry.to_dict() for entry in planned]
        print(json.dumps({"target": target.name, "dtype": args.dtype, "quant": args.quant, "kernels": kernels}))
    else:
        _print(planned, f"{args.model} on {target.name}, {args.dtype}, quantization {args.quant}")
    return 0


def _print(planned: list[Planned], title: str) -> None:
    from tvm_attn.kernels.base import label

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("kernel")
    table.add_column("template", no_wrap=True)
    table.add_column("decisions")
    table.add_column("from", no_wrap=True)
    for entry in planned:
        table.add_row(
            label(entry.kernel),
            f"{entry.template.name} {entry.template.version}",
            ", ".join(f"{decision.name}={decision.value}" for decision in entry.decisions) or "-",
            ", ".join(dict.fromkeys(decision.source for decision in entry.decisions)) or "-",
        )
    # Off a terminal, rich assumes 80 columns and would cut the decisions.
    Console(width=None if sys.stdout.isatty() else 160).print(table, markup=False)


if __name__ == "__main__":
    sys.exit(main())
