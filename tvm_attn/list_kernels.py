"""`tvm-attn kernels`: the kernels of a model on a target, and the schedule of each."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from tvm_attn.cli import Parser, existing_folder, new_table, print_tables, progress, run

if TYPE_CHECKING:
    from tvm_attn.schedule.plan import Planned


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _list(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tvm-attn kernels",
        description="List the kernels that a model needs on a target, and for each its schedule template, the "
        "template's decisions, and whether they come from a record, of a related target perhaps, or are defaults.",
    )
    parser.add_argument("--target", required=True, help="cpu (this machine), the name of a target file, or FILE.toml")
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
    parser.add_argument("--kv", choices=("int8",), help="the KV cache's dtype; default: as --dtype says")
    parser.add_argument(
        "--records",
        type=existing_folder,
        metavar="FOLDER",
        help="use the tuned records there, TARGET/*.jsonl or *.jsonl, before all others",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _list(args: argparse.Namespace) -> int:
    # Names are checked first: the compiler takes seconds to import.
    from tvm_attn import targets
    from tvm_attn.model.layout import check_types
    from tvm_attn.runtime.tvm_import import require_compiler

    for target in targets.check_names(args.target):
        check_types(target, args.dtype, args.quant, args.kv)
    require_compiler()

    from tvm_attn.model.weights import open_config

    config, target = open_config(args.model), targets.resolve(args.target)
    check_types(target, args.dtype, args.quant, args.kv)
    with progress(quiet=True) as show:
        show("scheduling the kernels")
        from tvm_attn.compiler.plan import kernel_plan

        planned = kernel_plan(config, target, args.dtype, args.quant, args.records, args.kv)
    if args.json:
        kernels = [entry.to_dict() for entry in planned]
        print(
            json.dumps(
                {"target": target.name, "dtype": args.dtype, "quant": args.quant, "kv": args.kv, "kernels": kernels}
            )
        )
    else:
        _print(planned, f"{args.model} on {target.name}, {args.dtype}, quantization {args.quant}")
    return 0


def _print(planned: list[Planned], title: str) -> None:
    from tvm_attn.kernels.base import label

    table = new_table(title, ("kernel", "template", "decisions", "from"))
    for entry in planned:
        table.add_row(
            label(entry.kernel),
            f"{entry.template.name} {entry.template.version}",
            ", ".join(f"{decision.name}={decision.value}" for decision in entry.decisions) or "-",
            ", ".join(dict.fromkeys(decision.source for decision in entry.decisions)) or "-",
        )
    print_tables([table])


if __name__ == "__main__":
    sys.exit(main())
