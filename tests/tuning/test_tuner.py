"""A search from end to end: measuring in worker processes, Ctrl-C, going on, and the compiler using its records."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

from tvm_attn import _resources, targets
from tvm_attn._resources import resource_dir
from tvm_attn.compiler.devices import layout_for
from tvm_attn.compiler.pipeline import compile_program
from tvm_attn.config import PRESETS
from tvm_attn.errors import TargetError, TuningError, VerificationError
from tvm_attn.inventory import obstacle
from tvm_attn.kernels import Linear, cpu
from tvm_attn.kernels.template import Template
from tvm_attn.model.gpt2 import build_program
from tvm_attn.schedule import schedule
from tvm_attn.schedule.records import read_records
from tvm_attn.tuning import tuner, workers
from tvm_attn.tuning.calls import calls_of
from tvm_attn.tuning.search import Session
from tvm_attn.tuning.tuner import Progress, search, tune

TARGET = targets.detect_cpu()
CONFIG = replace(PRESETS["gpt2"], n_layer=1, n_embd=32, n_head=2, n_inner=64, vocab_size=61, n_positions=16)
TINY = Linear(16, 32, 8, 32, "float32", activation="gelu_new")


def database_lines(work: Path) -> int:
    return len((work / "database_tuning_record.json").read_text().splitlines())


@pytest.mark.slow
def test_interrupted_resumed_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    program = build_program(CONFIG, layout_for(CONFIG, TARGET, "float32", "none"), 16, 1)
    kernels = [kernel for kernel in program.kernels.values() if kernel.family == "linear" and kernel.groups is None]
    folder, work = tmp_path / "schedules" / TARGET.name, tmp_path / "work"

    def interrupt(progress: Progress) -> None:
        if progress.done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    tuned = search(kernels, TARGET, 4, folder, work, interrupt)
    assert tuned.interrupted
    assert signal.getsignal(signal.SIGINT) is before
    assert [found.measured for found in tuned.found] == [1]
    (first,) = read_records(folder / "cpu.matmul.jsonl")
    assert first == tuned.found[0].record

    seen: list[Progress] = []
    resumed = search(kernels, TARGET, 4, folder, work, seen.append)
    assert not resumed.interrupted
    assert resumed.found[0].measured == 4
    assert resumed.found[0].failed == 0
    # What the interrupted search had stored was not measured again, but for the finalists.
    assert seen[0].done >= 1
    assert seen[-1].done == seen[-1].total == 8
    lines = database_lines(work)

    with (work / "database_tuning_record.json").open("a") as file:
        file.write('[0, [["half a li')
    monkeypatch.setattr(Session, "measuring", lambda *_: pytest.fail("everything was measured before"))
    again = search(kernels, TARGET, 4, folder, work)
    assert again.found == resumed.found
    assert database_lines(work) == lines

    monkeypatch.setattr(
        _resources, "resource_dir", lambda name: {"schedules": tmp_path / name}.get(name, resource_dir(name))
    )
    planned = compile_program(program, TARGET, tmp_path / "lib.so")
    (used,) = (entry.record for entry in planned.values() if entry.record)
    assert used in read_records(folder / "cpu.matmul.jsonl")
    assert used.decisions in (first.decisions, resumed.found[0].record.decisions)
    # MetaSchedule's log went to a file.
    assert capfd.readouterr() == ("", "")
    assert "Task #0" in (work / "search.log").read_text()


def test_a_candidate_with_a_wrong_result_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(kernel: Linear, target: targets.Target, choose: Any) -> Any:
        wrong = choose("wrong", (0, 1), 0)
        return schedule_linear(replace(kernel, activation="relu") if wrong else kernel, target, lambda *a: a[2])

    schedule_linear = cpu.TEMPLATES[0].apply
    monkeypatch.setattr(cpu, "TEMPLATES", (Template("cpu.test", 1, ("linear",), apply),))
    tuned = search([TINY], TARGET, 8, tmp_path / "records", tmp_path / "work")
    (found,) = tuned.found
    assert found.record.decisions == {"wrong": 0}
    assert (found.measured, found.failed) == (1, 1)
    assert found.speedup == 1.0


@pytest.mark.parametrize(("work", "status"), [("while True: pass", -signal.SIGXCPU), ("time.sleep(3)", 0)])
def test_limit_of_a_candidate_is_processor_time(work: str, status: int) -> None:
    """Neither what the process did before counts, nor that the machine is busy with something else."""
    code = f"""
