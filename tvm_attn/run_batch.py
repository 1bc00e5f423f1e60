"""`tvm-attn run-batch`: measure the candidates that `tvm-attn tune --export` wrote, on a machine without a compiler."""

from __future__ import annotations

import argparse
import json
import sys

from tvm_attn import vulkan
from tvm_attn.cli import Parser, existing_folder, progress, run
from tvm_attn.runtime.tvm_import import import_tvm, runtime_only


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _run_batch(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tvm-attn run-batch",
        description="Measure the candidates that tvm-attn tune --export wrote. Needs Python, NumPy and TVM's runtime; "
        "the same command goes on after an interruption. tvm-attn tune --import reads the results.",
    )
    parser.add_argument(
        "batch", metavar="BATCH", type=existing_folder, help="the folder; results.jsonl is written into it"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _run_batch(args: argparse.Namespace) -> int:
    from tvm_attn.tuning import batch

    with runtime_only():
        import_tvm()
    vulkan.autoload()  # TVM finds it by itself only where this package is installed
    with progress(quiet=args.json) as show:
        measured, failed = batch.run_batch(args.batch, show)
    file = args.batch / batch.RESULTS
    if args.json:
        print(json.dumps({"measured": measured, "failed": failed, "results": str(file)}))
    else:
        print(f"measured {measured} candidates, {failed} failed; bring {file} back for tvm-attn tune --import")
    return 0


if __name__ == "__main__":
    sys.exit(main())
