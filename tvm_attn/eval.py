"""`tvm-attn eval`: how well a compiled model predicts a text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter

from tvm_attn.cli import Parser, existing_folder, integer, open_artifact, progress, run
from tvm_attn.errors import GenerationError, TokenizerError, UsageError, shorten


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _eval(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tvm-attn eval",
        description="Perplexity and bits per byte of a text, read in windows that overlap.",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=existing_folder, help="folder that tvm-attn build wrote")
    parser.add_argument("--text", required=True, metavar="FILE", help="a text in UTF-8; '-' reads stdin")
    parser.add_argument(
        "--context", type=integer(2), metavar="N", help="tokens of a window; default: the model's context"
    )
    parser.add_argument(
        "--stride",
        type=integer(1),
        metavar="N",
        help="tokens from the beginning of a window to the next; shorter is slower and gives each token more context; "
        "default: half a window",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0 or vulkan:0; default: %(default)s")
    parser.add_argument(
        "--threads", type=integer(1, 4096), metavar="N", help="CPU threads; default: all cores that the process may use"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _eval(args: argparse.Namespace) -> int:
    artifact = open_artifact(args.artifact, args.device)
    if artifact.tokenizer_json() is None:
        raise TokenizerError(f"artifact {args.artifact} has no tokenizer; build it from a checkpoint that has one")
    from tvm_attn.runtime.scoring import checked_windows

    context, stride = checked_windows(artifact.config.n_positions, args.context, args.stride)
    name, text = _read(args.text)

    import tvm_attn
    from tvm_attn.runtime.tvm_import import runtime_only

    with runtime_only(), progress() as show:
        show(f"loading {args.artifact}")
        model = tvm_attn.load(args.artifact, device=args.device, threads=args.threads, draft=False)
        message = f"scoring {name}"
        show(message)
        begin = perf_counter()
        (score,) = model.score(
            text,
            context=context,
            stride=stride,
            progress=lambda done, total: show(message, done / total, f", {done} of {total} tokens"),
        )
        seconds = perf_counter() - begin
    if not score.tokens:
        raise GenerationError(
            f"{name} is one token, and nothing comes before it to predict it from; give a longer text"
        )
    if args.json:
        found = {
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "logprob": score.logprob,
            "scored_tokens": score.tokens,
            "tokens": len(score.token_ids),
            "bytes": score.bytes,
            "context": context,
            "stride": stride,
            "seconds": seconds,
            "device": model.device,
        }
        print(json.dumps(found))
        return 0
    print(f"perplexity {score.perplexity:.4f}, {score.bits_per_byte:.4f} bits per byte")
    print(
        f"{score.tokens} of {len(score.token_ids)} tokens scored, {score.bytes} bytes, windows of {context} tokens "
        f"every {stride}, in {seconds:.1f} s on {model.device}",
        file=sys.stderr,
    )
    return 0


def _read(file: str) -> tuple[str, str]:
    """The name of a file for messages, and its text."""
    name = "standard input" if file == "-" else shorten(file, 120)
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise GenerationError(f"{name} is not UTF-8 text (byte {error.start}); convert it first") from None
    if not text:
        raise GenerationError(f"{name} is empty; give a text of at least two tokens")
    return name, text


if __name__ == "__main__":
    sys.exit(main())
