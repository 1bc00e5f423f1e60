"""LayerNorm on processors."""

from __future__ import annotations

from tvm import s_tir, tirx

from tvm_attn.kernels.base import largest_power
from tvm_attn.kernels.cpu.vector import is_one_row, vectorize
from tvm_attn.kernels.norm import LayerNorm
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.norm import layer_norm
from tvm_attn.targets import CpuTarget


def _layer_norm(kernel: LayerNorm, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """Each sum is a vector of partial sums that are added up at the end of the row."""
    schedule = s_tir.Schedule(layer_norm(kernel), enable_check=False)
    lanes = largest_power(kernel.width, target.lanes)
    normalize = schedule.get_sblock("normalize")
    group, row, _ = schedule.get_loops(normalize)
    partial_blocks = []
    for name in ("sum", "squares"):
        block = schedule.get_sblock(name)
        _, lane = schedule.split(schedule.get_loops(block)[-1], [None, lanes])
        partial = schedule.rfactor(lane, 2)
        partial_blocks.append((block, partial))
    for block, partial in reversed(partial_blocks):
        schedule.compute_at(block, row, preserve_unit_loops=True)
        schedule.compute_at(partial, row, preserve_unit_loops=True)
        schedule.set_scope(partial, 0, "local")
        schedule.set_scope(block, 0, "local")
        # The partial sums come first, then two loops of one iteration, then the steps along the row.
        lane, *_, step = schedule.get_loops(partial)[-4:]
        schedule.reorder(step, lane)
        schedule.vectorize(lane)
        init = schedule.decompose_reduction(partial, step)
        schedule.vectorize(schedule.get_loops(init)[-1])
    vectorize(schedule, normalize, target.lanes)
    if not is_one_row(kernel):
        schedule.parallel(schedule.fuse(group, row))
    return schedule.mod["main"]


TEMPLATE = Template("cpu.layer_norm", 1, ("layer_norm",), _layer_norm)
