"""`tvm-attn COMMAND ...`, also `python -m tvm_attn COMMAND ...`: the commands under one name."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

from tvm_attn.cli import run
from tvm_attn.errors import UsageError, shorten

COMMANDS = {
    "build": ("tvm_attn.build", "compile a checkpoint, check it against PyTorch, write an artifact"),
    "generate": ("tvm_attn.generate", "continue prompts with an artifact, streamed to the terminal"),
    "serve": ("tvm_attn.serve", "answer completions over HTTP, as OpenAI's API does"),
    "eval": ("tvm_attn.eval", "perplexity and bits per byte of a text"),
    "verify": ("tvm_attn.verify", "compare an artifact with PyTorch on this machine"),
    "export": ("tvm_attn.export", "write GPT-2 as an ONNX file"),
    "attend": ("tvm_attn.attend", "show what every head attends to: a page, picture or arrays"),
    "bench": ("tvm_attn.bench", "measure an artifact's speed against this machine's limits"),
    "tune": ("tvm_attn.tune", "search schedules on this machine, write tuned records"),
    "run-batch": ("tvm_attn.run_batch", "measure what tune --export wrote, without a compiler"),
    "kernels": ("tvm_attn.list_kernels", "list a model's kernels on a target, and the schedule of each"),
    "devices": ("tvm_attn.devices", "list this machine's devices, and what is missing for each target"),
}
"""Module and description of each command; the module's `main(argv)` runs it. Only that module is imported."""

_OPTIONS = {"-h, --help": "this page; tvm-attn COMMAND --help explains a command", "--version": "the version"}


def main(argv: list[str] | None = None) -> int:
    """Run `tvm-attn` with `argv` (default: the process's arguments) and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    if len(words) > 1 and words[0] == "help":
        words = [words[1], "--help"]
    if words and words[0] in COMMANDS:
        status: int = import_module(COMMANDS[words[0]][0]).main(words[1:])
        return status
    return run(lambda: _without_command(words))


def _without_command(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_page())
    elif words[0] == "--version":
        from tvm_attn import __version__

        print(f"tvm-attn {__version__}")
    else:
        what, known = ("option", ("--help", "--version")) if words[0].startswith("-") else ("command", tuple(COMMANDS))
        near = difflib.get_close_matches(words[0][:40], known, 1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UsageError(f"unknown {what} {shorten(words[0])}; {meant}")
    return 0


def help_page() -> str:
    """The text of `tvm-attn --help`."""
    groups = {"commands": {name: line for name, (_, line) in COMMANDS.items()}, "options": _OPTIONS}
    lines = ["usage: tvm-attn COMMAND ...", "", "GPT-2 compiled with Apache TVM for CPU, CUDA and Vulkan."]
    for heading, entries in groups.items():
        lines += ["", f"{heading}:", *(f"  {name:<12}{line}" for name, line in entries.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
