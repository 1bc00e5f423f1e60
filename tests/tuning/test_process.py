"""Worker processes: answers, ends, limits."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tvm_attn.tuning.process import Worker, ask, wait

_SCRIPT = """
import os, signal, sys, time
from tvm_attn.tuning import process
def handle(request):
    print("printed")
    return eval(request["do"])
def spin():
    while True: pass
def compute(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
    return {}
process.PROCESSOR_SECONDS = 1
process.serve(handle)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Worker]]:
    script = tmp_path / "worker.py"
    script.write_text(_SCRIPT)
    workers: list[Worker] = []

    def start_one() -> Worker:
        workers.append(Worker(str(script), [], tmp_path / "log", {"EXTRA": "1"}))
        return workers[-1]

    yield start_one
    for worker in workers:
        worker.close()


def test_answers_and_errors(start: Callable[[], Worker], tmp_path: Path) -> None:
    worker = start()
    assert ask(worker, {"do": "{'value': 1}"}) == {"value": 1}
    assert ask(worker, {"do": "{'extra': os.environ['EXTRA']}"}) == {"extra": "1"}
    assert ask(worker, {"do": "{}['no']"}) == {"error": "'no'"}
    assert ask(worker, {"do": "{'value': 2}"}) == {"value": 2}
    log = (tmp_path / "log").read_text()
    assert "printed" in log
    assert "KeyError" in log


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "took too much memory"),
        ("os._exit(3)", "status 3"),
        ("spin()", "processor time"),
    ],
)
def test_a_worker_that_ends(start: Callable[[], Worker], do: str, reason: str) -> None:
    worker, other = start(), start()
    answer = ask(worker, {"do": do})
    assert answer["died"]
    assert reason in answer["error"]
    assert not worker.busy
    assert ask(other, {"do": "{}"}) == {}


def test_processor_time_is_each_requests_own(start: Callable[[], Worker]) -> None:
    """Neither earlier requests count, nor that the machine is busy with something else."""
    worker = start()
    for _ in range(3):
        assert ask(worker, {"do": "compute(0.7)"}) == {}
    assert ask(worker, {"do": "time.sleep(1.5) or {}"}) == {}


def test_memory_is_limited(start: Callable[[], Worker]) -> None:
    answer = ask(start(), {"do": "len(bytes(1 << 50)) or {}"})
    assert "error" in answer


def test_time_and_pauses(start: Callable[[], Worker]) -> None:
    worker = start()
    assert ask(worker, {"do": "{}"}) == {}
    worker.send({"do": "time.sleep(0.5) or {}"}, 3.0)
    worker.pause()
    time.sleep(3.5)  # longer than it has
    assert wait([worker], 0.0) == []
    worker.resume()
    while not (answers := wait([worker], 1.0)):
        pass
    assert answers == [(worker, {})]
    worker.send({"do": "time.sleep(60)"}, 0.3)
    while not (answers := wait([worker], 0.1)):
        pass
    assert answers[0][1]["timeout"]


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(_SCRIPT)
    parent = f"""
from pathlib import Path
from tvm_attn.tuning.process import Worker, ask
worker = Worker({str(script)!r}, [], Path({str(tmp_path / "log")!r}))
ask(worker, {{"do": "{{}}"}})
worker.send({{"do": "time.sleep(60)"}})
print(worker._process.pid, flush=True)
import time; time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    end = time.monotonic() + 30
    while os.path.exists(f"/proc/{child}") and time.monotonic() < end:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child}") or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
