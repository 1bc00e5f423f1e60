"""The thread that calls TVM, with several threads, forks, signals and the end of the interpreter."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvm_attn
from tvm_attn.errors import DeviceError
from tvm_attn.runtime.engine import CompiledEngine
from tvm_attn.runtime.model import Model
from tvm_attn.runtime.worker import Worker

PROMPTS = ["Return the", "The value of", "class", "Raises an", "If the object", "import", "def f(x):", "A list of"]
SAMPLED = {"max_new_tokens": 20, "temperature": 0.9, "top_k": 40, "seed": 3}


@pytest.fixture(scope="module")
def model(demo_artifact: Path) -> Model:
    return tvm_attn.load(demo_artifact, "cpu")


# --- the thread ---


def test_calls_are_made_by_one_thread_in_their_order() -> None:
    worker = Worker("test")
    assert worker.run(threading.get_ident) != threading.get_ident()
    assert worker.run(lambda: worker.run(threading.get_ident)) == worker.run(threading.get_ident)
    assert worker.run(divmod, 7, 3) == (2, 1)
    assert worker.run(dict, a=1) == {"a": 1}
    with pytest.raises(ZeroDivisionError):
        worker.run(divmod, 7, 0)
    posted, go = list[int](), threading.Event()
    for function in (go.wait, lambda: posted.append(1), lambda: worker.post(lambda: posted.append(3))):
        worker.post(function)
    assert posted == []
    go.set()
    assert worker.run(lambda: posted.append(2)) is None
    assert worker.run(list, posted) == [1, 2, 3]
    inside, numbers = list[int](), list[int]()

    def step(number: int) -> int:
        assert not inside
        inside.append(number)
        numbers.append(number)
        inside.clear()
        return number

    def count(first: int) -> None:
        assert [worker.run(step, first + i) for i in range(100)] == list(range(first, first + 100))

    threads = [threading.Thread(target=count, args=(1000 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(numbers) == 800
    for i in range(8):
        own = [number for number in numbers if number // 1000 == i]
        assert own == sorted(own)


@pytest.mark.usefixtures("demo_artifact")  # a build in this process, whose compiler meddles with signals
def test_a_call_goes_on_when_its_caller_is_interrupted() -> None:
    worker, log = Worker("test"), list[str]()
    started, go = threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        go.wait()
        log.append("slow")

    def interrupt(*_: Any) -> None:
        if started.is_set() and not log:
            log.append("interrupted")
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    # Again and again: Python does not see a signal that comes just before it waits for a lock.
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    with pytest.raises(KeyboardInterrupt):
        worker.run(slow)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    assert log == ["interrupted"]
    log.clear()
    go.set()
    assert worker.run(log.append, "next") is None
    assert log == ["slow", "next"]


# --- one model, several threads ---


@pytest.mark.parametrize("count", [2, 8, 20])
def test_threads_get_what_one_gets(demo_artifact: Path, model: Model, count: int) -> None:
    models = [model, tvm_attn.load(demo_artifact, "cpu", threads=1, max_batch=3)]
    ids = [model.tokenizer.encode(prompt) for prompt in PROMPTS]  # type: ignore[union-attr]
    texts = [model.generate(prompt, **SAMPLED) for prompt in PROMPTS]
    batch = model.generate(PROMPTS, **SAMPLED)
    logits = [model.logits([row]) for row in ids]
    wrong: list[Any] = []

    def ask(number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            for _ in range(4):
                chosen, index = models[rng.integers(2)], int(rng.integers(len(PROMPTS)))
                match rng.integers(4):
                    case 0:
                        right = chosen.generate(PROMPTS[index], **SAMPLED) == texts[index]
                    case 1:
                        right = "".join(chosen.stream(ids[index], **SAMPLED)) == texts[index].text
                    case 2:
                        right = chosen.generate(PROMPTS, **SAMPLED) == batch
                    case _:
                        right = bool((chosen.logits([ids[index]]) == logits[index]).all())
                if not right:
                    wrong.append(index)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for used in models:
        assert used.scheduler.stats.free_slots == used.engine.max_batch


def test_a_stream_goes_on_in_another_thread(model: Model) -> None:
    expected = model.generate(PROMPTS[0], **SAMPLED)
    stream = model.stream(PROMPTS[0], **SAMPLED)
    pieces = [next(stream)]
    # One call in the thread that holds an open stream, and one in another.
    assert model.generate(PROMPTS[0], **SAMPLED) == expected
    thread = threading.Thread(target=lambda: pieces.extend(stream))
    thread.start()
    thread.join()
    assert "".join(pieces) == expected.text


def test_interrupted_steps_disturb_nobody(model: Model) -> None:
    expected = [model.generate(prompt, **SAMPLED) for prompt in PROMPTS]
    main = threading.main_thread().ident or 0
    for delay in np.random.default_rng(1).uniform(0, 0.05, 20):
        timer = threading.Timer(delay, signal.pthread_kill, (main, signal.SIGINT))
        try:
            timer.start()
            while True:
                model.generate(PROMPTS, **SAMPLED)
        except KeyboardInterrupt:
            pass
        timer.join()
        assert model.generate(PROMPTS[0], **SAMPLED) == expected[0]
    model.engine.run(int)  # the step that drops what was cancelled
    assert model.scheduler.stats.free_slots == 8


# --- forks and ends, in processes of their own ---

PRELUDE = """
import multiprocessing, os, signal, sys, threading, time
import tvm_attn