import time
from tvm_attn.tuning import workers
workers.start("/dev/null")
end = time.process_time() + 1.5
while time.process_time() < end: pass
workers.limit_processor_time(1)
{work}
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == status


def test_workers_limit_every_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(workers, "limit_processor_time", lambda: done.append("limit"))
    monkeypatch.setattr(workers, "build_module", lambda *_, **__: done.append("compile"))
    monkeypatch.setattr(workers, "export_with_threads", lambda *_: None)
    monkeypatch.setattr(workers, "measure", lambda *_: done.append("measure"))
    workers.build(None, None, "candidate.so")
    workers.run(None, None, None, None)
    assert done == ["limit", "compile", "limit", "measure"]


def test_nothing_could_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An empty path finds no C++ compiler to link with.
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(TuningError, match="no candidate could be measured"):
        search([TINY], TARGET, 2, tmp_path / "records", tmp_path / "work")
    assert not list((tmp_path / "records").glob("**/*.jsonl"))


def test_check_and_time_of_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tvm.IRModule({"main": schedule(TINY, TARGET).with_attr("global_symbol", "main")})
    good = tvm.tirx.build(module, target=tvm.target.Target(TARGET.tvm))["main"]
    monkeypatch.setattr(workers, "_COLD_BYTES", 1 << 20)
    prepared = [workers._Prepared(call) for call in calls_of(TINY)]
    assert all(len(entry.arguments) > 1 for entry in prepared)
    monkeypatch.setattr(workers, "_prepared", prepared)
    times = workers.measure({"main": good, "set_threads": int}, None, None, [])
    assert len(times) == len(calls_of(TINY)) == 3
    assert all(0 < time < 1 for time in times)

    def nothing(*arguments: Any) -> None:
        """Leaves the right result of the function before where it is."""

    def infinite(*arguments: Any) -> None:
        arguments[-1].copyfrom(np.full(arguments[-1].shape, np.nan, np.float32))

    for bad in (nothing, infinite):
        with pytest.raises(VerificationError, match="disagrees"):
            workers.measure({"main": bad, "set_threads": int}, None, None, [])


def test_what_cannot_be_searched_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = next(name for name in targets.names() if obstacle(targets.read(name)))
    with pytest.raises(TargetError, match=f"{foreign} cannot be measured on this machine"):
        tune(target=foreign, out=tmp_path)
    with pytest.raises(TargetError, match="dtype"):
        tune(target="cpu", dtype="float64", out=tmp_path)
    with pytest.raises(TuningError, match="trials"):
        tune(target="cpu", trials=0, out=tmp_path)
    with pytest.raises(TuningError, match=r"no kernels lineer; it has .*linear"):
        tune("demo", "cpu", kernels=["lineer"], out=tmp_path)
    monkeypatch.setattr(tuner, "find_spec", lambda name: None)
    with pytest.raises(TuningError, match=r"^a search needs cloudpickle: pip install cloudpickle psutil"):
        tune(target="cpu", out=tmp_path)


def test_work_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningError, match="cannot use"):
        search([], TARGET, 2, tmp_path, tmp_path / "file")
    with tuner._locked(tmp_path / "work"), pytest.raises(TuningError, match="another search"):
        search([], TARGET, 2, tmp_path, tmp_path / "work")
    (tmp_path / "work" / "database_tuning_record.json").write_text("no JSON\n")
    (tmp_path / "work" / "database_workload.json").write_text("")
    with pytest.raises(TuningError, match="cannot be read"):
        search([], TARGET, 2, tmp_path, tmp_path / "work")
