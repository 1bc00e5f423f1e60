"""The schedule of a kernel on a target: its template, decisions, and where each decision comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tvm import tirx

from tvm_attn.errors import ScheduleError
from tvm_attn.jsonfile import shorten_path
from tvm_attn.kernels import Kernel
from tvm_attn.kernels.base import shape_of
from tvm_attn.kernels.template import Template
from tvm_attn.schedule.base import FixedChooser, template_for
from tvm_attn.schedule.records import Entry, Record, RecordBook
from tvm_attn.targets import Target


@dataclass(frozen=True)
class Decision:
    """One free choice of a template.

    Attributes:
        name, value: the choice's name, and the value that was chosen.
        source: "record" if the value comes from a tuned record, "related record of X" if that one was measured for the
            target X, else "default".
    """

    name: str
    value: int
    source: str


@dataclass(frozen=True)
class Planned:
    """A kernel with its schedule.

    Attributes:
        kernel, template: the kernel, and the template that schedules it.
        entry: the tuned record that was found for it and where, or None.
        decisions: the decisions, in the order in which the template takes them.
        function: the scheduled function.
    """

    kernel: Kernel
    template: Template
    entry: Entry | None
    decisions: tuple[Decision, ...]
    function: tirx.PrimFunc

    @property
    def record(self) -> Record | None:
        """The tuned record that was found for the kernel, or None."""
        return self.entry.record if self.entry else None

    @property
    def source(self) -> str | None:
        """Where the decisions come from, as in `Decision`; None if the template has nothing to decide."""
        if self.entry:
            return self.entry.source
        return "default" if self.decisions else None

    def to_dict(self) -> dict[str, object]:
        """Everything except the function, for JSON."""
        return {
            "kernel": shape_of(self.kernel),
            "template": self.template.name,
            "version": self.template.version,
            "decisions": {
                decision.name: {"value": decision.value, "from": decision.source} for decision in self.decisions
            },
        }


@dataclass(frozen=True)
class Sources:
    """Where the decisions of a library's kernels come from, by the names of its functions.

    Attributes:
        records: for each kernel with a tuned record of its own target the file that holds it.
        related: for each kernel with a record of a related target that target's name.
        defaults: the kernels whose template takes its defaults. Kernels without a choice are nowhere.
    """

    records: dict[str, str]
    related: dict[str, str]
    defaults: list[str]

    @classmethod
    def of(cls, planned: Mapping[str, Planned]) -> Sources:
        """The sources of some schedules."""
        found = {name: entry.entry for name, entry in planned.items() if entry.entry}
        return cls(
            {name: str(entry.file) for name, entry in found.items() if entry.related is None},
            {name: entry.related for name, entry in found.items() if entry.related is not None},
            [name for name, entry in planned.items() if entry.source == "default"],
        )

    def summary(self) -> str:
        """For the person who builds, one line."""
        folders = Counter(shorten_path(Path(file).parent) for file in self.records.values())
        parts = [f"{count} records of {folder}" for folder, count in folders.items()]
        parts += [f"{count} records of the related {name}" for name, count in Counter(self.related.values()).items()]
        parts += [f"{len(self.defaults)} defaults"] if self.defaults else []
        total = len(self.records) + len(self.related) + len(self.defaults)
        return f"of {total} kernels with choices use " + (", ".join(parts) or "none a record")


def plan(kernel: Kernel, target: Target, book: RecordBook) -> Planned:
    """Schedules a kernel with the target's tuned record, else with that of the nearest related target that fits, else
    with the template's defaults.

    Raises:
        ScheduleError: there is no template, or the target's own record does not fit it.
    """
    template = template_for(kernel, target)
    for entry in book.entries(template, kernel):
        try:
            return _apply(template, kernel, target, entry)
        except ScheduleError:
            if entry.related is None:
                raise
    return _apply(template, kernel, target, None)


def _apply(template: Template, kernel: Kernel, target: Target, entry: Entry | None) -> Planned:
    recorded = entry.record.decisions if entry else {}
    chooser = FixedChooser(recorded)
    function = template.apply(kernel, target, chooser)
    decisions = tuple(
        Decision(name, value, entry.source if entry and name in recorded else "default")
        for name, value in chooser.taken.items()
    )
    return Planned(kernel, template, entry, decisions, function)
