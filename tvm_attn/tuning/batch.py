"""Searching on a machine that has neither network nor compiler: compiled candidates go there, times come back.

    BATCH/batch.json                 what is in it
    BATCH/kernels/0/calls.json ...   the inputs of a kernel's calls, see `tvm_attn.tuning.cases`
    BATCH/kernels/0/0.so ...         its candidates
    BATCH/run.py, BATCH/tvm_attn/    what measures them: python run.py
    BATCH/results.jsonl              the times, lines as in `tvm_attn.tuning.measurements`

This module runs there, so it imports neither TVM's compiler nor anything that does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm_attn
from tvm_attn.checks import INTEGERS, Rule, integer, list_of, problem, text
from tvm_attn.errors import TuningError, one_line
from tvm_attn.jsonfile import parse_json, read_bytes, read_json, read_text, shorten_path
from tvm_attn.runtime.devices import device_class
from tvm_attn.runtime.machine import usable_cores
from tvm_attn.tuning.measurements import Measurement, Measurements, key_of, to_measurement
from tvm_attn.tuning.process import HANG_SECONDS, Worker, ask, wait

if TYPE_CHECKING:
    from tvm_attn.targets import Target
    from tvm_attn.tuning.search import Place
    from tvm_attn.tuning.tuner import Task

RESULTS, _BATCH = "results.jsonl", "batch.json"
_FORMAT = 1
_LARGEST_JSON, _LARGEST_LIBRARY, _LARGEST_RESULTS = 64 << 20, 256 << 20, 1 << 30
_RUN = '''"""Measures the candidates beside this file: python run.py. Needs NumPy and TVM's runtime (apache-tvm)."""

import os
import sys

os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from tvm_attn.run_batch import main

