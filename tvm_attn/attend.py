"""`tvm-attn attend`: what every head of a model attends to in a text, as a page, a picture or arrays."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_attn.cli import Parser, existing_folder, integer, integers, open_artifact, output_file, progress, run, writing
from tvm_attn.errors import TokenizerError, UsageError, shorten
from tvm_attn.generate import read_stdin, token_ids

if TYPE_CHECKING:
    from tvm_attn.attention_view import Weights
    from tvm_attn.cli import Show
    from tvm_attn.runtime.model import Model

_KINDS = (".html", ".png", ".npz")


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _attend(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tvm-attn attend",
        description="Show what every head of a model attends to in a text, and what the model would say after each "
        "layer (the logit lens).",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=existing_folder, help="folder that tvm-attn build wrote")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", metavar="TEXT", help="the text; '-' reads standard input")
    given.add_argument("--ids", type=token_ids, metavar="1,2,3", help="the text as token ids")
    parser.add_argument(
        "--out",
        required=True,
        type=_output,
        metavar="FILE",
        help="attention.html: a page that needs nothing else; .png: a picture (extra plot); .npz: arrays for NumPy",
    )
    parser.add_argument("--layers", type=integers(0), metavar="0,1", help="layers to show; default: all")
    parser.add_argument("--heads", type=integers(0), metavar="0,1", help="heads to show; default: all")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0 or vulkan:0; default: %(default)s")
    parser.add_argument(
        "--threads", type=integer(1, 4096), metavar="N", help="CPU threads; default: all cores that the process may use"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object that says what was written")
    return parser


def _output(text: str) -> Path:
    path = output_file(text)
    if path.suffix.lower() not in _KINDS:
        raise argparse.ArgumentTypeError(
            f"{shorten(text, 120)} must end in {', '.join(_KINDS)}, which says what to write"
        )
    return path


def _attend(args: argparse.Namespace) -> int:
    artifact = open_artifact(args.artifact, args.device)
    layers = _chosen("layer", args.layers, artifact.config.n_layer)
    heads = _chosen("head", args.heads, artifact.config.n_head)
    if args.text is not None and artifact.tokenizer_json() is None:
        raise TokenizerError(f"artifact {args.artifact} has no tokenizer: give token ids, as in --ids 1,2,3")
    kind = args.out.suffix.lower()
    if kind == ".png":
        _require_matplotlib()

    import tvm_attn
    from tvm_attn.attention_view import LENS_TOP, View, lens_texts, token_text, write_html, write_npz, write_png
    from tvm_attn.runtime.prompts import prompt_ids
    from tvm_attn.runtime.tvm_import import runtime_only

    text = read_stdin() if args.text == "-" else args.text
    with runtime_only(), progress(quiet=args.json) as show:
        show(f"loading {args.artifact}")
        model = tvm_attn.load(args.artifact, device=args.device, threads=args.threads, max_batch=1, draft=False)
        given = args.ids if text is None else text
        ids = prompt_ids("the text", given, model.config, model.tokenizer).tolist()
        lens: Any = [] if kind == ".png" else model.logit_lens(ids, top=LENS_TOP)
        view = View(
            title=shorten(ids if text is None else text, 60),
            token_ids=ids,
            tokens=[token_text(model.tokenizer, token_id) for token_id in ids],
            layers=layers,
            heads=heads,
            lens=lens,
            weights=_weights(model, ids, layers, heads, show),
        )
        with writing(args.out, UsageError) as file:
            if kind == ".html":
                write_html(view, lens_texts(model, lens), file)
            else:
                (write_npz if kind == ".npz" else write_png)(view, file)
    if args.json:
        print(json.dumps({"file": str(args.out), "layers": layers, "heads": heads, "token_ids": ids}))
    else:
        print(f"{args.out}: {len(layers)} x {len(heads)} heads, {len(ids)} tokens", file=sys.stderr)
    return 0


def _chosen(name: str, numbers: tuple[int, ...] | None, count: int) -> list[int]:
    if wrong := [number for number in numbers or () if number >= count]:
        raise UsageError(f"there is no {name} {wrong[0]}; the model has {name}s 0 to {count - 1}")
    return sorted(numbers) if numbers else list(range(count))


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError("pictures need matplotlib: pip install 'tvm-attn[plot]', or write .html or .npz")


def _weights(model: Model, ids: list[int], layers: list[int], heads: list[int], show: Show) -> Iterator[Weights]:
    for done, weights in enumerate(model.attention_layers(ids, layers, heads)):
        show("attention", done / len(layers))
        yield weights


if __name__ == "__main__":
    sys.exit(main())