def text(prompt="Return the", **options):
    return model.generate(prompt, max_new_tokens=20, **options).text

def in_child(function):
    pid = os.fork()
    if pid == 0:
        function()
        sys.exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status == 0, status

def same():
    assert text() == expected

model = tvm_attn.load(sys.argv[1], "cpu", max_batch=4)
"""


def run(artifact: Path, program: str, *options: str) -> None:
    """Runs a program, which must end with status 0 and print nothing."""
    command = [sys.executable, "-W", "error", *options, "-c", PRELUDE + program, str(artifact)]
    environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


FORKS = {
    "after use": """
expected = text()
in_child(same)
same()
in_child(lambda: in_child(same))
""",
    "before use": """
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
child = context.Process(target=lambda: queue.put(text()))
child.start()
given = queue.get()
child.join()
assert child.exitcode == 0
assert given == text()
""",
    "in a thread": """
expected = text()
failed = []
def fork():
    try:
        in_child(lambda: (same(), os._exit(0)))
    except BaseException as error:
        failed.append(error)
thread = threading.Thread(target=fork)
thread.start()
thread.join()
assert not failed, failed
same()
""",
    "with an open stream": """
expected = text()
stream = model.stream("Return the", max_new_tokens=20)
first = next(stream)
def go_on():
    assert first + "".join(stream) == expected
    assert model.scheduler.stats.free_slots == 4
in_child(go_on)
go_on()
""",
    "while threads generate": """
expected = text()
stop = threading.Event()
def generate():
    while not stop.is_set():
        model.generate(["class"] * 9, max_new_tokens=5)
threads = [threading.Thread(target=generate) for _ in range(3)]
for thread in threads:
    thread.start()
theirs = []
opened = threading.Thread(target=lambda: theirs.append(model.stream("class")) or next(theirs[0]))
try:
    opened.start()
    opened.join()
    def child():
        assert model.scheduler.stats.free_slots == 4
        same()
        try:  # unless it had ended
            list(theirs[0])
        except tvm_attn.TvmAttnError as error:
            assert "start it again" in str(error)
        assert [c.text for c in model.generate(["Return the"] * 9, max_new_tokens=20)] == [expected] * 9
        os._exit(0)
    for _ in range(5):
        in_child(child)
finally:
    stop.set()
for thread in threads:
    thread.join()
same()
""",
    "in a signal's handler during a step": """
expected = text()
def handler(*_):
    in_child(lambda: (same(), os._exit(0)))
