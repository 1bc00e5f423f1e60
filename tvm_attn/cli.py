"""What all commands share: how they end, read arguments, show progress and print results.

| outcome | exit status | output |
|---|---|---|
| done | what the command returns | - |
| TvmAttnError, including wrong arguments | 2 | `error: ...`, one line on stderr |
| Ctrl-C | 130, 128 + SIGINT as in a shell | - |
| the reader of stdout has gone | 141, 128 + SIGPIPE as in a shell | - |

Every other exception is a bug and keeps its traceback. Nothing here imports TVM, NumPy or rich before it is needed, so
that a mistake in the arguments is answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import io
import itertools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, Protocol

from tvm_attn.errors import TvmAttnError, UsageError, shorten

if TYPE_CHECKING:
    from rich.table import Table

    from tvm_attn.compiler.verification import Report
    from tvm_attn.runtime.artifact import Artifact

_LONGEST_ERROR = 1000


# --- how a command ends ---


def run(command: Callable[[], int]) -> int:
    """Call `command` and return the exit status of the process, as in the table above."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character gets "?", not a traceback
    try:
        status = _run(command)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits; discard that instead of failing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def _run(command: Callable[[], int]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return command()
    except TvmAttnError as error:
        print("error:", _shortened(" ".join(str(error).split()), _LONGEST_ERROR), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)  # so that the shell's prompt starts a line of its own
        return 130


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print("warning:", _shortened(" ".join(str(message).split()), _LONGEST_ERROR), file=sys.stderr)


def _shortened(text: str, length: int) -> str:
    """The text without its middle if it is too long: arguments and files may hold anything."""
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


# --- arguments ---


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `UsageError`: one line, like every other error of a command."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, which would call `--traget cpu` a missing `--target`."""
        words = sys.argv[1:] if args is None else list(args)
        known = list(self._option_string_actions)
        for word in itertools.takewhile(lambda word: word != "--", words):
            name = word.split("=")[0]
            # argparse takes the beginning of an option for the option, and words with a space for values
            if word.startswith("--") and " " not in word and not any(option.startswith(name) for option in known):
                near = difflib.get_close_matches(name[:40], known, 1)
                meant = f" (did you mean {near[0]}?)" if near else ""
                self.error(f"unknown option {shorten(name)}{meant}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{_shortened(message, 400)}; see {self.prog} --help")


def integer(least: int | None = 1, most: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from `least` to `most`; None means that the bound is checked elsewhere."""

    def read(text: str) -> int:
        number = _number(text, int)
        if least is not None and number < least:
            raise argparse.ArgumentTypeError(f"{shorten(text)} must be at least {least}")
        if most is not None and number > most:
            raise argparse.ArgumentTypeError(f"{shorten(text)} must be at most {most}")
        return number

    return read


def integers(least: int = 1) -> Callable[[str], tuple[int, ...]]:
    """A reader of whole numbers of at least `least`, separated by commas; empty text gives none."""
    each = integer(least)
    return lambda text: tuple(dict.fromkeys(each(part.strip()) for part in text.split(","))) if text.strip() else ()


def real(text: str) -> float:
    """Reads an argument that is a number."""
    return _number(text, float)


def _number(text: str, kind: Callable[[str], float]) -> int:
    try:
        return kind(text)  # type: ignore[return-value]
    except ValueError:  # also more digits than Python reads
        what = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not a {what}") from None


def names(text: str) -> tuple[str, ...]:
    """Reads names separated by commas."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise argparse.ArgumentTypeError(f"{shorten(text)} names nothing")
    return found


def output_file(text: str) -> Path:
    """Reads the name of a file that is written at the end; refuses one that could not be written."""
    path = Path(text)
    problem = None
    if not text:
        problem = "the file's name is empty"
    elif error := _name_error(path):
        problem = f"{shorten(text, 120)} cannot be written ({error})"
    elif os.path.isdir(path):
        problem = f"{shorten(text, 120)} is a folder"
    elif path.exists() and not path.is_file():  # a device or a pipe, which is written in place
        if not os.access(path, os.W_OK):
            problem = f"{shorten(text, 120)} cannot be written to"
    elif not os.path.isdir(path.parent):
        problem = f"no such folder: {shorten(str(path.parent), 120)}"
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        problem = f"the folder {shorten(str(path.parent), 120)} cannot be written to"
    if problem:
        raise argparse.ArgumentTypeError(f"{problem}; name another file")
    return path


@contextmanager
def writing(path: Path, error: type[TvmAttnError]) -> Iterator[BinaryIO]:
    """An `output_file` to write: under a temporary name, which becomes its own at the end of the block.

    A link's target is written, and the link stays. What is not a regular file, such as /dev/null or a pipe, is written
    in place: renaming would replace the device.

    Raises `error` if it cannot be written; then, and after any other exception, the old file is still there.
    """
    try:
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                yield file
            return
        path = Path(os.path.realpath(path))
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:100]}-", delete=False) as temporary:
            try:
                yield temporary  # type: ignore[misc]
                temporary.flush()
                os.chmod(temporary.name, 0o644)
                os.replace(temporary.name, path)
            except BaseException:
                os.unlink(temporary.name)
                raise
    except BrokenPipeError:
        raise
    except OSError as failure:
        raise error(f"{path} cannot be written ({failure.strerror}); name another file") from failure


