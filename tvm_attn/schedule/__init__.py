"""Which template a kernel gets on a target, and with which decisions.

The templates are next to the loops of their device class, in `tvm_attn.kernels`. They make their free choices through a
`Chooser`: the compiler's replays a tuned record from `schedules/<target>/` or takes the template's defaults; the
tuner's samples.
"""

from tvm_attn.schedule.base import schedule, supports, template_for
from tvm_attn.schedule.records import Record, RecordBook

__all__ = ["Record", "RecordBook", "schedule", "supports", "template_for"]
