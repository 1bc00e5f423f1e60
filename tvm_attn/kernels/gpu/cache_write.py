"""Writing an int8 KV cache on GPUs."""

from __future__ import annotations

from tvm import s_tir, tirx

from tvm_attn.kernels.cache_write import CacheWrite
from tvm_attn.kernels.gpu.threads import elementwise
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.cache import cache_write
from tvm_attn.targets import GpuTarget


def _cache_write(kernel: CacheWrite, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """One thread per head's key or value, and one per element of the queries."""
    schedule = s_tir.Schedule(cache_write(kernel))
    for name in ("queries", "row"):
        elementwise(schedule, schedule.get_sblock(name), target, choose)
    return schedule.mod["main"]


TEMPLATE = Template("gpu.cache_write", 1, ("cache_write",), _cache_write)
