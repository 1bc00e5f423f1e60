"""The threads of libraries for processors: results, forks, ends of processes, also where the cores are busy."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvm_attn
from tvm_attn.compiler.threads import SOURCE, include_options
from tvm_attn.runtime.model import Model

STRESS = Path(__file__).with_name("thread_pool_stress.cc")
# Nothing here depends on how fast the machine is. What waits for a thread that never comes would wait for ever.
LIMIT = 600


@pytest.fixture(scope="module", autouse=True)
def busy_cores(demo_artifact: Path) -> Iterator[None]:
    """Another program wants every core, once what is tested has been built."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    yield
    for loop in loops:
        loop.kill()
        loop.wait()


@pytest.mark.parametrize("checked", ["", "thread", "address,undefined"])
def test_every_iteration_runs_once(checked: str, tmp_path: Path) -> None:
    """Loops from four threads at a time, with 1 to 5 threads each; without a sanitizer also in a forked child."""
    program = tmp_path / "stress"
    options = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *include_options()]
    sources = [str(SOURCE), str(STRESS)]
    compiler = [os.environ.get("CXX", "g++")]
    if checked:
        options.append(f"-fsanitize={checked}")
        empty = tmp_path / "empty.cc"
        empty.write_text("int main() { return 0; }\n")
        for command in ([*compiler, options[-1], str(empty), "-o", str(program)], [str(program)]):
            if subprocess.run(command, capture_output=True).returncode != 0:
                pytest.skip(f"no sanitizer: {checked}")
    subprocess.run([*compiler, *options, *sources, "-o", str(program), "-pthread"], check=True, timeout=LIMIT)
    arguments = ["2000"] if checked else ["10000", "fork"]
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_library_runs_on_older_systems(demo_artifact: Path) -> None:
    """It needs nothing of the C library that TVM's wheel for manylinux_2_28 would not find."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    (library,) = demo_artifact.glob("lib-*.so")
    symbols = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_([0-9.]+)", symbols)}
    assert (2, 2, 5) in versions or platform.machine() != "x86_64"
    assert max(versions) <= (2, 28)


def test_results_do_not_depend_on_the_number_of_threads(demo_artifact: Path) -> None:
    """Bit for bit, also with more threads than cores."""
    model = tvm_attn.load(demo_artifact, device="cpu")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 37))
    expected: list[Any] = []
    for threads in (1, 2, 3, 5, 16, 100):
        model.engine._threads = threads
        for _ in range(5):
            results = [model.logits(ids), *model.generate([list(row) for row in ids], max_new_tokens=8)]
            expected = expected or results
            assert np.array_equal(results[0], expected[0])
            assert [r.token_ids for r in results[1:]] == [r.token_ids for r in expected[1:]]


def test_models_in_several_threads_at_once(demo_artifact: Path) -> None:
    """Models with different numbers of threads, called at the same time, give what each gives alone."""
    models = [tvm_attn.load(demo_artifact, device="cpu", threads=threads) for threads in (1, 2)]
    ids = np.random.default_rng(1).integers(0, models[0].config.vocab_size, (2, 21))
    expected = models[0].logits(ids)
    wrong: list[str] = []

    def run(model: Model) -> None:
        for _ in range(20):
            if not np.array_equal(model.logits(ids), expected):
                wrong.append("differs")

    callers = [threading.Thread(target=run, args=[model]) for model in models]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


# Each prints a line, "before" from the process and "child" from one that it forked.
FORKS = {
    "a child": """
if os.fork() == 0:
    say("child")
    os._exit(0)
assert os.wait()[1] == 0
say("parent")
""",
    "a child that ends as programs do": """
child = os.fork()
say("parent" if child else "child")
assert not child or os.wait()[1] == 0
""",
    "a child of a child": """
if os.fork() == 0:
    if os.fork() == 0:
        say("child")
        os._exit(0)
    assert os.wait()[1] == 0
    os._exit(0)
assert os.wait()[1] == 0
say("parent")
""",
    "multiprocessing": """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    pool.map(say, ["child"])
say("parent")
""",
}


@pytest.mark.parametrize("how", FORKS)
def test_children_compute_too(how: str, demo_artifact: Path) -> None:
    script = f"""
import os, sys, warnings
warnings.simplefilter("ignore")  # Python warns of forks beside threads
import tvm_attn
model = tvm_attn.load(sys.argv[1], device="cpu")

def say(name):
    ids = model.generate([3, 1, 4], max_new_tokens=8).token_ids
    os.write(1, f"{{name}} {{list(ids)}} {{len(os.listdir('/proc/self/task')) > alone}}\\n".encode())

alone = 1
say("before")
{FORKS[how]}
"""
    done = run(script, demo_artifact)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines.keys() == {"before", "child", "parent"}
    assert len(set(lines.values())) == 1, lines


def run(script: str, artifact: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1", "TVM_NUM_THREADS": "2"}
    command = [sys.executable, "-c", script, str(artifact)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)


def test_a_process_ends(demo_artifact: Path) -> None:
    """Right after its last token, and with models that are still in use."""
    script = """
import sys
import tvm_attn
kept = tvm_attn.load(sys.argv[1], device="cpu")
print(kept.generate([1, 2], max_new_tokens=4).token_ids)
"""
    for _ in range(3):
        done = run(script, demo_artifact)
        assert (done.returncode, done.stderr) == (0, "")


def test_tvm_starts_no_threads(demo_artifact: Path) -> None:
    """Its own would spin, and be waited for at the end."""
    script = """
import json, os, sys
import tvm_attn
from tvm_attn.runtime.tvm_import import import_tvm
import_tvm()
counts = [len(os.listdir("/proc/self/task"))]
for threads in (1, 2, 2):
    model = tvm_attn.load(sys.argv[1], device="cpu", threads=threads)
    model.logits([[1, 2, 3]])
    model.generate([1, 2], max_new_tokens=4)
    del model
    counts.append(len(os.listdir("/proc/self/task")))
print(json.dumps([count - counts[0] for count in counts]))
"""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs more cores")
    done = run(script, demo_artifact)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [0, 1, 2, 2], "the one that calls, and one more for the models with two"
