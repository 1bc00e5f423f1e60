"""The search over the kernels of a model on one target: which kernels, in which order, and what was found."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs
import tvm
import tvm_ffi

from tvm_attn.compiler.devices import backend_for
from tvm_attn.compiler.linker import find_cxx
from tvm_attn.errors import TargetError, TuningError, one_line, shorten
from tvm_attn.inventory import obstacle
from tvm_attn.kernels import Kernel
from tvm_attn.kernels.base import label, shape_of
from tvm_attn.model.module import Program
from tvm_attn.runtime.devices import device_class
from tvm_attn.runtime.machine import usable_cores
from tvm_attn.schedule import Record, RecordBook
from tvm_attn.targets import Target
from tvm_attn.tuning.calls import calls_of
from tvm_attn.tuning.measurements import FILE, Measurement, Measurements, geometric_mean
from tvm_attn.tuning.records import to_record
from tvm_attn.tuning.search import BUILDER, RUNNER, Crew, KernelSearch, Place
from tvm_attn.tuning.space import Space
from tvm_attn.tuning.whole import Verdict, uses

TRIALS = 64
"""Default for the most candidates of a kernel."""
_LEAST_SECONDS = 5.0
"""Every kernel is searched at least so long, whatever its share of the time."""


@dataclass(frozen=True)
class Progress:
    """How far a search has got.

    Attributes:
        done: number of candidates that have been measured, including those of an earlier search.
        total: number of candidates in all; an upper bound until every kernel has been reached.
        kernel: the kernel that is being searched.
        best_us: the best time of that kernel so far, microseconds, or None.
        speedup: the time of the template's defaults divided by the best time, or None if one of them is not known.
        limit: the best time as a share of the hardware's limit, or None if that is not known.
        seconds_left: estimate of the time that is left; None if there is none yet.
    """

    done: int
    total: int
    kernel: str
    best_us: float | None = None
    speedup: float | None = None
    limit: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True)
class Found:
    """What was found for one kernel.

    Attributes:
        kernel: the kernel's short name.
        record: the best decisions, measured now or in an earlier search that this one continues.
        speedup: the time of the template's defaults divided by that of the record; None if the defaults failed.
        gain: the time with the decisions that a build took before divided by that of the record; None if that failed.
        share: the kernel's share of the model's time, estimated from the hardware's limits.
        measured: number of candidates with a time.
        failed: number of candidates that did not compile, run, or give the right result.
        late: number of candidates of which nothing is known, because a limit of time was reached.
        load: cores that other programs used while the record was measured; None if that is not known.
        times_us: mean times of the candidates in the order in which they were measured; None for one that failed.
    """

    kernel: str
    record: Record
    speedup: float | None
    gain: float | None
    share: float
    measured: int
    failed: int
    late: int
    load: float | None
    times_us: tuple[float | None, ...] = field(repr=False, default=())


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        target: the target's name.
        found: the results for the kernels that have choices, in the order in which they were searched.
        skipped: kernels that were not reached within the time, or of which no candidate could be measured.
        work: the work folder, with the measurements and the logs.
        interrupted: whether Ctrl-C ended the search; the same search continues from there.
        notes: what the user should know, one line each.
        verdict: what whole calls say; None if they were not measured.
        files: the record files that were written.
    """

    target: str
    found: tuple[Found, ...]
    skipped: tuple[str, ...]
    work: Path
    interrupted: bool = False
    notes: tuple[str, ...] = ()
    verdict: Verdict | None = None
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Options:
    """How to search.

    Attributes:
        trials: the most candidates of a kernel.
        minutes: about how long to search; None for no limit.
        force: write records although other programs used the machine.
        builder, runner: modules of the workers.
    """

    trials: int = TRIALS
    minutes: float | None = None
    force: bool = False
    builder: str = BUILDER
    runner: str = RUNNER


@dataclass(frozen=True)
class Task:
    """A kernel to search.

    Attributes:
        space: its decisions.
        share: its share of the model's time.
        functions: the functions of the model that call it.
    """

    space: Space
    share: float
    functions: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The kernel's short name."""
        return label(self.space.kernel)


def work_folder(target: str) -> Path:
    """The default folder for the measurements of a target."""
    return platformdirs.user_cache_path("tvm-attn") / "tune" / target


