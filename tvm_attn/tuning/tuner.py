"""The search over all kernels of a model on one target."""

from __future__ import annotations

import fcntl
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tvm_attn import targets
from tvm_attn.compiler.devices import layout_for
from tvm_attn.config import GPT2Config
from tvm_attn.errors import TargetError, TuningError
from tvm_attn.inventory import obstacle
from tvm_attn.kernels import Kernel
from tvm_attn.kernels.base import label
from tvm_attn.model.gpt2 import build_program
from tvm_attn.model.layout import check_types
from tvm_attn.model.weights import open_config
from tvm_attn.runtime.machine import usable_cores
from tvm_attn.schedule import Record
from tvm_attn.targets import Target
from tvm_attn.tuning.records import mean_seconds, merge, records_folder, require_mergeable, to_record
from tvm_attn.tuning.search import Measurement, Session, note, worker_environment
from tvm_attn.tuning.space import Candidate, Space

# Number of candidates (the defaults and the best ones) that are measured twice.
_FINALISTS = 4
TRIALS = 64
"""Default for the most candidates of a kernel."""


@dataclass(frozen=True)
class Progress:
    """How far a search has got.

    Attributes:
        done: number of candidates that have been measured, including those of an earlier search.
        total: number of candidates in all; an upper bound until every kernel has been reached.
        kernel: the kernel that is being searched.
        best_us: the best time of that kernel so far, microseconds, or None.
        speedup: the time of the template's defaults divided by the best time, or None if one of them is not known.
    """

    done: int
    total: int
    kernel: str
    best_us: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Found:
    """What was found for one kernel.

    Attributes:
        kernel: the kernel's short name.
        record: the best decisions, measured now or in an earlier search that this one continues.
        speedup: the time of the template's defaults divided by that of the record; None if the defaults failed.
        measured: number of candidates with a time.
        failed: number of candidates that did not compile, run, or give the right result.
    """

    kernel: str
    record: Record
    speedup: float | None
    measured: int
    failed: int


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        target: the target's name.
        found: the results for the kernels that have choices.
        files: the record files.
        work: the work folder, with the measurements and the logs.
        interrupted: whether Ctrl-C ended the search; the same search continues from there.
    """

    target: str
    found: tuple[Found, ...]
    files: tuple[Path, ...]
    work: Path
    interrupted: bool


def tune(
    model: str | Path | GPT2Config = "gpt2",
    target: str = "cpu",
    dtype: str = "float32",
    quant: str = "none",
    trials: int = TRIALS,
    kernels: Sequence[str] | None = None,
    out: str | Path | None = None,
    work: str | Path | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Tuned:
    """Searches the schedule templates' decisions for a model on this machine, and writes tuned records.

    A build for the target uses the records in this checkout's `schedules/`.

    Args:
        model: as in `tvm_attn.build`, or a configuration; only its sizes matter.
        target: "cpu" for this machine, or the name of a target that fits it.
        dtype: storage of weights and KV cache.
        quant: quantization of the weights.
        trials: the most candidates of a kernel; if there are more, a random sample is measured.
        kernels: kernel families to search; default all.
        out: folder to write to instead of `schedules/`.
        work: folder that keeps measurements, so that a search continues where it stopped; default
            `~/.cache/tvm-attn/tune/<target>`. Two targets must not share one.
        progress: called after each candidate.

    Returns:
        What was found. Ctrl-C ends the search early; what was found by then is written.

    Raises:
        TargetError: the target is unknown or does not fit this machine, or does not have the dtype or quantization.
        TuningError: an argument is wrong, or no candidate could be measured.
        CheckpointError, ConfigError: the model is unknown.
        ScheduleError: a kernel has no template, or a record file is malformed.
    """
    for package in ("cloudpickle", "psutil"):
        if find_spec(package) is None:
            raise TuningError(f"a search needs {package}: pip install cloudpickle psutil (the extra tune)")
    if trials < 1:
        raise TuningError(f"the number of trials must be positive, not {trials}")
    resolved = targets.resolve(target)
    if obstacle(resolved, dtype, quant):
        raise TargetError(f"{resolved.name} cannot be measured on this machine; run the search on such hardware")
    check_types(resolved, dtype, quant)
    config = model if isinstance(model, GPT2Config) else open_config(model)
    program = build_program(config, layout_for(config, resolved, dtype, quant))
    chosen = _chosen(list(program.kernels.values()), kernels)
    folder = records_folder(out, resolved.name)
    place = Path(work) if work is not None else _home() / ".cache" / "tvm-attn" / "tune" / resolved.name
    return search(chosen, resolved, trials, folder, place, progress)


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a container whose user has no name
        raise TuningError("this user has no home folder; choose a folder for the measurements (--work)") from None


def _chosen(kernels: list[Kernel], families: Sequence[str] | None) -> list[Kernel]:
    available = sorted({kernel.family for kernel in kernels})
    unknown = sorted(set(families or ()) - set(available))
    if unknown:
        raise TuningError(f"the model has no kernels {', '.join(unknown)}; it has {', '.join(available)}")
    return [kernel for kernel in kernels if families is None or kernel.family in families]


def search(
    kernels: Sequence[Kernel],
    target: Target,
    trials: int,
    folder: Path,
    work: Path,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Tuned:
    """Searches the decisions for some kernels, see `tune`; records go to `folder`.

    Raises:
        TuningError: the work folder is not usable, or no candidate could be measured.
        ScheduleError: a kernel has no template, or a record file is malformed.
    """
    spaces = [space for space in (Space.of(kernel, target) for kernel in kernels) if space.size > 1]
    require_mergeable(folder)
    state = _State(trials, folder, progress, spaces)
    threads, interrupted = usable_cores(), False
    with _locked(work), _logging_to(work / "search.log"), worker_environment(threads), _interrupts() as noticed:
        try:
            with Session(work, threads) as session:
                for space in spaces:
                    state.search(space, session)
        except (KeyboardInterrupt, RuntimeError):
            # A KeyboardInterrupt that passes through MetaSchedule's C++ comes out as a RuntimeError.
            if not noticed:
                raise
            interrupted = True
    if not interrupted and not state.found and state.failure is not None:
        raise TuningError(f"no candidate could be measured: {state.failure}; see {work}")
    return Tuned(target.name, tuple(state.found), tuple(sorted(state.files)), work, interrupted)


class _State:
    """What a search has found so far."""

    def __init__(
        self, trials: int, folder: Path, progress: Callable[[Progress], None], spaces: Sequence[Space]
    ) -> None:
        self._trials, self._folder, self._progress = trials, folder, progress
        self._done, self._total = 0, sum(map(self._most, spaces))
        self.found: list[Found] = []
        self.files: set[Path] = set()
        self.failure: str | None = None

    def _most(self, space: Space) -> int:
        return min(space.size, self._trials) + _FINALISTS

    def search(self, space: Space, session: Session) -> None:
        """Searches one kernel and writes its record, even if it is interrupted."""
        candidates = space.candidates(self._trials)
        if len(candidates) == 1:  # no choice of the template makes a difference
            self._total -= self._most(space)
            return
        finalists = min(_FINALISTS, len(candidates))
        self._total += len(candidates) + finalists - self._most(space)
        known = session.known(space)
        left = [candidate for candidate in candidates if candidate.indices not in known]
        self._done += len(candidates) - len(left)
        self._report(space, known)

        def notify(measurement: Measurement, message: str | None) -> None:
            note(known, measurement)
            if message is not None:
                self.failure = self.failure or message.strip().splitlines()[-1]
            self._done += 1
            self._report(space, known)

        def order(candidate: Candidate) -> tuple[bool, float]:
            return candidate.indices != space.default, mean_seconds(known[candidate.indices])

        try:
            if left:
                with session.measuring(space, notify) as measure:
                    measure(left)
                    # Another process may have slowed down the defaults only: measure them and the best ones again.
                    measure(sorted(candidates, key=order)[:finalists])
            else:
                self._done += finalists
        finally:
            self._keep(space, known)

    def _report(self, space: Space, known: dict[tuple[int, ...], Measurement]) -> None:
        best, speedup = _best(space, known)
        best_us = None if best is None else mean_seconds(best) * 1e6
        self._progress(Progress(self._done, self._total, label(space.kernel), best_us, speedup))

    def _keep(self, space: Space, known: dict[tuple[int, ...], Measurement]) -> None:
        best, speedup = _best(space, known)
        if best is None:
            return
        record, measured = to_record(space, best), sum(entry.seconds is not None for entry in known.values())
        self.found.append(Found(label(space.kernel), record, speedup, measured, len(known) - measured))
        self.files.update(merge(self._folder, [record]))


def _best(space: Space, known: dict[tuple[int, ...], Measurement]) -> tuple[Measurement | None, float | None]:
    """The fastest candidate, and how much faster than the defaults it is."""
    best = min(known.values(), key=mean_seconds, default=None)
    if best is None or best.seconds is None:
        return None, None
    default = known.get(space.default)
    speedup = mean_seconds(default) / mean_seconds(best) if default and default.seconds else None
    return best, speedup


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Makes the work folder and keeps other searches out of it."""
    with ExitStack() as stack:
        try:
            work.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(work / "lock", "w", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TuningError(f"another search is using {work}: wait for it, or choose another folder") from None
        except OSError as error:
            raise TuningError(f"cannot use {work}: {error.strerror}; choose another folder (--work)") from error
        yield


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Sends MetaSchedule's log to a file instead of the terminal."""
    logger = logging.getLogger("tvm.s_tir.meta_schedule")
    before = logger.level, logger.propagate
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.level, logger.propagate = before


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Yields a list to which each Ctrl-C is added; each also raises KeyboardInterrupt as usual."""
    noticed: list[int] = []

    def handle(number: int, _frame: object) -> None:
        noticed.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield noticed  # signals go to the main thread, whatever it does with them
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGINT, before)
