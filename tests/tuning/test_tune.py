"""Searches from beginning to end with real workers: on processors, on Vulkan, behind RPC, and on another machine."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tvm_attn import targets
from tvm_attn.config import PRESETS
from tvm_attn.errors import TargetError, TuningError
from tvm_attn.inventory import obstacle
from tvm_attn.kernels import LayerNorm, Linear, PackPlain
from tvm_attn.schedule import RecordBook, template_for
from tvm_attn.schedule.records import read_records
from tvm_attn.tuning import batch
from tvm_attn.tuning.space import Space
from tvm_attn.tuning.tune import Job, require_calm, tune
from tvm_attn.tuning.tuner import Found, Options, Task, local_place, remote_place, search

TARGET = targets.detect_cpu()
CONFIG = replace(PRESETS["gpt2"], n_layer=1, n_embd=32, n_head=2, n_inner=64, vocab_size=61, n_positions=16)
TINY = Linear(16, 32, 8, 32, "float32", activation="gelu_new")
VULKAN = targets.read("vulkan-generic")
QUICK = Options(trials=2, force=True)


@pytest.mark.slow
def test_a_search_whose_records_a_build_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    tuned = tune(CONFIG, TARGET.name, kernels=["linear"], work=tmp_path, options=Options(trials=3, force=True))
    assert not tuned.interrupted
    assert tuned.found
    assert all(found.failed == 0 for found in tuned.found)
    wanted = [found.record for found in tuned.found if found.gain is None or found.gain > 1]
    written = [record for file in tuned.files for record in read_records(file)]
    if tuned.verdict is not None:
        assert {record.to_line() for record in written} == {record.to_line() for record in tuned.verdict.kept}
        assert len(tuned.verdict.kept) + len(tuned.verdict.withdrawn) == len(wanted)
    book = RecordBook.load(TARGET)
    for record in written:
        kernel = Linear(**{name: value for name, value in record.shape.items() if name != "family"})
        assert book.find(template_for(kernel, TARGET), kernel) == record


@pytest.mark.slow
@pytest.mark.skipif(obstacle(VULKAN) is not None, reason=f"no Vulkan device: {obstacle(VULKAN)}")
def test_vulkan(tmp_path: Path) -> None:
    kernels = [Linear(16, 32, 16, 32, "float32"), LayerNorm(64, 1e-5, 16), PackPlain(32, 64, 32, "float32")]
    tasks = [Task(Space.of(kernel, VULKAN), 1.0) for kernel in kernels]
    tuned = search(tasks, VULKAN, VULKAN.name, local_place(VULKAN), tmp_path, Options(trials=3))
    assert [found.failed for found in tuned.found] == [0, 0, 0]
    assert all(1 < found.measured <= 3 for found in tuned.found)


@contextmanager
def _devices(tmp_path: Path, count: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A tracker and servers of TVM's RPC on loopback: its address, and the servers' processes."""
    pytest.importorskip("tornado")
    log = (tmp_path / "rpc.log").open("wb")
    first = 20_000 + os.getpid() % 20_000

    def start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", module, "--host", "127.0.0.1", *arguments]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def text() -> str:
        return (tmp_path / "rpc.log").read_text()

    tracker = start("tvm.exec.rpc_tracker", "--port", str(first), "--port-end", str(first + 50))
    servers: list[subprocess.Popen[bytes]] = []
    try:
        _wait_for(lambda: "bind to 127.0.0.1:" in text())
        port = text().split("bind to 127.0.0.1:")[1].split()[0]
        address = f"127.0.0.1:{port}"
        for number in range(count):
            ports = ["--port", str(first + 100 + 50 * number), "--port-end", str(first + 149 + 50 * number)]
            servers.append(start("tvm.exec.rpc_server", *ports, "--tracker", address, "--key", "board"))
        from tvm import rpc

        session = rpc.connect_tracker("127.0.0.1", int(port))
        _wait_for(lambda: session.summary()["queue_info"].get("board", {}).get("free") == count)
        yield address, servers
    finally:
        for process in (*servers, tracker):
            _kill(process)
        log.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, 9)
    process.wait()


def _wait_for(condition: Any) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_two_devices_behind_rpc_of_which_one_dies(tmp_path: Path) -> None:
    with _devices(tmp_path, 2) as (address, servers):
        place = remote_place(TARGET, address, "board")
        assert place.devices == 2
        with pytest.raises(TuningError, match="no free device with the key 'other'; its keys: board"):
            remote_place(TARGET, address, "other")
        done = 0

        def kill_one(progress: Any) -> None:
            nonlocal done
            done += 1
            if done == 3:
                _kill(servers[0])

        task = Task(Space.of(TINY, TARGET), 1.0)
        tuned = search([task], TARGET, TARGET.name, place, tmp_path / "work", Options(trials=10), kill_one)
        assert tuned.found[0].measured == 10
        assert tuned.found[0].failed == 0
    with pytest.raises(TuningError, match="no tracker answers at"):
        remote_place(TARGET, address, "board")


