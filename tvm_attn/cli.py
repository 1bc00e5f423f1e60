"""What all commands share: how they end, and how they show progress and results.

| end | exit status | said |
|---|---|---|
| done | what the command returns | - |
| TvmAttnError | 2 | `error: ...`, one line on stderr |
| Ctrl-C | 130, 128 + SIGINT as in a shell | - |
| the reader of stdout is gone | 141, 128 + SIGPIPE as in a shell | - |

Every other exception is a bug and keeps its traceback.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tvm_attn.errors import TvmAttnError

if TYPE_CHECKING:
    from tvm_attn.compiler.verification import Report


def run(command: Callable[[], int]) -> int:
    """Call `command` and return the exit status of the process, as in the table above."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character gets "?", not a traceback
    try:
        status = _run(command)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits; let that go nowhere instead of fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def _run(command: Callable[[], int]) -> int:
    try:
        return command()
    except TvmAttnError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)  # so that the shell's prompt starts a line of its own
        return 130


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A function that shows what happens next: a spinner on a terminal's stderr, nothing elsewhere."""
    console = Console(stderr=True)
    with console.status("starting") as spinner:
        yield lambda message: spinner.update(message)


def print_report(report: "Report", title: str) -> None:
    """Prints a verification report as a table on stdout."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("function", "case"):
        table.add_column(heading)
    for heading in ("max abs", "max abs / RMS", "NMSE", "top-1", ""):
        table.add_column(heading, justify="right")
    for check in report.checks:
        figures = [f"{check.max_abs:.1e}", f"{check.relative_max_abs:.1e}", f"{check.nmse:.1e}", f"{check.top1:.2%}"]
        table.add_row(check.function, check.case, *figures, "ok" if check.passed else "FAILED")
    # Off a terminal, rich assumes 80 columns and would cut the cases.
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    bounds = report.bounds
    print(
        f"bounds: NMSE {bounds.nmse:.0e}, max abs / RMS {bounds.max_abs:.0e}; "
        f"PyTorch's own float32 error against float64: NMSE {report.reference_nmse:.1e}"
    )