def plan_tasks(program: Program, target: Target, families: Sequence[str] | None = None) -> list[Task]:
    """The kernels of a program that have choices, those with the largest share of the model's time first.

    Raises:
        TuningError: the model has no kernels of a family that was named.
        ScheduleError: a kernel has no template.
    """
    available = sorted({kernel.family for kernel in program.kernels.values()})
    unknown = sorted(set(families or ()) - set(available))
    if unknown:
        raise TuningError(f"the model has no kernels {', '.join(unknown)}; it has {', '.join(available)}")
    counts, totals = uses(program), dict[str, float]()
    weights: dict[str, dict[str, float]] = {}
    for name, kernel in program.kernels.items():
        seconds = _least_seconds(kernel, target)
        weights[name] = {function: count * seconds for function, count in counts[name].items()}
        for function, weight in weights[name].items():
            totals[function] = totals.get(function, 0.0) + weight
    # What computes tokens counts the same; scores, traces and packing are rarely called.
    importance = {function: 1.0 if function.startswith(("prefill", "decode", "step")) else 0.05 for function in totals}
    whole = sum(importance.values()) or 1.0
    tasks = []
    for name, kernel in program.kernels.items():
        space = Space.of(kernel, target)
        if space.size > 1 and (families is None or kernel.family in families):
            share = sum(importance[function] * weight / totals[function] for function, weight in weights[name].items())
            tasks.append(Task(space, share / whole, frozenset(counts[name])))
    return sorted(tasks, key=lambda task: -task.share)


def _least_seconds(kernel: Kernel, target: Target) -> float:
    """What the hardware's limits allow, or a time in proportion to the memory traffic if they are not known."""
    return geometric_mean([call.limit_seconds(target.peak) or call.bytes / 1e11 for call in calls_of(kernel)])


def check_target(target: Target, dtype: str, quant: str) -> None:
    """Checks that a target can be measured on this machine.

    Raises:
        TargetError: it cannot.
    """
    if reason := obstacle(target, dtype, quant):
        elsewhere = "run the search on such hardware, or see --export and --rpc"
        raise TargetError(f"{target.name} cannot be measured on this machine ({reason}); {elsewhere}")


def local_place(target: Target) -> Place:
    """The first device of a target's class on this machine."""
    kind, threads = device_class(target.device), usable_cores()
    if target.device == "cpu":
        from tvm.target.codegen import llvm_get_system_cpu

        return Place("cpu", str(llvm_get_system_cpu()), True, threads)
    first = kind.find()[0]
    return Place(first.device, first.name, kind.is_software(), threads)


def remote_place(target: Target, tracker: str, key: str) -> Place:
    """The devices that a tracker of TVM's RPC lends under a key.

    Raises:
        TuningError: the tracker cannot be reached, or has no such device.
    """
    host, _, port = tracker.rpartition(":")
    if not host or not port.isdecimal():
        raise TuningError(f"{shorten(tracker)} names no tracker; give HOST:PORT, e.g. 192.168.1.10:9190")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise TuningError(
            f"no tracker answers at {tracker} ({one_line(error)}); start one: python -m tvm.exec.rpc_tracker"
        ) from None
    from tvm import rpc

    summary = rpc.connect_tracker(host, int(port)).summary()["queue_info"]
    devices = int(summary.get(key, {}).get("free", 0))
    if not devices:
        known = ", ".join(sorted(summary)) or "none"
        raise TuningError(f"the tracker at {tracker} has no free device with the key {shorten(key)}; its keys: {known}")
    return Place(target.device, f"rpc {key}", False, usable_cores(), (tracker, key), devices)


