"""The schedule of a kernel on a target: its template, decisions, and where each decision comes from."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from tvm_attn.kernels import Kernel
from tvm_attn.kernels.base import shape_of
from tvm_attn.kernels.template import Template
from tvm_attn.schedule.base import FixedChooser, template_for
from tvm_attn.schedule.records import Record, RecordBook
from tvm_attn.targets import Target


@dataclass(frozen=True)
class Decision:
    """One free choice of a template.

    Attributes:
        name, value: the choice's name, and the value that was chosen.
        source: "record" if the value comes from a tuned record, else "default".
    """

    name: str
    value: int
    source: str


@dataclass(frozen=True)
class Planned:
    """A kernel with its schedule.

    Attributes:
        kernel, template: the kernel, and the template that schedules it.
        record: the tuned record that was found for it, or None.
        decisions: the decisions, in the order in which the template takes them.
        function: the scheduled function.
    """

    kernel: Kernel
    template: Template
    record: Record | None
    decisions: tuple[Decision, ...]
    function: tirx.PrimFunc

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


def plan(kernel: Kernel, target: Target, book: RecordBook) -> Planned:
    """Schedules a kernel with the target's tuned record, or with the template's defaults if there is none.

    Raises:
        ScheduleError: there is no template, or the record does not fit it.
    """
    template = template_for(kernel, target)
    record = book.find(template, kernel)
    recorded = record.decisions if record else {}
    chooser = FixedChooser(recorded)
    function = template.apply(kernel, target, chooser)
    decisions = tuple(
        Decision(name, value, "record" if name in recorded else "default") for name, value in chooser.taken.items()
    )
    return Planned(kernel, template, record, decisions, function)
