"""Runs work in separate processes, so that a crash, a hang or a broken CUDA context affects nothing else.

A child prints one JSON object per line; what it has printed counts, however it ends. If it fails, the last says why.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Entry = dict[str, Any]

_ERROR = "error that ended it"  # the key of a child's last entry
_LONGEST_ERROR, _LONGEST_LOG = 300, 1 << 20
# Python's "module.SomeError: why", our commands' "error: why", and what C++ prints before it aborts.
_NAMES_ERROR = re.compile(r"([\w.]*(Error|Exception)\b|error:|what\(\):|Fatal Python error)")


@dataclass
class Outcome:
    """How a child ended.

    Attributes:
        entries: what it printed, in order.
        seconds: how long it ran.
        error: why it failed, one line; None if it did not.
    """

    entries: list[Entry] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None


def emit(entry: Entry) -> None:
    """Passes an entry to the parent at once; called in a child."""
    print(json.dumps(entry), flush=True)


def emit_all(entries: Iterable[Entry]) -> None:
    """Emits entries; called in a child. If making them fails, its last entry is the error, and the process ends here.

    It ends without cleaning up: after a fault on a device every call of its driver fails, and to free a tensor then
    aborts the process, so that its exit says nothing of the cause.
    """
    try:
        for entry in entries:
            emit(entry)
    except BaseException as error:
        emit({_ERROR: " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_ERROR]})
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def run_child(
    command: Sequence[str],
    seconds: float,
    on_entry: Callable[[Entry], None] = lambda entry: None,
    outcome: Outcome | None = None,
) -> Outcome:
    """Runs a command until it ends or its time is up.

    Args:
        command: the program and its arguments.
        seconds: time limit, after which it is killed together with the processes that it started.
        on_entry: called with each entry as it arrives.
        outcome: is filled in while the command runs, and returned.
    """
    outcome, start = outcome or Outcome(), time.monotonic()
    with tempfile.TemporaryFile() as log:
        # A new process group, so that its own children are killed with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
        try:
            assert process.stdout is not None
            for line in _lines(process.stdout, start + seconds):
                entry = _parsed(line)
                if entry is not None and _ERROR in entry:
                    outcome.error = str(entry[_ERROR])
                elif entry is not None:
                    outcome.entries.append(entry)
                    on_entry(entry)
            status = process.wait(timeout=max(0.1, start + seconds - time.monotonic()))
            if status and outcome.error is None:
                outcome.error = f"{first_error(_end_of(log))} ({_ending(status)})"
        except (TimeoutError, subprocess.TimeoutExpired):
            outcome.error = outcome.error or f"stopped after {seconds:.0f} s"
        except BaseException:
            outcome.error = outcome.error or "interrupted"
            raise
        finally:
            _kill(process)
            outcome.seconds = time.monotonic() - start
    return outcome


def _lines(stream: Any, deadline: float) -> Iterator[bytes]:
    """Lines of a pipe until it is closed.

    Raises:
        TimeoutError: the deadline has passed.
    """
    selector = selectors.DefaultSelector()
    selector.register(stream, selectors.EVENT_READ)
    pending = b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not selector.select(left):
            raise TimeoutError
        chunk = os.read(stream.fileno(), 1 << 16)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        yield from lines


def _parsed(line: bytes) -> Entry | None:
    """The entry of a line; libraries print other things as well."""
    try:
        entry = json.loads(line)
    except ValueError:
        sys.stderr.write(line.decode(errors="replace") + "\n")
        return None
    return entry if isinstance(entry, dict) else None


def first_error(log: str) -> str:
    """The first line that names an error, else the last one: what follows an error are often others that it caused."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = (line for line in lines if _NAMES_ERROR.match(line))
    return next(named, lines[-1] if lines else "no message")[:_LONGEST_ERROR]


def _end_of(log: Any) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - _LONGEST_LOG))
    return str(log.read().decode(errors="replace"))


def _ending(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()