def search(
    tasks: Sequence[Task],
    target: Target,
    named: str,
    place: Place,
    work: Path,
    options: Options = Options(),
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Tuned:
    """Searches kernels one after another. Writes no records.

    Args:
        tasks: the kernels.
        target: the hardware.
        named: what names the target to `targets.resolve` in another process.
        place: where candidates are measured.
        work: the work folder.
        options: how to search.
        progress: called after each candidate.

    Raises:
        TuningError: the work folder is not usable, or no candidate could be measured.
        CompileError: a compiler is missing.
    """
    find_cxx(target.architecture)
    backend_for(target).tvm_target(target)  # refuses what LLVM does not know, before workers do
    backend_for(target).check(target)
    state = _State(target, place, options, tasks, progress)
    with _locked(work):
        log = Measurements(work)
        if log.foreign:
            state.notes.append(f"{log.foreign} lines of {work / FILE} are no measurements, and are left out")
        interrupted = False
        try:
            with Crew(work, named, place, options.builder, options.runner) as crew:
                for task in tasks:
                    state.search(task, crew, log)
        except KeyboardInterrupt:
            interrupted = True
    if not interrupted and not state.found and state.failure is not None:
        raise TuningError(f"no candidate could be measured: {state.failure}; see {work / 'workers.log'}")
    return Tuned(target.name, tuple(state.found), tuple(state.skipped), work, interrupted, tuple(state.notes))


def workload_of(space: Space, place: Place) -> str:
    """The key of a kernel's measurements: a hash of everything that they depend on."""
    facts = {
        "template": space.template.name,
        "version": space.template.version,
        "shape": shape_of(space.kernel),
        "choices": [[choice.name, list(choice.candidates)] for choice in space.choices],
        "scheduled": tvm_ffi.structural_hash(space.function),
        "calls": [call.name for call in calls_of(space.kernel)],
        "target": space.target.identity,
        "device": place.name,
        "threads": place.threads,
        "tvm": tvm.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def earlier_decisions(space: Space, book: RecordBook) -> list[Mapping[str, int]]:
    """The decisions of records for a kernel: the target's own, then those of related targets."""
    found: list[Mapping[str, int]] = []
    for entry in book.entries(space.template, space.kernel):
        if entry.record.decisions not in found:
            found.append(entry.record.decisions)
    return found


class _State:
    """What a search has found so far."""

    def __init__(
        self,
        target: Target,
        place: Place,
        options: Options,
        tasks: Sequence[Task],
        progress: Callable[[Progress], None],
    ) -> None:
        self._place, self._options, self._progress = place, options, progress
        self._book = RecordBook.load(target)
        self._left = list(tasks)
        self._start = time.monotonic()
        self._done, self._measured_here = 0, 0
        self.found: list[Found] = []
        self.skipped: list[str] = []
        self.notes: list[str] = []
        self.failure: str | None = None

    def search(self, task: Task, crew: Crew, log: Measurements) -> None:
        """Searches a kernel."""
        seconds = self._seconds_for(task)
        self._left.remove(task)
        name = task.name
        if seconds is not None and seconds <= 0:
            self.skipped.append(name)
            return
        first = earlier_decisions(task.space, self._book)
        searched = KernelSearch(
            task.space, workload_of(task.space, self._place), crew, log, self._options.trials, first, seconds
        )
        self._done += len(searched.known)

        def notify() -> None:
            self._measured_here += 1
            self._done += 1
            self._report(searched, name)

        searched.notify = notify
        self._report(searched, name)
        try:
            searched.run()
        finally:
            self._note(searched, task, name, first)
        self.notes += [f"{self._place.device} is not used any more: {reason}" for reason in searched.lost]

    def _seconds_for(self, task: Task) -> float | None:
        """How long to search a kernel: its share of the time that is left."""
        if self._options.minutes is None:
            return None
        left = 60 * self._options.minutes - (time.monotonic() - self._start)
        if left <= 0:
            return 0.0
        shares = sum(other.share for other in self._left) or 1.0
        return min(left, max(_LEAST_SECONDS, left * task.share / shares))

    def _report(self, searched: KernelSearch, name: str) -> None:
        best, default = searched.best, searched.default
        total = self._done + sum(min(task.space.size, self._options.trials) for task in self._left)
        total += max(0, min(searched.space.size, self._options.trials) - len(searched.known))
        elapsed = time.monotonic() - self._start
        left = (total - self._done) * elapsed / self._measured_here if self._measured_here >= 3 else None
        if self._options.minutes is not None:
            left = max(0.0, min(left or math.inf, 60 * self._options.minutes - elapsed))
        speedup = default.mean / best.mean if best and default and default.seconds else None
        self._progress(
            Progress(self._done, total, name, best.mean * 1e6 if best else None, speedup, searched.share, left)
        )

    def _note(self, searched: KernelSearch, task: Task, name: str, first: Sequence[Mapping[str, int]]) -> None:
        entry = found_of(task, list(searched.known.values()), first, searched.late)
        if entry is not None:
            self.found.append(entry)
            return
        errors = [measurement.error for measurement in searched.known.values() if measurement.error]
        self.failure = self.failure or (errors[0] if errors else None)
        self.skipped.append(name)


def found_of(
    task: Task, known: Sequence[Measurement], first: Sequence[Mapping[str, int]] = (), late: int = 0
) -> Found | None:
    """What measurements say of a kernel; None if no candidate has a time.

    Args:
        task: the kernel.
        known: the measurements of its candidates, in the order in which they were made.
        first: decisions of earlier records, see `earlier_decisions`.
        late: see `Found`.
    """
    best = min(known, key=lambda entry: entry.mean, default=None)
    if best is None or best.seconds is None:
        return None
    usual = task.space.at({})
    default = next((entry for entry in known if usual is not None and entry.decisions == usual.decisions), None)
    before = next((entry for entry in known if first and entry.decisions == first[0]), default)
    return Found(
        kernel=task.name,
        record=to_record(task.space, best.decisions, best.seconds),
        speedup=_ratio(default, best),
        gain=_ratio(before, best),
        share=task.share,
        measured=sum(entry.seconds is not None for entry in known),
        failed=sum(entry.seconds is None for entry in known),
        late=late,
        load=best.load,
        times_us=tuple(entry.mean * 1e6 if entry.seconds else None for entry in known),
    )


def _ratio(entry: Measurement | None, best: Measurement) -> float | None:
    return entry.mean / best.mean if entry is not None and entry.seconds else None


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Makes the work folder and keeps other searches out of it."""
    with ExitStack() as stack:
        try:
            work.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(work / "lock", "w", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TuningError(
                f"another search is using {work}: wait for it, or choose another folder (--work)"
            ) from None
        except OSError as error:
            raise TuningError(f"cannot use {work}: {error.strerror}; choose another folder (--work)") from error
        yield
