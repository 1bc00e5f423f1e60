"""`tvm-attn generate`: continue prompts with a compiled model, streaming to the terminal.

Without a prompt on a terminal it is a loop: a line is a prompt. The prompts of a file go to `tvm_attn.prompt_file`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_attn.cli import Parser, existing_folder, integer, open_artifact, output_file, progress, real, run
from tvm_attn.errors import GenerationError, TokenizerError, TvmAttnError, UsageError, shorten

if TYPE_CHECKING:
    from tvm_attn.runtime.decoding import Completion, GenerationStats
    from tvm_attn.runtime.model import Model


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's arguments) and return its exit status."""
    return run(lambda: _generate(_parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tvm-attn generate",
        description="Continue prompts with a compiled model. Greedy, unless a sampling option is given. Without a "
        "prompt on a terminal, every line that is typed is one; elsewhere standard input is.",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=existing_folder, help="folder that tvm-attn build wrote")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue, unchanged; '-' reads stdin; several make a batch",
    )
    prompts.add_argument(
        "--prompt-ids",
        action="append",
        type=token_ids,
        metavar="1,2,3",
        help="a prompt as token ids; several make a batch",
    )
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='complete a file of JSON lines such as {"prompt": "Hello", "id": 7, "max_new_tokens": 20}, into --out; '
        "the same command goes on after an interruption",
    )
    parser.add_argument(
        "--out",
        type=output_file,
        metavar="FILE",
        help="results of --prompts, a line of JSON each, appended as they end",
    )
    parser.add_argument("--max-new-tokens", type=integer(None), metavar="N", help="default: 128")
    parser.add_argument("--min-new-tokens", type=integer(None), metavar="N", help="do not end at a token before that")
    parser.add_argument("-n", type=integer(None), metavar="N", help="completions of each prompt; default: 1")
    parser.add_argument("--temperature", type=real, metavar="F", help="divides the logits; 0 is greedy")
    parser.add_argument("--top-k", type=integer(None), metavar="K", help="sample from the K most likely tokens")
    parser.add_argument(
        "--top-p", type=real, metavar="P", help="sample from the likeliest tokens whose probabilities add up to P"
    )
    parser.add_argument(
        "--min-p", type=real, metavar="P", help="sample from tokens at least P times as likely as the likeliest"
    )
    parser.add_argument("--repetition-penalty", type=real, metavar="F", help="above 1 discourages tokens seen before")
    parser.add_argument(
        "--stop",
        action="append",
        type=_unescaped,
        metavar="TEXT",
        help=r"end before this text; \n, \t, \r and \\ in it are a newline, a tab, a carriage return and a backslash; "
        "may be given several times",
    )
    parser.add_argument(
        "--stop-token-id",
        action="append",
        type=integer(None),
        metavar="ID",
        help="end at this token instead of the model's end-of-text; may be given several times",
    )
    parser.add_argument(
        "--use-generation-config",
        action="store_true",
        help="sample as the checkpoint's generation_config.json says, unless other options differ",
    )
    parser.add_argument(
        "--speculate",
        choices=("auto", "draft", "prompt", "off"),
        help="how tokens are guessed, to compute several at once: by the artifact's draft, or by what followed the "
        "same words before; auto takes the draft if there is one; the text is the same with each; default: auto",
    )
    parser.add_argument("--seed", type=integer(None), metavar="S", help="repeat the same sampling")
    parser.add_argument(
        "--logprobs",
        type=integer(None),
        metavar="K",
        help="log-probabilities of the tokens, and of the K (0 to 20) most likely ones in their place; needs --json or "
        "--out",
    )
    parser.add_argument(
        "--prompt-logprobs", action="store_true", help="with --json or --out: those of the prompt's tokens too"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0 or vulkan:0; default: %(default)s")
    parser.add_argument(
        "--threads", type=integer(1, 4096), metavar="N", help="CPU threads; default: all cores that the process may use"
    )
    parser.add_argument(
        "--max-batch", type=integer(), metavar="N", default=8, help="sequences computed together; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object when done")
    return parser


def token_ids(text: str) -> list[int]:
    """Reads token ids separated by commas."""
    try:
        return [int(token_id) for token_id in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not a list of integers such as 1,2,3") from None


_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def _unescaped(text: str) -> str:
    return re.sub(r"\\[ntr\\]", lambda match: _ESCAPES[match[0]], text)


def _generate(args: argparse.Namespace) -> int:
    from tvm_attn.runtime.decoding import GenerationOptions, GenerationStats

    given: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "min_new_tokens": args.min_new_tokens,
        "n": args.n,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "stop": args.stop,
        "stop_token_ids": args.stop_token_id,
        "seed": args.seed,
        "logprobs": args.logprobs,
        "prompt_logprobs": args.prompt_logprobs or None,
        "speculate": args.speculate,
    }
    given = {name: value for name, value in given.items() if value is not None}
    options: dict[str, Any] = dataclasses.asdict(GenerationOptions(stop=[])) | given
    GenerationOptions(**options)  # refuse a wrong value before the model is loaded, which takes seconds
    if (args.prompts is None) != (args.out is None):
        raise UsageError("--prompts names the input and --out the output: one needs the other")
    if (args.logprobs is not None or args.prompt_logprobs) and not args.json and args.out is None:
        raise UsageError("log-probabilities are printed as JSON: add --json")
    artifact = open_artifact(args.artifact, args.device)
    if artifact.tokenizer_json() is None and args.prompts is None and not args.prompt_ids:
        raise TokenizerError(
            f"artifact {args.artifact} has no tokenizer: give token ids, as in --prompt-ids 1,2,3, or build it from a "
            "checkpoint that has one"
        )
    prompts = _prompts(args)

    import tvm_attn
    from tvm_attn.runtime.tvm_import import runtime_only

    # Generating needs TVM's runtime only, and that library loads faster than the one with the compiler.
    with runtime_only(), progress(quiet=True) as show:
        show(f"loading {args.artifact}")
        extra = {"draft": False} if args.speculate in ("prompt", "off") else {}
        model = tvm_attn.load(
            args.artifact, device=args.device, threads=args.threads, max_batch=args.max_batch, **extra
        )
    if args.use_generation_config:
        options |= model.generation_config | given
    if args.prompts is not None:
        return _complete_file(model, args, options, artifact.manifest["sha256"])
    if prompts is None:
        return _loop(model, options)
    options["stats"] = stats = GenerationStats()
    if len(prompts) * options["n"] == 1 and not args.json:
        _print_stream(model, prompts[0], options)
    else:
        with progress(quiet=True) as show:
            show("generating")
            completions = model.generate(prompts, **options)
        if args.json:
            print(json.dumps(_json_object(completions, stats)))
            return 0
        _print_batch(model, [prompt for prompt in prompts for _ in range(options["n"])], completions)
    sys.stdout.flush()
    print(
        _speed("prefill", stats.prompt_tokens, stats.prefill_seconds, stats.prefill_tokens_per_second), file=sys.stderr
    )
    print(f"first token: after {stats.first_token_seconds:.3f} s", file=sys.stderr)
    print(_speed("decode", stats.decode_tokens, stats.decode_seconds, stats.decode_tokens_per_second), file=sys.stderr)
    if stats.guessed_tokens:
        print(f"speculation: {stats.accepted_tokens} of {stats.guessed_tokens} guesses were right", file=sys.stderr)
    return 0


def _prompts(args: argparse.Namespace) -> list[Any] | None:
    """The prompts of the arguments or of standard input; None if they come from a file, or line by line."""
    if args.prompts is not None:
        return None
    if args.prompt_ids:
        ids: list[Any] = args.prompt_ids
        return ids
    if args.prompt:
        if args.prompt.count("-") > 1:
            raise UsageError("two prompts are '-', and standard input can be read once")
        return [read_stdin() if text == "-" else text for text in args.prompt]
    if not sys.stdin.isatty():
        if text := read_stdin():
            return [text]
        raise UsageError("there is no prompt, and standard input is empty; see tvm-attn generate --help")
    if args.json:
        raise UsageError("--json needs a prompt; see tvm-attn generate --help")
    return None


def _loop(model: Model, options: dict[str, Any]) -> int:
    """Reads prompts from the terminal, a line each, until it ends."""
    from tvm_attn.runtime.decoding import GenerationStats

    with suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines and knows the last ones)
    print("A line is a prompt. Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:  # drops the line, as in a shell
            print()
            continue
        if not prompt:
            continue
        stats = GenerationStats()
        try:
            if options["n"] == 1:
                _print_stream(model, prompt, options | {"stats": stats})
            else:
                _print_batch(model, [prompt] * options["n"], model.generate([prompt], **options, stats=stats))
        except KeyboardInterrupt:
            print()
        except TvmAttnError as error:
            print("error:", error, file=sys.stderr)
            continue
        sys.stdout.flush()
        print(
            _speed("decode", stats.decode_tokens, stats.decode_seconds, stats.decode_tokens_per_second), file=sys.stderr
        )


def _complete_file(model: Model, args: argparse.Namespace, options: dict[str, Any], identity: str) -> int:
    """Returns 1 if there are lines that cannot be completed."""
    from tvm_attn.prompt_file import complete_file

    try:
        with progress() as show:
            summary = complete_file(model, args.prompts, args.out, options, identity, show)
    except KeyboardInterrupt:
        print(f"\nstopped; {args.out} keeps its results, and the same command goes on", file=sys.stderr)
        raise
    if args.json:
        print(json.dumps(dataclasses.asdict(summary) | {"tokens_per_second": summary.tokens_per_second}))
    else:
        counts = f"{summary.done} completed, {summary.skipped} were there, {summary.failed} failed"
        speed = (
            f"{summary.completion_tokens} tokens in {summary.seconds:.1f} s, {summary.tokens_per_second:.1f} tokens/s"
        )
        print(f"{counts}; {speed}", file=sys.stderr)
    return 1 if summary.failed else 0


def read_stdin() -> str:
    """Standard input without its final newline, as a shell's $(...) reads it."""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise GenerationError(f"standard input is not UTF-8 text: {error}") from error


def _shown(model: Model, prompt: str | list[int]) -> str:
    """How a prompt is printed: as text if there is a tokenizer, else as ids."""
    if isinstance(prompt, str):
        return prompt
    return ",".join(map(str, prompt)) if model.tokenizer is None else model.tokenizer.decode(prompt)


def _print_stream(model: Model, prompt: str | list[int], options: dict[str, Any]) -> None:
    # Ask for the stream first: a prompt that it refuses should not be printed.
    pieces: Iterator[str]
    if model.tokenizer is None:
        pieces = (f",{token_id}" for token_id in model.stream_ids(prompt, **options))
    else:
        pieces = model.stream(prompt, **options)
    print(_shown(model, prompt), end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _print_batch(model: Model, prompts: list[Any], completions: list[Completion]) -> None:
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if index:
            print()
        text = completion.text
        if model.tokenizer is None:
            text = "".join(f",{token_id}" for token_id in completion.token_ids)
        print(_shown(model, prompt) + text)


def _speed(name: str, tokens: int, seconds: float, rate: float | None) -> str:
    line = f"{name}: {tokens} token{'' if tokens == 1 else 's'} in {seconds:.3f} s"
    return line if rate is None else f"{line}, {rate:.1f} tokens/s"


def completions_object(found: list[Completion]) -> dict[str, Any]:
    """One completion as an object of JSON; several are its "completions"."""
    objects = [
        {name: value for name, value in dataclasses.asdict(completion).items() if value is not None}
        for completion in found
    ]
    return objects[0] if len(objects) == 1 else {"completions": objects}


def _json_object(completions: list[Completion], stats: GenerationStats) -> dict[str, Any]:
    """One completion at the top level, several under "completions"; and the timings of the whole request."""
    timings = dataclasses.asdict(stats) | {
        "prefill_tokens_per_second": stats.prefill_tokens_per_second,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
    }
    return completions_object(completions) | {"timings": timings}


if __name__ == "__main__":
    sys.exit(main())