def test_what_is_no_tracker() -> None:
    for text in ("", "host", "host:", ":9", "host:port", "127.0.0.1:1", "127.0.0.1:99999999"):
        with pytest.raises(TuningError, match="tracker"):
            remote_place(TARGET, text, "board")


@pytest.mark.slow
def test_there_and_back(tmp_path: Path) -> None:
    """A machine without a compiler measures two rounds of candidates."""
    job = Job(CONFIG, TARGET.name, "float32", "none", ["linear"], tmp_path / "out", tmp_path / "work", QUICK)
    first = tmp_path / "first"
    assert job.export(first, lambda *_: None) == 2 * len(job.tasks)
    with pytest.raises(TuningError, match="exists; name a new folder"):
        job.export(first, lambda *_: None)

    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX")}
        environment["PATH"] = str(tmp_path)  # no compiler
        command = [sys.executable, str(folder / "run.py"), "--json"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)

    done = run(first)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["measured"] == 2 * len(job.tasks)
    results = (first / batch.RESULTS).read_text()
    assert run(first).returncode == 0
    assert (first / batch.RESULTS).read_text() == results  # nothing is measured twice

    tuned = job.import_results(first / batch.RESULTS)
    assert [found.measured for found in tuned.found] == [2] * len(job.tasks)
    second = tmp_path / "second"
    job.export(second, lambda *_: None)
    facts = [json.loads((folder / "batch.json").read_text()) for folder in (first, second)]
    both = [
        {
            (entry["workload"], json.dumps(candidate["decisions"]))
            for entry in fact["kernels"]
            for candidate in entry["candidates"]
        }
        for fact in facts
    ]
    assert not both[0] & both[1]

    # What is damaged is not run.
    library = next((second / "kernels").glob("*/*.so"))
    library.write_bytes(library.read_bytes()[:-1])
    done = run(second)
    assert done.returncode == 2
    assert "is damaged: copy the batch again" in done.stderr
    shutil.copy(next((first / "kernels").glob("*/*.so")), library)
    assert run(second).returncode == 2


def test_results_that_do_not_fit(tmp_path: Path) -> None:
    job = Job(CONFIG, TARGET.name, "float32", "none", ["linear"], tmp_path / "out", tmp_path / "work", QUICK)
    file = tmp_path / "results.jsonl"
    for content in (
        "",
        "no JSON\n",
        '{"workload": "w", "kernel": "k", "decisions": {}, "seconds": [1.0], "load": null}\n',
    ):
        file.write_text(content)
        with pytest.raises(TuningError, match="has no times for these kernels"):
            job.import_results(file)
    with pytest.raises(TuningError, match="missing"):
        job.import_results(tmp_path / "nothing")
    place = batch.place_of(TARGET)
    from tvm_attn.tuning.tuner import workload_of

    line = {"workload": workload_of(job.tasks[0].space, place), "kernel": "k", "decisions": {"k_unroll": 2}}
    file.write_text(json.dumps(line | {"seconds": [1.0] * 9, "load": None}))
    with pytest.raises(TuningError, match="has no times"):
        job.import_results(file)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"format": 9}', '{"format": 1, "version": "1", "target": "t", "device": "cpu", "kernels": 3}'],
)
def test_a_folder_that_is_no_batch(tmp_path: Path, content: str) -> None:
    (tmp_path / "batch.json").write_text(content)
    with pytest.raises(TuningError):
        batch.run_batch(tmp_path)


def test_paths_of_a_batch_stay_in_it(tmp_path: Path) -> None:
    candidate = {"file": "kernels/0/../../x.so", "sha256": "0" * 64, "decisions": {}}
    kernel = {"workload": "w", "kernel": "k", "folder": "kernels/0", "candidates": [candidate]}
    facts = {"format": 1, "version": "1", "target": "t", "device": "cpu", "kernels": [kernel]}
    (tmp_path / "batch.json").write_text(json.dumps(facts))
    with pytest.raises(TuningError, match="kernels is"):
        batch.run_batch(tmp_path)


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    foreign = next(name for name in targets.names() if obstacle(targets.read(name)))
    with pytest.raises(TargetError, match=f"{foreign} cannot be measured on this machine"):
        tune(target=foreign, out=tmp_path)
    with pytest.raises(TargetError, match="dtype"):
        tune(target="cpu", dtype="float64", out=tmp_path)
    with pytest.raises(TuningError, match="trials"):
        tune(target="cpu", options=Options(trials=0), out=tmp_path)
    with pytest.raises(TuningError, match=r"no kernels lineer; it has .*linear"):
        tune("demo", "cpu", kernels=["lineer"], out=tmp_path)


def test_records_need_a_calm_machine() -> None:
    found = Found("linear", None, 1.1, 1.1, 0.5, 3, 0, 0, 1.4)  # type: ignore[arg-type]
    with pytest.raises(TuningError, match=r"other programs used up to 1\.4 cores while 1 of 2 kernels .* --force"):
        require_calm([found, replace(found, load=None)], False)
    require_calm([found], True)
    require_calm([replace(found, load=0.1)], False)
