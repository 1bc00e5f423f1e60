"""Runs work in separate processes, so that a crash, a hang or a broken CUDA context affects nothing else.

A child prints one JSON object per line; what it has printed counts, however it ends.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Entry = dict[str, Any]


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


def run_child(
    command: Sequence[str], seconds: float, on_entry: Callable[[Entry], None] = lambda entry: None
) -> Outcome:
    """Runs a command until it ends or its time is up.

    Args:
        command: the program and its arguments.
        seconds: time limit, after which it is killed together with the processes that it started.
        on_entry: called with each entry as it arrives.
    """
    outcome, start = Outcome(), time.monotonic()
    with tempfile.TemporaryFile() as log:
        # A new process group, so that its own children are killed with it.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
        )
        try:
            assert process.stdout is not None
            for line in _lines(process.stdout, start + seconds):
                entry = _parsed(line)
                if entry is not None:
                    outcome.entries.append(entry)
                    on_entry(entry)
            status = process.wait(timeout=max(0.1, start + seconds - time.monotonic()))
            if status:
                outcome.error = f"{_last_line(log)} ({_ending(status)})"
        except (TimeoutError, subprocess.TimeoutExpired):
            outcome.error = f"stopped after {seconds:.0f} s"
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


def _last_line(log: Any) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 8192))
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "no message"


def _ending(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()
