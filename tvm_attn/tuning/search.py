"""Measures the candidates of one kernel with MetaSchedule, and stores the times in its database.

MetaSchedule's own strategies derive the inputs from the function and accept only static sizes. Here the design space is
the list of all candidates, and the strategy walks through it; the inputs come from the kernel (`workers`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import tvm
import tvm_ffi
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.support.popen_pool import PopenPoolExecutor

from tvm_attn.errors import TuningError
from tvm_attn.kernels.base import shape_of
from tvm_attn.tuning import workers
from tvm_attn.tuning.calls import calls_of
from tvm_attn.tuning.space import Candidate, Space, indices_of, to_schedule

# A worker that waits forever is given up after this time. A candidate's own limit is `workers.PROCESSOR_SECONDS`: on a
# busy machine, elapsed time says nothing about it.
_HANG_SECONDS = 600
# MetaSchedule stores this time for a candidate that failed.
_FAILED_SECONDS = 1e9
# Candidates are compiled side by side and then measured one by one; more at a time would delay the first result.
_MAX_BUILDERS = 8


@dataclass(frozen=True)
class Measurement:
    """The measurement of a candidate.

    Attributes:
        indices: the candidate's decisions, one index per choice.
        seconds: time of each of the kernel's calls; None if it did not compile, run, or give the right result.
    """

    indices: tuple[int, ...]
    seconds: tuple[float, ...] | None


def note(known: dict[tuple[int, ...], Measurement], measurement: Measurement) -> None:
    """Adds a measurement. Of two for a candidate, the shorter times count; if one failed, the candidate failed."""
    before, seconds = known.get(measurement.indices), measurement.seconds
    if before is not None and before.seconds is not None and seconds is not None:
        seconds = tuple(map(min, before.seconds, seconds))
    elif before is not None:
        seconds = None
    known[measurement.indices] = Measurement(measurement.indices, seconds)


@derived_object
class _Builder(ms.builder.PyBuilder):
    """Compiles in workers that keep running. MetaSchedule's starts new ones for each batch, with 2 s of imports."""

    def __init__(self, pool: PopenPoolExecutor, folder: Path) -> None:
        super().__init__()
        self._pool, self._folder, self._count = pool, folder, 0

    def build(self, build_inputs: list[Any]) -> list[Any]:
        """See `ms.builder.PyBuilder`."""
        futures = []
        for given in build_inputs:
            self._count += 1
            # A folder of its own, because MetaSchedule removes the folder afterwards.
            library = self._folder / str(self._count) / "candidate.so"
            library.parent.mkdir()
            futures.append(self._pool.submit(workers.build, given.mod, given.target, str(library)))
        return [_result(future) for future in futures]


def _result(future: Any) -> Any:
    try:
        return ms.builder.BuilderResult(future.result(), None)
    except TimeoutError:
        return ms.builder.BuilderResult(None, f"compiling did not end within {_HANG_SECONDS} s")
    except Exception as error:  # whatever the worker raised, with its traceback as the message
        return ms.builder.BuilderResult(None, f"compiling failed: {error}")


@derived_object
class _InOrder(ms.search_strategy.PySearchStrategy):
    """Hands out every schedule of the design space once, a batch at a time."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self._batch = batch
        self._schedules: list[Any] = []

    def _initialize_with_tune_context(self, context: Any) -> None:
        pass

    def pre_tuning(self, max_trials: int, num_trials_per_iter: int, design_spaces: list[Any], *_: Any) -> None:
        """See `ms.search_strategy.PySearchStrategy`, as for the methods below."""
        self._schedules = list(design_spaces)

    def post_tuning(self) -> None:
        pass

    def generate_measure_candidates(self) -> list[Any] | None:
        batch, self._schedules = self._schedules[: self._batch], self._schedules[self._batch :]
        # Without descriptions of arguments: they would have to be static, and the workers have their own inputs.
        return [ms.search_strategy.MeasureCandidate(schedule, []) for schedule in batch] or None

    def notify_runner_results(self, measure_candidates: list[Any], results: list[Any]) -> None:
        pass


@derived_object
class _Notify(ms.measure_callback.PyMeasureCallback):
    """Reports every result. It runs after the database's callback, so that a reported result is already stored."""

    def __init__(self, notify: Callable[[Measurement, str | None], None]) -> None:
        super().__init__()
        self._notify = notify

    def apply(
        self,
        _scheduler: Any,
        _task_id: int,
        measure_candidates: list[Any],
        _builder_results: list[Any],
        runner_results: list[Any],
    ) -> None:
        """See `ms.measure_callback.PyMeasureCallback`."""
        for candidate, result in zip(measure_candidates, runner_results, strict=True):
            message = result.error_msg
            seconds = None if message is not None else tuple(map(float, result.run_secs))
            self._notify(Measurement(indices_of(candidate.sch.trace), seconds), message)