sys.exit(main([os.path.dirname(os.path.abspath(__file__)), *sys.argv[1:]]))
'''

Progress = Callable[[str, float], None]


def place_of(target: Target) -> Place:
    """The place in the keys of measurements that come back."""
    from tvm_attn.tuning.search import Place

    return Place(target.device, f"offline {target.name}", False, 0)


# --- there and back ---


def export(
    tasks: Sequence[Task], target: Target, named: str, work: Path, trials: int, batch: Path, progress: Progress
) -> int:
    """Compiles candidates that were not measured yet into a new folder.

    Args:
        tasks: the kernels.
        target, named: the hardware, and what names it to another process.
        work: the work folder, with the measurements that came back earlier.
        trials: the most candidates of a kernel in this round.
        batch: the folder to write; an interrupted export continues in `BATCH.part`.
        progress: called with a description of each step and the share that is done.

    Returns:
        The number of candidates.

    Raises:
        TuningError: the folder exists, or nothing is left to measure.
        CompileError: a compiler is missing.
    """
    from tvm_attn.compiler.devices import backend_for
    from tvm_attn.kernels.base import shape_of
    from tvm_attn.schedule import RecordBook
    from tvm_attn.tuning.search import BUILDER
    from tvm_attn.tuning.tuner import earlier_decisions, workload_of

    if batch.exists():
        raise TuningError(f"{shorten_path(batch)} exists; name a new folder for the batch")
    backend_for(target).check(target)
    part = batch.with_name(f"{batch.name}.part")
    work.mkdir(parents=True, exist_ok=True)
    log, place, book = Measurements(work), place_of(target), RecordBook.load(target)
    entries: list[dict[str, Any]] = []
    requests: list[dict[str, Any]] = []
    for number, task in enumerate(tasks):
        workload, folder = workload_of(task.space, place), f"kernels/{number}"
        known = log.known(workload)
        candidates = _propose(task, list(known.values()), earlier_decisions(task.space, book), trials)
        if not candidates:
            continue
        kernel = shape_of(task.space.kernel)
        requests.append({"calls": str(part / folder), "kernel": kernel})
        files = []
        for index, decisions in enumerate(candidates):
            files.append({"file": f"{folder}/{index}.so", "decisions": decisions})
            library = str(part / folder / f"{index}.so")
            requests.append({"library": library, "kernel": kernel, "target": named, "decisions": decisions})
        entries.append({"workload": workload, "kernel": task.name, "folder": folder, "candidates": files})
    if not entries:
        raise TuningError("every candidate has been measured: there is nothing to export")
    plan = hashlib.sha256(json.dumps(requests, sort_keys=True).encode()).hexdigest()
    if not (part / plan).exists():  # another plan's libraries have the same names
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / plan).touch()
    (part / "kernels").mkdir(exist_ok=True)
    failed = _build_all(requests, BUILDER, part / "build.log", progress)
    for entry in entries:
        entry["candidates"] = [
            candidate | {"sha256": hashlib.sha256((part / candidate["file"]).read_bytes()).hexdigest()}
            for candidate in entry["candidates"]
            if (part / candidate["file"]).exists()
        ]
    if not any(entry["candidates"] for entry in entries):
        raise TuningError(f"no candidate could be compiled: {failed}; see {part / 'build.log'}")
    facts = {"format": _FORMAT, "version": tvm_attn.__version__, "target": target.name, "device": target.device}
    (part / _BATCH).write_text(json.dumps(facts | {"kernels": entries}, indent=1), encoding="utf-8")
    _copy_package(part)
    (part / plan).unlink()
    part.rename(batch)
    return sum(len(entry["candidates"]) for entry in entries)


def _propose(task: Task, known: list[Measurement], first: Sequence[Any], trials: int) -> list[dict[str, int]]:
    """Decisions of the next candidates of a kernel."""
    import numpy as np

    from tvm_attn.tuning.space import Explorer
    from tvm_attn.tuning.strategy import sampled_pick

    explorer, rng = Explorer(task.space), np.random.default_rng(len(known))
    measured = {key_of(entry.decisions) for entry in known}
    found: list[dict[str, int]] = []
    given = [task.space.at(decisions) for decisions in ({}, *first)]
    for candidate in given:
        if candidate is not None and explorer.take(candidate) and key_of(candidate.decisions) not in measured:
            found.append(candidate.decisions)
    while len(found) < trials:
        candidate = explorer.next(sampled_pick(known, rng))
        if candidate is None:
            break
        if key_of(candidate.decisions) not in measured:
            found.append(candidate.decisions)
    return found[:trials]


def _build_all(requests: list[dict[str, Any]], builder: str, log: Path, progress: Progress) -> str:
    """Has workers do what is not done yet; returns the first error of a candidate."""
    left = [entry for entry in requests if not Path(entry.get("library") or f"{entry['calls']}/calls.json").exists()]
    for entry in requests:
        Path(entry.get("library", entry.get("calls", ""))).parent.mkdir(parents=True, exist_ok=True)
    workers = [Worker(builder, [], log) for _ in range(min(usable_cores(), 8))]
    total, failed = len(left), ""
    doing: dict[Worker, dict[str, Any]] = {}
    try:
        while left or doing:
            for worker in workers:
                if left and not worker.busy:
                    doing[worker] = left.pop(0)
                    worker.send(doing[worker])
            for worker, answer in wait(workers, 1.0):
                request = doing.pop(worker)
                if answer.get("died"):
                    workers[workers.index(worker)] = Worker(builder, [], log)
                if "error" in answer and ("calls" in request or "No space left" in answer["error"]):
                    raise TuningError(f"the batch cannot be written: {answer['error']}")
                failed = failed or str(answer.get("error", ""))
            progress("compiling candidates", 1 - (len(left) + len(doing)) / max(1, total))
    finally:
        for worker in workers:
            worker.close()
    return failed


def _copy_package(part: Path) -> None:
    package = Path(tvm_attn.__file__).parent
    kept = shutil.ignore_patterns("__pycache__", "src", "page", "cuda", "onnx", "serving", "_data")
    shutil.copytree(package, part / "tvm_attn", ignore=kept, dirs_exist_ok=True)
    (part / "run.py").write_text(_RUN, encoding="utf-8")


def import_results(file: Path, tasks: Sequence[Task], target: Target, work: Path) -> int:
    """Adds times that came back to the measurements in a work folder.

    Returns:
        The number of measurements that were new.

    Raises:
        TuningError: the file cannot be read, or has no times for these kernels.
    """
    from tvm_attn.tuning.calls import calls_of
    from tvm_attn.tuning.tuner import workload_of

    place = place_of(target)
    names = {workload_of(task.space, place): (task.name, len(calls_of(task.space.kernel))) for task in tasks}
    work.mkdir(parents=True, exist_ok=True)
    log, added, fitting = Measurements(work), 0, 0
    for workload, measurement in _read_results(file):
        name, calls = names.get(workload, ("", 0))
        if not calls or len(measurement.seconds or range(calls)) != calls:
            continue
        fitting += 1
        if key_of(measurement.decisions) not in log.known(workload):
            log.add(workload, name, measurement)
            added += 1
    if not fitting:
        raise TuningError(
            f"{shorten_path(file)} has no times for these kernels: give the --target, --model, --dtype and --quant, "
            "and the version of tvm_attn, that the batch was made with"
        )
    return added


def _read_results(file: Path) -> list[tuple[str, Measurement]]:
    found = []
    for line in read_text(file, _LARGEST_RESULTS, TuningError).splitlines():
        try:
            table = parse_json(line, "a line", TuningError)
        except TuningError:
            continue  # half a line, if the run was killed
        if measurement := to_measurement(table):
            found.append((table["workload"], measurement))
    return found


# --- on the other machine ---

_NAME = text(r"kernels/\d{1,6}(/\d{1,9}\.so)?", "a file of the batch")
_CANDIDATE = {
    "file": _NAME,
    "sha256": text(r"[0-9a-f]{64}"),
    "decisions": INTEGERS,
}
_KERNEL = {
    "workload": text(),
    "kernel": text(),
    "folder": _NAME,
    "candidates": list_of(
        Rule("a candidate", lambda value: problem(value, _CANDIDATE) is None), "candidates", most=10**6
    ),
}
_RULES = {
    "format": integer(_FORMAT, _FORMAT),
    "version": text(),
    "target": text(),
    "device": text(r"\w+"),
    "kernels": list_of(
        Rule("a kernel", lambda value: problem(value, _KERNEL) is None), "a list of kernels", most=10**5
    ),
}


def run_batch(batch: Path, progress: Progress = lambda message, share: None) -> tuple[int, int]:
    """Measures the candidates of a batch on this machine, and writes `results.jsonl` into it.

    The same call goes on where an earlier one stopped.

    Returns:
        The number of candidates with a time, and of those that failed.

    Raises:
        TuningError: the folder is no batch, is damaged, or this machine has no device for it.
    """
    facts = read_json(batch / _BATCH, _LARGEST_JSON, TuningError)
    if fault := problem(facts, _RULES):
        raise TuningError(f"{shorten_path(batch / _BATCH)}: {fault}; export the batch again")
    kind = device_class(facts["device"]) if facts["device"] in ("cpu", "cuda", "vulkan") else None
    if kind is None or (reason := kind.obstacle()):
        raise TuningError(f"this machine has no device for the batch: {reason if kind else facts['device']}")
    file = batch / RESULTS
    done = {(workload, key_of(entry.decisions)) for workload, entry in _read_results(file)} if file.exists() else set()
    total = sum(len(entry["candidates"]) for entry in facts["kernels"])
    measured, number = 0, 0
    worker: Worker | None = None
    environment = {"TVM_NUM_THREADS": str(usable_cores()), "TVM_USE_RUNTIME_LIB": "1"}
    try:
        with file.open("a", encoding="utf-8") as out:
            for kernel in facts["kernels"]:
                ready = False
                for candidate in kernel["candidates"]:
                    number += 1
                    progress(f"measuring {kernel['kernel']}", number / total)
                    if (kernel["workload"], key_of(candidate["decisions"])) in done:
                        continue
                    library = batch / candidate["file"]
                    content = read_bytes(library, _LARGEST_LIBRARY, TuningError)
                    if hashlib.sha256(content).hexdigest() != candidate["sha256"]:
                        raise TuningError(f"{shorten_path(library)} is damaged: copy the batch again")
                    if worker is None:
                        worker = Worker("tvm_attn.tuning.runner", [facts["device"]], batch / "run.log", environment)
                        ready = False
                    if not ready:
                        answer = ask(worker, {"calls": str(batch / kernel["folder"])})
                        if "error" in answer:
                            raise TuningError(f"the inputs of {kernel['kernel']} cannot be read: {answer['error']}")
                        ready = True
                    answer = ask(worker, {"library": str(library)}, HANG_SECONDS)
                    if answer.get("died"):
                        worker = None
                    line = {name: kernel[name] for name in ("workload", "kernel")} | {
                        "decisions": candidate["decisions"]
                    }
                    if "error" in answer:
                        line["error"] = answer["error"]
                    else:
                        line |= {"seconds": answer["seconds"], "load": answer["load"]}
                        measured += 1
                    out.write(json.dumps(line) + "\n")
                    out.flush()
    except OSError as error:
        raise TuningError(f"{shorten_path(file)} cannot be written: {one_line(error)}") from error
    finally:
        if worker is not None:
            worker.close()
    results = _read_results(file)
    return sum(entry.seconds is not None for _, entry in results), sum(entry.seconds is None for _, entry in results)