signal.signal(signal.SIGALRM, handler)
for delay in (0.001, 0.01, 0.02):
    signal.setitimer(signal.ITIMER_REAL, delay)
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        same()
same()
""",
}


@pytest.mark.parametrize("program", FORKS.values(), ids=FORKS)
def test_a_fork(demo_artifact: Path, program: str) -> None:
    options = ("-W", "ignore:This process:DeprecationWarning")  # Python 3.12 warns about forks in threaded processes
    run(demo_artifact, program, *options)


ENDS = {
    "generate": "model.generate(['Return the'] * 8, temperature=1.0, top_p=0.9)",
    "stream": "list(model.stream('Return the'))",
    "logits": "model.logits([[1] * 256] * 8)",
    "load": "tvm_attn.load(sys.argv[1], 'cpu')",
    "tokenize": "model.generate('Return the ' * 100, max_new_tokens=1)",
}


@pytest.mark.parametrize("call", ENDS.values(), ids=ENDS)
def test_the_end_while_daemon_threads_work(demo_artifact: Path, call: str) -> None:
    run(
        demo_artifact,
        f"""
stream = model.stream("class")
next(stream)
begun = threading.Semaphore(0)
def work():
    while True:
        begun.release()
        {call}
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
for _ in range(5):
    begun.acquire()
sys.exit()
""",
    )


def test_the_end_waits_for_other_threads(demo_artifact: Path) -> None:
    """Non-daemon threads finish generating; after that nobody can."""
    run(
        demo_artifact,
        """
import atexit
import tvm_attn.runtime.worker
def late():
    try:
        text()
    except tvm_attn.TvmAttnError as error:
        assert "Python is ending" in str(error)
        done.append(1)
def check():
    assert done == [expected, 1], done
done = []
expected = text()
atexit._clear()
atexit.register(check)
atexit.register(late)
atexit.register(tvm_attn.runtime.worker._end)
threading.Thread(target=lambda: done.append(text())).start()
threading.Thread(target=sys.exit).start()
""",
    )


def test_sigterm_and_interrupts_end_a_process(demo_artifact: Path) -> None:
    command = [sys.executable, "-c", PRELUDE + "print(1, flush=True)\nwhile True: text()", str(demo_artifact)]
    for number in (signal.SIGTERM, signal.SIGINT):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.readline()
            process.send_signal(number)
            error = process.stderr.read()
            assert process.wait(timeout=600) == -number
            assert ("KeyboardInterrupt" in error) == (number == signal.SIGINT)


def test_a_gpu_does_not_survive_a_fork(demo_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: CompiledEngine = tvm_attn.load(demo_artifact, "cpu").engine
    monkeypatch.setattr(engine, "_process", os.getpid() + 1)  # a CPU engine continues
    assert engine.run(int) == 0
    monkeypatch.setattr(engine, "library", type("Library", (), {"device": "cuda"}))
    with pytest.raises(DeviceError, match=r"cuda was in use when this process was forked.*spawn"):
        engine.run(int)


def test_what_load_refuses(demo_artifact: Path) -> None:
    for folder in (None, 5, b"folder", ["a"], 10**5000):
        with pytest.raises(tvm_attn.TvmAttnError, match="an artifact is given as its folder, not ") as caught:
            tvm_attn.load(folder)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 200
    wrong: list[dict[str, Any]] = [
        {"device": None}, {"device": 0}, {"device": "x" * 10**6}, {"threads": 2**70}, {"threads": "2"},
        {"max_batch": 2**70}, {"max_batch": None}, {"stream": 2**70},
    ]  # fmt: skip
    for arguments in wrong:
        with pytest.raises(tvm_attn.TvmAttnError) as caught:
            tvm_attn.load(demo_artifact, **arguments)
        assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
    assert tvm_attn.load(demo_artifact, "cpu", threads=np.uint8(1), max_batch=np.int64(2)).engine.max_batch == 2  # type: ignore[arg-type]
