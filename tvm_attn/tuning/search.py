"""The search of one kernel: candidates are compiled in some workers while others measure what is compiled.

Explorer + strategy ──► builders ──► libraries ──► runners ──► measurements.jsonl
                           (compile)                (check, time)
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tvm_attn.errors import TuningError
from tvm_attn.kernels.base import label, shape_of
from tvm_attn.tuning.calls import calls_of
from tvm_attn.tuning.load import Load
from tvm_attn.tuning.measurements import CALM, Key, Measurement, Measurements, key_of, shares
from tvm_attn.tuning.process import Worker, wait
from tvm_attn.tuning.space import Candidate, Explorer, Space
from tvm_attn.tuning.strategy import sampled_pick

BUILDER, RUNNER = "tvm_attn.tuning.builder", "tvm_attn.tuning.runner"
ENOUGH = 0.97
"""Share of the hardware's limit at which a search ends."""
_GAIN = 0.01
"""A new best time counts as an improvement if it is shorter by this share."""
_PATIENCE = 16
"""The search of a kernel ends if so many candidates, or a quarter of the most, bring no improvement."""
_FINALISTS = 3
"""Number of the best candidates that are measured again, in turns with the defaults."""
_ROUNDS = 2
_ATTEMPTS = 2
"""A candidate on which a far machine was lost so often is the cause."""
_MAX_BUILDERS = 8


@dataclass(frozen=True)
class Place:
    """Where candidates are measured.

    Attributes:
        device: the device, e.g. "cpu" or "vulkan:0".
        name: what tells it from others of its kind, for the key of its measurements.
        shares_cores: whether the device computes with the cores that compile, which then wait while it measures.
        threads: number of threads of a call on a processor.
        rpc: tracker (HOST:PORT) and key, if the device is behind TVM's RPC.
        devices: number of devices that measure at once.
    """

    device: str
    name: str
    shares_cores: bool
    threads: int
    rpc: tuple[str, str] | None = None
    devices: int = 1


class Crew:
    """The worker processes of a search on one target.

    Args:
        work: the work folder.
        target: what `--target` named.
        place: where candidates are measured.
        builder, runner: the modules of the workers.

    Use it as a context manager; leaving it ends the processes and removes what they wrote.
    """

    def __init__(self, work: Path, target: str, place: Place, builder: str = BUILDER, runner: str = RUNNER) -> None:
        self.place, self.target = place, target
        self._builder, self._runner = builder, runner
        self._log, self.scratch = work / "workers.log", work / "libraries"
        self.builders: list[Worker] = []
        self.runners: list[Worker] = []
        self.ready: dict[Worker, Path] = {}  # the calls that a runner has read

    def __enter__(self) -> Crew:
        shutil.rmtree(self.scratch, ignore_errors=True)  # a killed search left them there
        self.scratch.mkdir(parents=True, exist_ok=True)
        try:
            for _ in range(min(_MAX_BUILDERS, self.place.threads)):
                self.builders.append(self._new_builder())
            for _ in range(self.place.devices):
                self.runners.append(self._new_runner())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self.builders, *self.runners):
            worker.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _new_builder(self) -> Worker:
        return Worker(self._builder, [], self._log)

    def _new_runner(self) -> Worker:
        remote = ["--rpc", self.place.rpc[0], "--key", self.place.rpc[1]] if self.place.rpc else []
        environment = {"TVM_NUM_THREADS": str(self.place.threads), "TVM_USE_RUNTIME_LIB": "1"}
        return Worker(self._runner, [self.place.device, *remote], self._log, environment)

    def replace(self, worker: Worker) -> None:
        """Starts another worker in the place of one that has ended."""
        if worker in self.builders:
            self.builders[self.builders.index(worker)] = self._new_builder()
        else:
            self.ready.pop(worker, None)
            self.runners[self.runners.index(worker)] = self._new_runner()

    def drop(self, runner: Worker) -> None:
        """Does without a device that cannot be reached any more."""
        runner.close()
        self.runners.remove(runner)


@dataclass
class _Job:
    """A candidate on its way."""

    candidate: Candidate
    library: Path
    attempts: int = 0


