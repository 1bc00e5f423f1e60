"""How a kernel is computed: schedule templates, one a kernel family and device class, and the tuned records.

A template's free choices go through a `Chooser`. The compiler's chooser replays a tuned record of `schedules/<target>/`
or takes the template's defaults; the tuner's samples.
"""

from tvm_attn.schedule.base import Chooser, Template, schedule, template_for
from tvm_attn.schedule.records import Record, RecordBook

__all__ = ["Chooser", "Record", "RecordBook", "Template", "schedule", "template_for"]
