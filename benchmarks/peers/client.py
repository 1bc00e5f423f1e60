"""The parent's side of a peer: starts its process, sends requests, and keeps it stopped while others are measured."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

import benchmarks
import tvm_attn
from benchmarks.peers import PeerInfo
from tvm_attn.benchmark.system import Case, Float32Array, Int32Array

_TIMEOUT_SECONDS = 1200.0


class PeerUnavailable(Exception):
    """A peer cannot be measured; the message, one line, says why. The peer is left out; the command does not fail."""


class PeerProcess:
    """A peer in its own process, whose threads are stopped (SIGSTOP) except during requests.

    Args:
        peer: the runtime.
        weights: folder that `write_weights` made.
        precision: one of the peer's precisions.
        threads: threads that it may use.
        python: the Python in which the runtime is installed.

    Raises:
        PeerUnavailable: it is not installed, or could not be started.
    """

    def __init__(self, peer: PeerInfo, weights: Path, precision: str, threads: int, python: str) -> None:
        self._peer = peer
        self._scratch = tempfile.TemporaryDirectory(prefix=f"tvm-attn-{peer.name}-")
        self._log = Path(self._scratch.name) / "log"
        ours, theirs = socket.socketpair()
        command = [python, "-m", f"benchmarks.peers.{peer.name}", str(weights)]
        command += ["--socket", str(theirs.fileno()), "--precision", precision, "--threads", str(threads)]
        command += ["--scratch", self._scratch.name]
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[theirs.fileno()],
                    env=_environment(Path(self._scratch.name), python, threads),
                )
        except OSError as error:
            ours.close()
            self._scratch.cleanup()
            raise PeerUnavailable(f"{peer.name}: {python} cannot be started ({error.strerror})") from error
        finally:
            theirs.close()
        self._connection = Connection(ours.detach())
        try:
            started = self._receive()
            self._stop()
        except BaseException:
            self.close()
            raise
        self.name, self.version, self.precision = started["name"], started["version"], started["precision"]

    def supports(self, case: Case) -> bool:
        """See `System.supports`."""
        return bool(self._ask({"do": "supports", "case": case.to_dict()})["supports"])

    def fill(self, case: Case) -> None:
        """See `System.fill`."""
        self._ask({"do": "fill", "case": case.to_dict()})

    def time(self, case: Case, seconds: float) -> list[float]:
        """See `System.time`."""
        return [
            float(value) for value in self._ask({"do": "time", "case": case.to_dict(), "seconds": seconds})["seconds"]
        ]

    def logits(self, ids: Int32Array) -> dict[str, Float32Array]:
        """See `System.logits`."""
        answer = self._ask({"do": "logits", "ids": ids.tolist()})
        return {name: np.array(values, np.float32) for name, values in answer.items()}

    def close(self) -> None:
        """Ends the process and removes its files."""
        self._connection.close()
        self._process.kill()  # also reaches a stopped process
        self._process.wait()
        self._scratch.cleanup()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._running():
            try:
                self._connection.send_bytes(json.dumps(request).encode())
            except OSError as error:
                raise self._ended() from error
            return self._receive()

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._stop()

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _receive(self) -> dict[str, Any]:
        try:
            if not self._connection.poll(_TIMEOUT_SECONDS):
                raise PeerUnavailable(f"{self._peer.name}: no answer within {_TIMEOUT_SECONDS:.0f} s")
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if "missing" in answer:
            missing = ", ".join(answer["missing"])
            raise PeerUnavailable(f"{self._peer.name}: {missing} not installed; to compare: {self._peer.install}")
        if "error" in answer:
            raise PeerUnavailable(f"{self._peer.name}: {' '.join(answer['error'].split())[:300]}")
        return answer

    def _ended(self) -> PeerUnavailable:
        """The error for a process that has ended: its last line of output, or else its exit status."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        cause = lines[-1][:300] if lines else f"exit status {self._process.poll()}"
        return PeerUnavailable(f"{self._peer.name}: its process ended ({cause})")


def _environment(scratch: Path, python: str, threads: int) -> dict[str, str]:
    """The peer's environment: its number of threads, and the path to our packages, which its Python may lack."""
    packages = scratch / "packages"
    packages.mkdir()
    for package in (tvm_attn, benchmarks):
        assert package.__file__
        folder = Path(package.__file__).resolve().parent
        (packages / folder.name).symlink_to(folder, target_is_directory=True)
    # Our own path would expose this Python's packages to another one.
    inherited = [path for path in [os.environ.get("PYTHONPATH")] if path and python == sys.executable]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(packages), *inherited]),
    }
