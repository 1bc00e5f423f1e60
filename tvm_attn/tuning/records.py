"""Turns measurements into tuned records, and writes the files that hold them."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path

import tvm

from tvm_attn.errors import TuningError, one_line
from tvm_attn.jsonfile import shorten_path
from tvm_attn.kernels.base import shape_of
from tvm_attn.schedule import Record
from tvm_attn.schedule.records import read_records, user_folder
from tvm_attn.tuning.calls import calls_of
from tvm_attn.tuning.measurements import geometric_mean, shares
from tvm_attn.tuning.space import Space


def to_record(space: Space, decisions: Mapping[str, int], seconds: tuple[float, ...]) -> Record:
    """The record of a measured candidate; `seconds` has the time of each of the kernel's calls."""
    limits = [call.limit_seconds(space.target.peak) for call in calls_of(space.kernel)]
    share = shares(limits, seconds)
    return Record(
        template=space.template.name,
        version=space.template.version,
        shape=shape_of(space.kernel),
        decisions=dict(decisions),
        time_us=float(f"{geometric_mean(seconds) * 1e6:.4g}"),
        fraction_of_peak=None if share is None else round(share, 3),
        tvm=tvm.__version__,
        date=date.today().isoformat(),
    )


def records_folder(out: str | Path | None, target: str) -> Path:
    """The folder to which the records of a target are written: in `out`, or among the user's own files."""
    return (Path(out) if out is not None else user_folder()) / target


def merge(folder: Path, records: Iterable[Record]) -> list[Path]:
    """Adds records to the files of a target's folder; a record for the same kernel is replaced.

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
        merged.update((record.key, record) for record in added)
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
