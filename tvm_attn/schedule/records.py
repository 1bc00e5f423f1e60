"""Tuned records: one readable JSON line each, in `schedules/<target>/<template>.jsonl`.

A record survives a TVM upgrade and can be read in a diff. Its key is the template, the template's version, and the
kernel's shape and dtype; `schedules/README.md` lists the fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tvm_attn._resources import resource_dir
from tvm_attn.checks import POSITIVE, Rule, integer, problem, text
from tvm_attn.errors import ScheduleError
from tvm_attn.jsonfile import CONFIG_BYTES, parse_json, read_text, shorten_path
from tvm_attn.kernels import Kernel
from tvm_attn.kernels.base import shape_of
from tvm_attn.kernels.template import Template


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


def _by_name(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is dict and all(type(entry) in kinds for entry in value.values())


_RULES = {
    "template": text(r"[\w.-]+", "a template's name"),
    "version": integer(0, 10**6),
    "shape": Rule("the kernel's sizes by name", _by_name(str, int, float, bool, type(None))),
    "decisions": Rule("integers by name", _by_name(int)),
    "time_us": POSITIVE,
    "fraction_of_peak": Rule("a positive number or null", lambda value: value is None or POSITIVE.holds(value)),
    "tvm": text(),
    "date": text(),
}


class RecordBook:
    """The tuned records of one target."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = {record.key: record for record in records}

    @staticmethod
    def load(target: str) -> RecordBook:
        """Reads `schedules/<target>/*.jsonl`; a target that was never tuned has no records.

        Raises:
            ScheduleError: a line is not a record.
        """
        folder = resource_dir("schedules") / target
        files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
        return RecordBook(record for file in files for record in read_records(file))

    def find(self, template: Template, kernel: Kernel) -> Record | None:
        """The record for a kernel, made with this version of the template; None if there is none."""
        return self._records.get(_key(template.name, template.version, shape_of(kernel)))


def _key(template: str, version: int, shape: dict[str, Any]) -> tuple[str, int, str]:
    return template, version, json.dumps(shape, sort_keys=True)


def read_records(path: Path) -> list[Record]:
    """The records of one file.

    Raises:
        ScheduleError: a line is not a record, or the file cannot be read.
    """
    lines = read_text(path, CONFIG_BYTES, ScheduleError).split("\n")
    return [Record.from_line(line, f"{shorten_path(path)}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
