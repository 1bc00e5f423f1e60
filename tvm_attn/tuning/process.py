"""Worker processes of a search, which answer requests, a line of JSON each. Standard library only.

A candidate that crashes, hangs or takes all memory ends its worker and nothing else. Workers have sessions of their
own, so that a terminal's Ctrl-C reaches only the search, and they end with the process that started them, however that
ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tvm_attn.errors import TuningError, one_line

PROCESSOR_SECONDS = 60
"""Processor time, of all threads together, after which a request ends its worker."""
HANG_SECONDS = 300.0
"""Elapsed time after which a worker is given up. On a busy machine it says nothing about a candidate."""
_MEMORY_SHARE = 0.8
_PR_SET_PDEATHSIG = 1
_PACKAGE = Path(__file__).resolve().parents[2]


class Worker:
    """A worker process.

    Args:
        module: the module that it runs, which calls `serve`, or the path of a script.
        arguments: its arguments.
        log: the file that gets what it and the libraries in it print.
        environment: variables in addition to those of this process.

    Attributes:
        busy: whether an answer is awaited.

    Raises:
        TuningError: the process cannot be started.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        path = os.pathsep.join(filter(None, [str(_PACKAGE), os.environ.get("PYTHONPATH", "")]))
        start = [module] if module.endswith(".py") else ["-m", module]
        try:
            with log.open("ab") as file:
                self._process = subprocess.Popen(
                    [sys.executable, *start, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    start_new_session=True,
                    # Not the modules of whatever folder is the current one; before Python 3.11 they come first.
                    env={**os.environ, **(environment or {}), "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
                )
        except OSError as error:
            raise TuningError(f"a worker process cannot be started: {one_line(error)}") from error
        self.busy = False
        self._deadline, self._paused, self._received = math.inf, 0.0, b""

    def send(self, request: Mapping[str, Any], seconds: float = HANG_SECONDS) -> None:
        """Sends a request, whose answer `wait` returns; the worker is killed if there is none after `seconds`."""
        assert self._process.stdin is not None
        self.busy, self._deadline = True, time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):  # `wait` notices that it has ended
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def pause(self) -> None:
        """Stops the process until `resume`."""
        if self.busy and not self._paused:
            os.kill(self._process.pid, signal.SIGSTOP)
            self._paused = time.monotonic()

    def resume(self) -> None:
        """Lets the process go on; the time in between does not count."""
        if self._paused:
            self._deadline += time.monotonic() - self._paused
            self._paused = 0.0
            os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends the process at once."""
        self.busy = False
        self._process.kill()  # also ends a process that is stopped
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]

    @property
    def descriptor(self) -> int:
        """The file descriptor of the answers."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def _take(self, readable: bool) -> dict[str, Any] | None:
        """The answer, if it is complete, or if there will be none."""
        if readable:
            part = os.read(self.descriptor, 1 << 16)
            self._received += part
            if not part:
                return self._died()
        if b"\n" in self._received:
            line, _, self._received = self._received.partition(b"\n")
            self.busy = False
            answer: dict[str, Any] = json.loads(line)
            return answer
        if not self._paused and time.monotonic() > self._deadline:
            self.close()
            return {"timeout": True, "died": True, "error": "no answer within the limit of time"}
        return None

    def _died(self) -> dict[str, Any]:
        status = self._process.wait()
        self.close()
        reasons = {
            -signal.SIGXCPU: f"took more than {PROCESSOR_SECONDS} s of processor time",
            -signal.SIGKILL: "was killed, perhaps because it took too much memory",
        }
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return {"died": True, "error": reasons.get(status, f"ended the process with {name}")}


def wait(workers: Sequence[Worker], seconds: float) -> list[tuple[Worker, dict[str, Any]]]:
    """The answers of busy workers, as soon as there is one, or after so many seconds.

    An answer with the key "died" says that the worker has ended, and "timeout" that it was killed after its time.
    """
    busy = {worker.descriptor: worker for worker in workers if worker.busy}
    ready, _, _ = select.select(list(busy), [], [], seconds)
    answers = [(worker, worker._take(descriptor in ready)) for descriptor, worker in busy.items()]
    return [(worker, answer) for worker, answer in answers if answer is not None]


def ask(worker: Worker, request: Mapping[str, Any], seconds: float = HANG_SECONDS) -> dict[str, Any]:
    """Sends a request and waits for the answer."""
    worker.send(request, seconds)
    while not (answers := wait([worker], 1.0)):
        pass
    return answers[0][1]


# --- in the worker ---


def serve(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers the requests on stdin until it is closed; an exception becomes an answer with the key "error"."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log
    _limit_this_process()
    for line in sys.stdin:
        _limit_processor_time()
        try:
            answer = handle(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            # TVM's messages end with what went wrong.
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            answer = {"error": last[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _limit_this_process() -> None:
    """Ends this process with its parent, and makes it the first one to go if memory runs out."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = int(_MEMORY_SHARE * _available_bytes())
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _available_bytes() -> int:
    """Memory that can be had without swapping; `sysconf` does not count what files are cached in."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limit_processor_time(seconds: int | None = None) -> None:
    """Ends this process when it has used so much more processor time, see `setrlimit(2)`."""
    usage, (_, hard) = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(usage.ru_utime + usage.ru_stime) + (PROCESSOR_SECONDS if seconds is None else seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
