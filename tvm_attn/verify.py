"""`tvm-attn verify`: compare an artifact's compiled functions with PyTorch on this machine."""

from __future__ import annotations

import argparse
import json
import sys

from tvm_attn.cli import Parser, existing_folder, open_artifact, print_report, progress, run


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _verify(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tvm-attn verify",
        description="Compare an artifact's compiled functions with PyTorch in float32 on the artifact's weights.",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=existing_folder, help="folder that tvm-attn build wrote")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0 or vulkan:0; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _verify(args: argparse.Namespace) -> int:
    open_artifact(args.artifact, args.device)

    from tvm_attn.model.reference import require_torch

    require_torch()
    with progress(quiet=args.json) as show:
        from tvm_attn.compiler.verification import verify_artifact

        report = verify_artifact(args.artifact, args.device, show)
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        print_report(report, f"{args.artifact} against PyTorch")
    report.raise_if_failed(args.artifact)
    return 0


if __name__ == "__main__":
    sys.exit(main())