class Session:
    """The processes and files of a search on one target.

    Args:
        work: the work folder, which holds MetaSchedule's database and the log.
        threads: number of threads of a measured call.

    Use it as a context manager; leaving it ends the worker processes.

    Raises:
        TuningError: the database cannot be read.
    """

    def __init__(self, work: Path, threads: int) -> None:
        self._work, self._threads = work, threads
        self._log = work / "workers.log"
        self._builders = min(_MAX_BUILDERS, threads)
        self._database = _open_database(work)

    def __enter__(self) -> Session:
        self._libraries = tempfile.TemporaryDirectory(prefix="libraries-", dir=self._work)
        # A worker's errors are discarded until `start` sends them to the log, because Ctrl-C reaches every process.
        initializer = partial(workers.start, str(self._log))
        self._pool = PopenPoolExecutor(self._builders, _HANG_SECONDS, initializer, stderr=subprocess.DEVNULL)
        self._builder = _Builder(self._pool, Path(self._libraries.name))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._libraries.cleanup()

    def known(self, space: Space) -> dict[tuple[int, ...], Measurement]:
        """The measurements of a kernel in the database."""
        workload = self._database.commit_workload(self._workload(space))
        known: dict[tuple[int, ...], Measurement] = {}
        for record in self._database.get_all_tuning_records():
            if record.workload.same_as(workload):
                seconds = tuple(map(float, record.run_secs))
                measured = None if max(seconds) >= _FAILED_SECONDS else seconds
                note(known, Measurement(indices_of(record.trace), measured))
        return known

    @contextmanager
    def measuring(
        self, space: Space, notify: Callable[[Measurement, str | None], None]
    ) -> Iterator[Callable[[list[Candidate]], None]]:
        """Yields a function that measures candidates of a kernel.

        `notify` gets each result, and an error message if it has no times.
        """
        runner = ms.runner.LocalRunner(
            timeout_sec=_HANG_SECONDS,
            f_alloc_argument=workers.no_arguments,
            f_run_evaluator=workers.run,
            initializer=partial(workers.start_runner, str(self._log), space.kernel),
        )
        try:
            yield lambda candidates: self._measure(space, candidates, runner, notify)
        finally:
            runner.pool.shutdown()

    def _measure(
        self,
        space: Space,
        candidates: list[Candidate],
        runner: Any,
        notify: Callable[[Measurement, str | None], None],
    ) -> None:
        with _without_tensor_intrinsics():
            context = ms.TuneContext(
                self._workload(space),
                target=tvm.target.Target({**space.target.tvm, "num-cores": self._threads}),
                space_generator=ms.space_generator.ScheduleFn(
                    lambda _: [to_schedule(candidate) for candidate in candidates],
                    sch_rules=[],
                    postprocs=[],
                    mutator_probs={},
                ),
                search_strategy=_InOrder(self._builders),
                task_name=space.kernel.family,
                num_threads=self._threads,
                rand_state=1,
            )
        ms.task_scheduler.RoundRobin().tune(
            tasks=[context],
            task_weights=[1.0],
            max_trials_global=len(candidates),
            max_trials_per_task=len(candidates),
            num_trials_per_iter=self._builders,
            builder=self._builder,
            runner=runner,
            measure_callbacks=[
                ms.measure_callback.AddToDatabase(),
                ms.measure_callback.RemoveBuildArtifact(),
                _Notify(notify),
            ],
            database=self._database,
            cost_model=None,
        )

    def _workload(self, space: Space) -> tvm.IRModule:
        """The kernel as MetaSchedule's database knows it.

        Its key is the hash of the function, so everything else that affects the times goes into an attribute.
        """
        key = {
            "template": space.template.name,
            "version": space.template.version,
            "shape": shape_of(space.kernel),
            "choices": [[choice.name, list(choice.candidates)] for choice in space.choices],
            "scheduled": tvm_ffi.structural_hash(space.function),
            "calls": [call.name for call in calls_of(space.kernel)],
            "threads": self._threads,
            "target": space.target.tvm,
        }
        function = space.function.with_attr("global_symbol", "main")
        # For MetaSchedule's log, because its own count stops at vector shuffles.
        function = function.with_attr("estimated_flops", sum(call.flops or 0 for call in calls_of(space.kernel)))
        return tvm.IRModule({"main": function.with_attr("tvm_attn.search", json.dumps(key, sort_keys=True))})


def _open_database(work: Path) -> Any:
    for name in ("database_workload.json", "database_tuning_record.json"):
        # A search that was killed may have left half a line at the end, and the database refuses such a file.
        if (work / name).is_file():
            content = (work / name).read_bytes()
            os.truncate(work / name, content.rfind(b"\n") + 1)
    try:
        return ms.database.JSONDatabase(work_dir=str(work))
    except (RuntimeError, ValueError, TypeError) as error:
        raise TuningError(f"the measurements in {work} cannot be read: remove the folder or choose another") from error


@contextmanager
def _without_tensor_intrinsics() -> Iterator[None]:
    """Hides the tensor intrinsics, which take MetaSchedule 20 s to import and which no template here uses."""
    name = "tvm.s_tir.tensor_intrin"
    hide = name not in sys.modules
    if hide:
        sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        if hide:
            del sys.modules[name]


@contextmanager
def worker_environment(threads: int) -> Iterator[None]:
    """Sets environment variables that worker processes inherit: the number of threads, and the path of this package."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    wanted = {"TVM_NUM_THREADS": str(threads), "PYTHONPATH": path}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