@dataclass
class KernelSearch:
    """The search of one kernel's decisions.

    Attributes:
        space: the decisions.
        workload: the key of its measurements.
        crew: the workers.
        log: the file of measurements.
        trials: the most candidates.
        first: decisions to begin with, after the defaults, such as those of related targets.
        seconds: about how long to search; None for no limit.
        notify: called after each result.
        known: what has been measured.
        late: candidates whose limit of time was reached, which says nothing about them.
        lost: reasons why devices were given up.
    """

    space: Space
    workload: str
    crew: Crew
    log: Measurements
    trials: int
    first: Sequence[Mapping[str, int]] = ()
    seconds: float | None = None
    notify: Callable[[], None] = lambda: None
    known: dict[Key, Measurement] = field(init=False)
    late: int = field(default=0, init=False)
    lost: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        calls = calls_of(self.space.kernel)
        known = self.log.known(self.workload).items()
        # Lines that somebody changed may have any number of times.
        self.known = {key: entry for key, entry in known if entry.seconds is None or len(entry.seconds) == len(calls)}
        self._default = self.space.at({})
        assert self._default is not None
        self._limits = [call.limit_seconds(self.space.target.peak) for call in calls]
        self._explorer, self._rng = Explorer(self.space), np.random.default_rng(0)
        self._folder = self.crew.scratch / self.workload
        self._until = None if self.seconds is None else time.monotonic() + self.seconds
        self._count, self._stale = 0, 0
        self._again: deque[Candidate] = deque()
        self._late_before: set[Key] = set()

    @property
    def default(self) -> Measurement | None:
        """What is known of the template's own decisions."""
        assert self._default is not None
        return self.known.get(key_of(self._default.decisions))

    @property
    def best(self) -> Measurement | None:
        """The fastest candidate; None if none has a time."""
        found = min(self.known.values(), key=lambda entry: entry.mean, default=None)
        return None if found is None or found.seconds is None else found

    @property
    def share(self) -> float | None:
        """The best time as a share of the hardware's limit; None if that is not known."""
        return shares(self._limits, self.best.seconds) if self.best and self.best.seconds else None

    def run(self) -> None:
        """Searches, until there is no reason to go on.

        Raises:
            TuningError: nothing can be measured, or a result cannot be stored.
        """
        try:
            if self.log.finished(self.workload) < self.trials:
                self._drive(self._explore())
                self._drive(self._retry())
                if self._until is None or time.monotonic() < self._until:
                    self._compare()
                    self.log.finish(self.workload, label(self.space.kernel), self.trials)
            elif any(entry is not None and not entry.is_calm for entry in (self.best, self.default)):
                self._compare()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _compare(self) -> None:
        """Measures the best ones and the defaults again, in turns: another program may have slowed one of them down."""
        ranked = sorted((entry for entry in self.known.values() if entry.seconds), key=lambda entry: entry.mean)
        if len(ranked) < 2:
            return
        finalists = [self.space.at(entry.decisions) for entry in ranked[:_FINALISTS]]
        if self.default is not None and self.default.seconds and self.default not in ranked[:_FINALISTS]:
            finalists.append(self._default)
        self._drive(candidate for _ in range(_ROUNDS) for candidate in finalists if candidate is not None)

    # --- which candidates ---

    def _explore(self) -> Iterator[Candidate]:
        given = [self._default, *(self.space.at(decisions) for decisions in self.first)]
        for candidate in given:
            if (
                candidate is not None
                and self._explorer.take(candidate)
                and key_of(candidate.decisions) not in self.known
            ):
                self._count += 1
                yield candidate
        self._count = max(self._count, len(self.known))
        while self._count < self.trials and not self._is_enough():
            candidate = self._explorer.next(sampled_pick(self.known.values(), self._rng))
            if candidate is None:
                return
            if key_of(candidate.decisions) not in self.known:
                self._count += 1
                yield candidate

    def _is_enough(self) -> bool:
        late = self._until is not None and time.monotonic() > self._until
        near = self.share is not None and self.share >= ENOUGH
        return late or near or self._stale >= max(_PATIENCE, self.trials // 4)

    def _retry(self) -> Iterator[Candidate]:
        while self._again and not self._is_enough():
            yield self._again.popleft()

    # --- workers ---

    def _drive(self, candidates: Iterable[Candidate]) -> None:
        """Compiles and measures candidates."""
        crew, supply = self.crew, iter(candidates)
        self._built: deque[_Job] = deque()
        self._building: dict[Worker, _Job | None] = {}
        self._running: dict[Worker, tuple[_Job, Load]] = {}
        more = True
        while True:
            while more and self._wants_more():
                candidate = next(supply, None)
                more = candidate is not None
                if candidate is not None:
                    self._build(candidate)
            self._start_measuring()
            busy = [*self._building, *self._running]
            if not busy and not self._built and not more:
                return
            if crew.place.shares_cores:
                quiet = any(worker in crew.ready for worker in self._running)
                for builder in self._building:
                    builder.pause() if quiet else builder.resume()
            for worker, answer in wait(busy, 1.0):
                if worker in self._building:
                    self._on_built(worker, answer)
                else:
                    self._on_measured(worker, answer)

    def _wants_more(self) -> bool:
        crew = self.crew
        free = any(not builder.busy for builder in crew.builders)
        return free and len(self._built) + len(self._building) < len(crew.builders) + len(crew.runners)

    def _build(self, candidate: Candidate) -> None:
        free = [builder for builder in self.crew.builders if not builder.busy]
        kernel = shape_of(self.space.kernel)
        if not self._folder.exists():
            self._folder.mkdir()
            free[0].send({"calls": str(self._folder), "kernel": kernel})
            self._building[free.pop(0)] = None
        number = "-".join(map(str, candidate.indices))
        job = _Job(candidate, self._folder / f"{number or 'only'}.so")
        if job.library.exists() or not free:
            self._built.append(job)
            return
        request = {"library": str(job.library), "target": self.crew.target, "decisions": candidate.decisions}
        free[0].send(request | {"kernel": kernel})
        self._building[free[0]] = job

    def _start_measuring(self) -> None:
        for runner in self.crew.runners:
            if not self._built or runner.busy or not (self._folder / "calls.json").exists():
                continue
            if not self._built[0].library.exists():  # there was no free builder
                job = self._built.popleft()
                self._build(job.candidate)
                continue
            job = self._built.popleft()
            self._running[runner] = job, Load()
            if self.crew.ready.get(runner) == self._folder:
                runner.send({"library": str(job.library)})
            else:
                self.crew.ready.pop(runner, None)
                runner.send({"calls": str(self._folder)})

    def _on_built(self, builder: Worker, answer: Mapping[str, Any]) -> None:
        job = self._building.pop(builder)
        if answer.get("died"):
            self.crew.replace(builder)
        if job is None:
            if "error" in answer:
                raise TuningError(f"the inputs of {label(self.space.kernel)} cannot be made: {answer['error']}")
        elif "timeout" in answer:
            self._on_late(job)
        elif "error" in answer:
            self._note(Measurement(job.candidate.decisions, None, error=f"compiling: {answer['error']}"))
        else:
            self._built.append(job)

    def _on_measured(self, runner: Worker, answer: Mapping[str, Any]) -> None:
        job, load = self._running.pop(runner)
        read_inputs = runner not in self.crew.ready
        if read_inputs and "error" not in answer:
            self.crew.ready[runner] = self._folder
            self._running[runner] = job, Load()
            runner.send({"library": str(job.library)})
            return
        if read_inputs:
            self._lose(runner, job, answer["error"])
            return
        if answer.get("died"):
            self.crew.replace(runner)
        used = load.since()
        if "timeout" in answer and (used is None or used > CALM):
            self._on_late(job)
        elif answer.get("died") and self.crew.place.rpc and job.attempts + 1 < _ATTEMPTS:
            job.attempts += 1
            self._built.append(job)
        elif "error" in answer:
            self._note(Measurement(job.candidate.decisions, None, error=answer["error"]))
        else:
            self._note(Measurement(job.candidate.decisions, tuple(answer["seconds"]), answer["load"]))

    def _lose(self, runner: Worker, job: _Job, reason: str) -> None:
        """A device that cannot even read the inputs: others may go on."""
        self._built.appendleft(job)
        self.crew.drop(runner)
        self.lost.append(reason)
        if not self.crew.runners:
            raise TuningError(f"{self.crew.place.device} cannot measure {label(self.space.kernel)}: {reason}")

    def _on_late(self, job: _Job) -> None:
        key = key_of(job.candidate.decisions)
        if key in self._late_before:
            self.late += 1
        else:
            self._late_before.add(key)
            self._again.append(job.candidate)

    def _note(self, measurement: Measurement) -> None:
        if measurement.error is not None and "No space left" in measurement.error:
            raise TuningError(f"{measurement.error}: free some space; the same command continues from there")
        before = self.best
        merged = self.log.add(self.workload, label(self.space.kernel), measurement)
        self.known[key_of(measurement.decisions)] = merged
        improved = before is None or merged.mean < before.mean * (1 - _GAIN)
        self._stale = 0 if improved else self._stale + 1
        self.notify()
