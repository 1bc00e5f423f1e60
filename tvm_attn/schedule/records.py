"""Tuned records: one readable JSON line each, in `schedules/<target>/<template>.jsonl`, of the user or of this package.

A record survives a TVM upgrade and can be read in a diff. Its key is the template, the template's version, and the
kernel's shape and dtype; `schedules/README.md` lists the fields.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tvm_attn._resources import data_dirs, user_dir
from tvm_attn.checks import INTEGERS, POSITIVE, Rule, by_name, integer, problem, text
from tvm_attn.errors import ScheduleError, one_line
from tvm_attn.jsonfile import CONFIG_BYTES, parse_json, read_text, shorten_path
from tvm_attn.kernels import Kernel
from tvm_attn.kernels.base import shape_of
from tvm_attn.kernels.template import Template
from tvm_attn.targets import Target, related


@dataclass(frozen=True)
class Record:
    """The best decisions that a search found for one kernel on one target.

    Attributes:
        template: the template's name.
        version: the template's version.
        shape: the kernel's static sizes, dtype included.
        decisions: the template's choices by name.
        time_us: measured time of a call, microseconds; the geometric mean over the sizes that were measured.
        fraction_of_peak: achieved share of the limit that binds the kernel, 0 to 1, averaged in the same way; None
            if the limit is not known.
        tvm: TVM's version.
        date: ISO date of the measurement.
    """

    template: str
    version: int
    shape: dict[str, Any]
    decisions: dict[str, int]
    time_us: float
    fraction_of_peak: float | None
    tvm: str
    date: str

    @property
    def key(self) -> tuple[str, int, str]:
        """The key of the record: template, version, and shape as JSON."""
        return _key(self.template, self.version, self.shape)

    def to_line(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_line(line: str, where: str) -> Record:
        """Reads one line; `where` names it in errors.

        Raises:
            ScheduleError: the line is not a record.
        """
        try:
            table = parse_json(line, "it", ScheduleError)
            fault = problem(table, _RULES)
        except ScheduleError as error:
            fault = str(error)
        if fault is not None:
            raise ScheduleError(f"{where} is not a tuned record: {fault}")
        return Record(**table)


_RULES = {
    "template": text(r"[\w.-]+", "a template's name"),
    "version": integer(0, 10**6),
    "shape": by_name("the kernel's sizes by name", str, int, float, bool, type(None)),
    "decisions": INTEGERS,
    "time_us": POSITIVE,
    "fraction_of_peak": Rule("a positive number or null", lambda value: value is None or POSITIVE.holds(value)),
    "tvm": text(),
    "date": text(),
}


@dataclass(frozen=True)
class Entry:
    """A record and where it comes from.

    Attributes:
        record: the record.
        related: the name of the related target that it was measured for; None if it is the target's own.
        file: the file that holds it.
    """

    record: Record
    related: str | None
    file: Path

    @property
    def source(self) -> str:
        """Where decisions of this record come from, in words."""
        return "record" if self.related is None else f"related record of {self.related}"


class RecordBook:
    """The tuned records of one target and of the targets that are related to it, the preferred ones first."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries: dict[tuple[str, int, str], dict[str | None, Entry]] = {}
        for entry in entries:
            self._entries.setdefault(entry.record.key, {}).setdefault(entry.related, entry)

    @staticmethod
    def load(target: Target, records: Path | None = None) -> RecordBook:
        """Reads the records of a target from the folder `records`, from the user's folder and from `schedules/`, then
        those of related targets. A target that was never tuned has none.

        Args:
            target: the hardware.
            records: a folder with `NAME/*.jsonl` or, for every target, `*.jsonl`.

        Raises:
            ScheduleError: `records` holds no records, or a line of the target's own files is no record. A malformed
                file of a related target is left out, with a warning.
        """
        folders = data_dirs("schedules")
        if records is not None:
            _require_records(records)
            folders.insert(0, records)
        entries = []
        if records is not None and not _files(records / target.name):
            entries += _read(_files(records), None)
        for folder in folders:
            entries += _read(_files(folder / target.name), None)
        for other in related(target):
            for folder in folders:
                try:
                    entries += _read(_files(folder / other.name), other.name)
                except ScheduleError as error:
                    warnings.warn(f"records of a related target are left out: {error}", stacklevel=1)
        return RecordBook(entries)

    def find(self, template: Template, kernel: Kernel) -> Record | None:
        """The target's own record for a kernel, made with this version of the template; None if there is none."""
        return next((entry.record for entry in self.entries(template, kernel) if entry.related is None), None)

    def entries(self, template: Template, kernel: Kernel) -> list[Entry]:
        """The records for a kernel, made with this version of the template: the target's own if there is one, then one
        of each related target."""
        return list(self._entries.get(record_key(template, kernel), {}).values())


def user_folder() -> Path:
    """The folder of the user's own records, `NAME/*.jsonl` for a target; it need not exist.

    Raises:
        TvmAttnError: this user has no home folder.
    """
    return user_dir("schedules")


def _require_records(folder: Path) -> None:
    found = (path for pattern in ("*.jsonl", "*/*.jsonl") for path in folder.glob(pattern))
    try:
        if next(found, None) is not None:
            return
    except (OSError, ValueError) as error:
        raise ScheduleError(f"{shorten_path(folder)} cannot be read: {one_line(error)}") from None
    raise ScheduleError(f"{shorten_path(folder)} holds no records: name a folder with TARGET/*.jsonl or *.jsonl")


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl")) if folder.is_dir() else []


def _read(files: list[Path], related: str | None) -> list[Entry]:
    """The records of a folder's files; of two with the same key, the last one counts, so it comes first."""
    entries = [Entry(record, related, file) for file in files for record in read_records(file)]
    return entries[::-1]


def record_key(template: Template, kernel: Kernel) -> tuple[str, int, str]:
    """The key of the records for a kernel."""
    return _key(template.name, template.version, shape_of(kernel))


def _key(template: str, version: int, shape: dict[str, Any]) -> tuple[str, int, str]:
    return template, version, json.dumps(shape, sort_keys=True)


def read_records(path: Path) -> list[Record]:
    """The records of one file.

    Raises:
        ScheduleError: a line is not a record, or the file cannot be read.
    """
    lines = read_text(path, CONFIG_BYTES, ScheduleError).split("\n")
    return [Record.from_line(line, f"{shorten_path(path)}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
