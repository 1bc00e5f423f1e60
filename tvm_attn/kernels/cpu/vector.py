"""What the templates for processors share."""

from __future__ import annotations

from typing import Any

from tvm import s_tir

from tvm_attn.kernels.base import largest_power


def is_one_row(kernel: Any) -> bool:
    """Whether a kernel handles one row only.

    Its small loops stay serial: starting threads takes 6 us, the work less than 1 us.
    """
    return getattr(kernel, "groups", None) == 1 and kernel.rows == 1


def vectorize(schedule: s_tir.Schedule, block: Any, lanes: int) -> None:
    """Vectorises the innermost loop of a block: all of it if its extent is a power of two up to 64, otherwise the
    widest part that divides it."""
    loop = schedule.get_loops(block)[-1]
    extent = int(schedule.get(loop).extent)
    if extent > 64 or extent & (extent - 1):
        loop = schedule.split(loop, [None, largest_power(extent, lanes)])[1]
    schedule.vectorize(loop)
