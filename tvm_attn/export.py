"""`tvm-attn export`: write GPT-2 as an ONNX file."""

from __future__ import annotations

import argparse
import json
import sys

from tvm_attn.cli import Parser, output_file, progress, run
from tvm_attn.storage import DTYPES


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _export(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tvm-attn export",
        description="Write GPT-2 as an ONNX file with past keys and values; needs the extra onnx.",
    )
    parser.add_argument(
        "model",
        metavar="ARTIFACT_OR_MODEL",
        help="folder that tvm-attn build wrote, or a model as for tvm-attn build: gpt2, a folder, a hub id, demo",
    )
    parser.add_argument(
        "--opset",
        type=int,
        choices=(18, 20, 23, 24),
        default=23,
        help="version of ONNX's operators; from 23 on with the operator Attention; default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of matrices, keys, values and logits; default: the artifact's, or float32 if it has none or is quantized",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=output_file,
        metavar="FILE.onnx",
        help="the file; more than 1.5 GB of weights go to FILE.onnx.data",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _export(args: argparse.Namespace) -> int:
    from tvm_attn.onnx import require_onnx

    require_onnx()
    from tvm_attn.onnx.export import export

    with progress(quiet=args.json) as show:
        written = export(args.model, args.out, opset=args.opset, dtype=args.dtype, progress=show)
    files = [str(file) for file in (written.file, written.data) if file]
    if args.json:
        found = {"files": files, "weights": written.source, "bytes": written.bytes}
        print(json.dumps(found | {"opset": written.opset, "dtype": written.dtype}))
        return 0
    print(f"wrote {' and '.join(files)} ({written.source}, {written.dtype}, opset {written.opset})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
