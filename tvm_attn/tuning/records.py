"""Turns measurements into tuned records, and writes the files that hold them."""

from __future__ import annotations

import fcntl
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path

import tvm

from tvm_attn._resources import resource_dir
from tvm_attn.errors import TuningError, one_line
from tvm_attn.jsonfile import shorten_path
from tvm_attn.kernels.base import shape_of
from tvm_attn.schedule import Record
from tvm_attn.schedule.records import read_records
from tvm_attn.tuning.calls import calls_of
from tvm_attn.tuning.search import Measurement
from tvm_attn.tuning.space import Space


def mean_seconds(measurement: Measurement) -> float:
    """Geometric mean of a candidate's times, so that every size counts the same; infinite if it failed."""
    return math.inf if measurement.seconds is None else _geometric_mean(measurement.seconds)


def _geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def to_record(space: Space, measurement: Measurement) -> Record:
    """The record of a measured candidate."""
    assert measurement.seconds is not None
    limits = [call.limit_seconds(space.target.peak) for call in calls_of(space.kernel)]
    shares = [limit / time for limit, time in zip(limits, measurement.seconds, strict=True) if limit is not None]
    return Record(
        template=space.template.name,
        version=space.template.version,
        shape=shape_of(space.kernel),
        decisions=space.at(measurement.indices).decisions,
        time_us=float(f"{mean_seconds(measurement) * 1e6:.4g}"),
        fraction_of_peak=round(_geometric_mean(shares), 3) if len(shares) == len(limits) else None,
        tvm=tvm.__version__,
        date=date.today().isoformat(),
    )


def records_folder(out: str | Path | None, target: str) -> Path:
    """The folder to which the records of a target are written, in `out` or in this checkout.

    Raises:
        TuningError: `out` is None, and this is not a checkout.
    """
    if out is not None:
        return Path(out) / target
    folder = resource_dir("schedules")
    if not (folder.parent / "pyproject.toml").is_file():
        raise TuningError("an installed package is not changed: name a folder for the records (--out FOLDER)")
    return folder / target


def merge(folder: Path, records: Iterable[Record]) -> list[Path]:
    """Adds records to the files of a target's folder; of two for the same kernel, the faster one is kept.

    Returns:
        The files that hold the given records.

    Raises:
        ScheduleError: a file that is there is malformed.
        TuningError: a file cannot be written.
    """
    with _locked(folder):
        return _merge(folder, records)


def require_mergeable(folder: Path) -> None:
    """Makes a target's folder and reads the records that are there: a search should not find out when it is done.

    Raises:
        ScheduleError: a file that is there is malformed.
        TuningError: the folder cannot be written.
    """
    with _locked(folder):
        for path in folder.glob("*.jsonl"):
            read_records(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other searches from writing records to a folder: reading, merging and writing is one step."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        yield


def _cannot_write(path: Path, error: OSError) -> TuningError:
    return TuningError(f"cannot write {shorten_path(path)}: {error.strerror or one_line(error)}; choose another --out")


def _merge(folder: Path, records: Iterable[Record]) -> list[Path]:
    by_file: dict[Path, list[Record]] = {}
    for record in records:
        by_file.setdefault(folder / f"{record.template}.jsonl", []).append(record)
    for path, added in by_file.items():
        merged = {record.key: record for record in (read_records(path) if path.exists() else [])}
        for record in added:
            if record.key not in merged or record.time_us < merged[record.key].time_us:
                merged[record.key] = record
        _write(path, "".join(merged[key].to_line() + "\n" for key in sorted(merged)))
    return sorted(by_file)


def _write(path: Path, content: str) -> None:
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise _cannot_write(path, error) from error
