"""Writing an int8 KV cache on processors."""

from __future__ import annotations

from tvm import s_tir, tirx

from tvm_attn.kernels.cache_write import CacheWrite
from tvm_attn.kernels.cpu.vector import is_one_row, vectorize
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.cache import cache_write
from tvm_attn.targets import CpuTarget


def _cache_write(kernel: CacheWrite, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(cache_write(kernel), enable_check=False)
    for name in ("queries", "row"):
        group, row, _ = schedule.get_loops(schedule.get_sblock(name))
        if not is_one_row(kernel):
            schedule.parallel(schedule.fuse(group, row))
    for name in ("queries", "largest", "words"):
        vectorize(schedule, schedule.get_sblock(name), target.lanes)
    return schedule.mod["main"]


TEMPLATE = Template("cpu.cache_write", 1, ("cache_write",), _cache_write)