def _name_error(path: Path) -> str | None:
    """Why no file can have this name, e.g. because it is too long; None if one can."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):  # the folder is checked on its own
        return None
    except OSError as error:
        return error.strerror
    except ValueError as error:  # a NUL
        return str(error)
    return None


def output_folder(text: str) -> str:
    """Reads the name of a folder that is created when needed; refuses one that could not be created."""
    if not text:
        raise argparse.ArgumentTypeError("the folder's name is empty")
    above = Path(os.path.abspath(text))
    try:
        if above.exists() and not above.is_dir():
            raise argparse.ArgumentTypeError(f"{shorten(text, 120)} is a file; name a folder")
        while not above.exists():
            above = above.parent
    except OSError as error:  # a name that is too long, or a folder that may not be searched
        raise argparse.ArgumentTypeError(
            f"{shorten(text, 120)} cannot be used ({error.strerror}); name another"
        ) from None
    if not above.is_dir():
        raise argparse.ArgumentTypeError(f"{shorten(str(above), 120)} is a file; name a folder elsewhere")
    if not os.access(above, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"the folder {shorten(str(above), 120)} cannot be written to; name another")
    return text


def existing_folder(text: str) -> Path:
    """Reads the name of a folder; `open_artifact` checks the folder itself."""
    if not text:
        raise argparse.ArgumentTypeError("the folder's name is empty")
    return Path(text)


def open_artifact(folder: Path, device: str) -> Artifact:
    """The artifact in a folder; checks, without TVM, that it has a library for the device.

    Raises:
        ArtifactError: there is no artifact, or it has no library for the device that runs on this machine.
        DeviceError: the device's name is unknown.
    """
    from tvm_attn.runtime.artifact import Artifact
    from tvm_attn.runtime.device import parse_device

    chosen = parse_device(device)
    artifact = Artifact(folder)
    if chosen:
        artifact.library(chosen[0])
    return artifact


# --- progress and results ---


class Show(Protocol):
    """Tells the user what happens next."""

    def __call__(self, message: str, share: float | None = None, detail: str = "") -> None:
        """
        Args:
            message: a few words.
            share: how much is done, 0 to 1; None if unknown.
            detail: figures that change during the step.
        """


@contextmanager
def progress(quiet: bool = False) -> Iterator[Show]:
    """Shows what happens next: a bar with the elapsed time if stderr is a terminal, else a line per step.

    Args:
        quiet: print no lines, because another program reads the result or the step is short.
    """
    if not sys.stderr.isatty():
        said: set[str] = set()

        def say(message: str, share: float | None = None, detail: str = "") -> None:
            if not quiet and message not in said:
                said.add(message)
                print(message, file=sys.stderr, flush=True)

        yield say
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def draw(message: str, share: float | None = None, detail: str = "") -> None:
            total = None if share is None else 1.0
            bar.update(task, description=message + detail, completed=share or 0.0, total=total)

        yield draw


def new_table(title: str, words: Iterable[str], numbers: Iterable[str] = ()) -> Table:
    """An empty table with columns of text, then columns of numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in words:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def print_tables(tables: Iterable[Table]) -> None:
    """Prints tables on stdout."""
    from rich.console import Console

    # Without a terminal, rich assumes 80 columns and would cut the cells.
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    for table in tables:
        console.print(table)


def print_report(report: Report, title: str) -> None:
    """Prints a verification report as a table on stdout."""
    table = new_table(title, ("function", "case"), ("max abs", "max abs / RMS", "NMSE", "top-1", ""))
    for check in report.checks:
        figures = [f"{check.max_abs:.1e}", f"{check.relative_max_abs:.1e}", f"{check.nmse:.1e}", f"{check.top1:.2%}"]
        table.add_row(check.function, check.case, *figures, "ok" if check.passed else "FAILED")
    print_tables([table])
    bounds = report.bounds
    print(
        f"bounds: NMSE {bounds.nmse:.0e}, max abs / RMS {bounds.max_abs:.0e}; "
        f"PyTorch's own float32 error against float64: NMSE {report.reference_nmse:.1e}"
    )
