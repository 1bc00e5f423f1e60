"""`tvm-attn build`: compile a checkpoint, check it against PyTorch, write an artifact."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from tvm_attn.cli import Parser, existing_folder, output_folder, print_report, progress, run


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _build(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tvm-attn build",
        description="Compile GPT-2 with Apache TVM, check the result against PyTorch, and write an artifact.",
    )
    parser.add_argument(
        "--model",
        default="gpt2",
        help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, a checkpoint's folder, a hub id, an ONNX file of GPT-2 (the "
        "extra onnx), or demo; default: %(default)s",
    )
    parser.add_argument(
        "--target",
        required=True,
        help="cpu (this machine), cuda, vulkan, names of target files, or FILE.toml, separated by commas, e.g. "
        "cpu,cuda-sm90",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="storage of weights and KV cache; sums and softmax are float32; default: %(default)s",
    )
    parser.add_argument(
        "--quant",
        choices=("none", "int8", "int4"),
        default="none",
        help="store matrices as integers with a scale for every 32; default: %(default)s",
    )
    parser.add_argument(
        "--records",
        type=existing_folder,
        metavar="FOLDER",
        help="use the tuned records there, TARGET/*.jsonl or *.jsonl, before all others",
    )
    parser.add_argument(
        "--draft",
        choices=("int8", "int4"),
        help="add a copy of the weights with fewer bits that guesses tokens, which the model then checks several at a "
        "time: the same text, sooner; for processors",
    )
    parser.add_argument(
        "--kv",
        choices=("int8",),
        help="store the KV cache as integers with a scale for every head and token; default: as --dtype says",
    )
    parser.add_argument(
        "--out",
        type=output_folder,
        metavar="FOLDER",
        help="the artifact's folder; default: dist/MODEL, or dist/MODEL-random",
    )
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="use random weights instead of the model's own, to measure speed; the text means nothing",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare with PyTorch")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def _build(args: argparse.Namespace) -> int:
    from tvm_attn import targets
    from tvm_attn.model.layout import check_types
    from tvm_attn.runtime.tvm_import import require_compiler

    start = time.perf_counter()
    # Names and paths first: importing the compiler takes seconds.
    for target in targets.check_names(args.target):
        check_types(target, args.dtype, args.quant, args.kv)
    require_compiler()

    from tvm_attn.compiler.replacement import check_out
    from tvm_attn.model.weights import open_weights

    with progress(quiet=args.json) as show:
        weights = open_weights(args.model, args.random_weights, lambda hub_id: show(f"downloading {hub_id}"))
        check_out(Path(args.out) if args.out else Path("dist") / weights.name)
        early = () if args.json else weights.notes
        for note in early:
            _note(note)

        from tvm_attn.compiler.build import build

        verify = not args.no_verify
        options = {"verify": verify, "progress": show, "records": args.records, "draft": args.draft, "kv": args.kv}
        built = build(weights, args.target, args.dtype, args.quant, args.out, **options)
    seconds = time.perf_counter() - start
    if args.json:
        reports = {name: report and report.to_dict() for name, report in built.reports.items()}
        result = {"artifact": str(built.folder), "weights": built.source, "seconds": seconds, "notes": built.notes}
        sources = {name: asdict(found) for name, found in built.sources.items()}
        print(json.dumps(result | {"verification": reports, "schedules": sources}))
        return 0
    for name, report in built.reports.items():
        if report is not None:
            print_report(report, f"{name} against PyTorch")
    for note in built.notes[len(early) :]:
        _note(note)
    for name, found in built.sources.items():
        print(f"{name}: {found.summary()}")
    print(f"built {built.folder} ({built.source}, {args.dtype}) in {seconds:.1f} s")
    return 0


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


class _CallableModule(ModuleType):
    """`tvm_attn.build` is both this module and the function of the Python interface: calling the module builds."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from tvm_attn.compiler.build import build

        return build(*args, **kwargs)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _CallableModule
