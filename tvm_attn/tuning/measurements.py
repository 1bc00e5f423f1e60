"""The measurements of a search, in a file of JSON lines that a search adds to and continues from.

| line | says |
|---|---|
| `{"workload": KEY, "kernel": ..., "decisions": {...}, "seconds": [...], "load": 0.1}` | a candidate's times |
| `{"workload": KEY, "kernel": ..., "decisions": {...}, "error": "..."}` | a candidate that failed |
| `{"workload": KEY, "kernel": ..., "finished": N}` | the search of a kernel with at most N candidates has ended |

A line that is none of these, such as one that a killed process left half written, is left out and kept.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_attn.checks import INTEGERS, Rule, integer, problem, text
from tvm_attn.errors import TuningError, one_line
from tvm_attn.jsonfile import parse_json, read_text, shorten_path

FILE = "measurements.jsonl"
CALM = 0.3
"""Cores that other programs may use while a candidate is measured on what counts as a calm machine."""
_LARGEST = 1 << 30


@dataclass(frozen=True)
class Measurement:
    """What is known of a candidate.

    Attributes:
        decisions: its decisions.
        seconds: time of each of the kernel's calls; None if it did not compile, run, or give the right result.
        load: cores that other programs used while it was measured; None if that is not known.
        error: why there are no times.
    """

    decisions: Mapping[str, int]
    seconds: tuple[float, ...] | None
    load: float | None = None
    error: str | None = None

    @property
    def mean(self) -> float:
        """Geometric mean of the times, so that every size counts the same; infinite if it failed."""
        return math.inf if self.seconds is None else geometric_mean(self.seconds)

    @property
    def is_calm(self) -> bool:
        """Whether other programs left the machine alone, as far as that is known."""
        return self.load is None or self.load <= CALM

    def merged(self, other: Measurement) -> Measurement:
        """Both as one: the shorter times, and the lower load; a failure stays one."""
        if self.seconds is None or other.seconds is None:
            return self if self.seconds is None else other
        loads = [load for load in (self.load, other.load) if load is not None]
        return Measurement(self.decisions, tuple(map(min, self.seconds, other.seconds)), min(loads, default=None))


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


Key = tuple[tuple[str, int], ...]


def key_of(decisions: Mapping[str, int]) -> Key:
    """Decisions as a key of a dictionary."""
    return tuple(sorted(decisions.items()))


class Measurements:
    """The file of measurements in a work folder.

    Attributes:
        foreign: number of lines that are no measurements.

    Raises:
        TuningError: the file cannot be read.
    """

    def __init__(self, work: Path) -> None:
        self._path = work / FILE
        self._known: dict[str, dict[Key, Measurement]] = {}
        self._finished: dict[str, int] = {}
        self.foreign = 0
        if self._path.exists():
            content = read_text(self._path, _LARGEST, TuningError)
            for line in content.splitlines():
                self._read(line)
            if content and not content.endswith("\n"):
                self._append("")  # so that the next line starts a line

    def known(self, workload: str) -> dict[Key, Measurement]:
        """The measurements of a workload by decisions."""
        return dict(self._known.get(workload, {}))

    def finished(self, workload: str) -> int:
        """The limit of candidates with which the search of a workload has ended; 0 if it has not."""
        return self._finished.get(workload, 0)

    def add(self, workload: str, kernel: str, measurement: Measurement) -> Measurement:
        """Stores a measurement, and returns it merged with earlier ones of the candidate.

        Raises:
            TuningError: it cannot be written.
        """
        facts: dict[str, Any] = {"workload": workload, "kernel": kernel, "decisions": dict(measurement.decisions)}
        if measurement.seconds is None:
            facts["error"] = measurement.error or "failed"
        else:
            facts |= {"seconds": measurement.seconds, "load": measurement.load}
        self._append(json.dumps(facts))
        return self._note(workload, measurement)

    def finish(self, workload: str, kernel: str, trials: int) -> None:
        """Stores that the search of a workload has ended.

        Raises:
            TuningError: it cannot be written.
        """
        self._append(json.dumps({"workload": workload, "kernel": kernel, "finished": trials}))
        self._finished[workload] = max(trials, self.finished(workload))

    def _note(self, workload: str, measurement: Measurement) -> Measurement:
        known, key = self._known.setdefault(workload, {}), key_of(measurement.decisions)
        known[key] = known[key].merged(measurement) if key in known else measurement
        return known[key]

    def _append(self, line: str) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise TuningError(
                f"cannot write {shorten_path(self._path)}: {reason}; what was measured before is kept, and the same "
                "command continues from there"
            ) from error

    def _read(self, line: str) -> None:
        if not line.strip():
            return
        try:
            table = parse_json(line, "a line", TuningError)
        except TuningError:
            table = None
        if problem(table, _FINISHED) is None:
            self._finished[table["workload"]] = max(table["finished"], self.finished(table["workload"]))
        elif measurement := to_measurement(table):
            self._note(table["workload"], measurement)
        else:
            self.foreign += 1


def to_measurement(table: Any) -> Measurement | None:
    """The measurement that a line's table holds; None if it holds none."""
    if problem(table, _FAILED) is None:
        return Measurement(table["decisions"], None, error=table["error"])
    if problem(table, _MEASURED) is None:
        return Measurement(table["decisions"], tuple(table["seconds"]), table["load"])
    return None


def _times(value: Any) -> bool:
    return type(value) is list and bool(value) and all(type(time) is float and 0 < time < 1e9 for time in value)


_BOTH: dict[str, Rule] = {
    "workload": text(),
    "kernel": text(),
    "decisions": INTEGERS,
}
_MEASURED = _BOTH | {
    "seconds": Rule("a list of seconds", _times),
    "load": Rule("a number or null", lambda value: value is None or (type(value) is float and 0 <= value < 1e6)),
}
_FAILED = _BOTH | {"error": Rule("text", lambda value: type(value) is str)}
_FINISHED = {"workload": text(), "kernel": text(), "finished": integer(1, 10**9)}


def shares(limits: list[float | None], seconds: tuple[float, ...]) -> float | None:
    """Geometric mean of the limits' shares of the times; None if a limit is not known."""
    known = [limit / time for limit, time in zip(limits, seconds, strict=True) if limit]
    return geometric_mean(known) if len(known) == len(limits) else None
