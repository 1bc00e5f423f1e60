"""LayerNorm on GPUs. TVM implements the reductions over the threads of a block: through the registers of subgroups if
the target has them, otherwise through shared memory."""

from __future__ import annotations

from tvm import s_tir, tirx

from tvm_attn.kernels.base import largest_power
from tvm_attn.kernels.norm import LayerNorm
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.norm import layer_norm
from tvm_attn.targets import GpuTarget


def _layer_norm(kernel: LayerNorm, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """One block per row; both sums are reductions over its threads.

    With subgroups of s threads, the sums of up to s of them are added by the first, after one barrier.
    """
    schedule = s_tir.Schedule(layer_norm(kernel))
    most = target.max_threads if target.subgroup is None else min(target.max_threads, target.subgroup**2)
    widest = largest_power(1 << (kernel.width.bit_length() - 1), most)
    candidates = [threads for threads in (32, 64, 128, 256) if threads <= widest] or [widest]
    threads = choose("threads", candidates, candidates[-1])
    total, squares, normalize = (schedule.get_sblock(name) for name in ("sum", "squares", "normalize"))
    group, row, column = schedule.get_loops(normalize)
    block_x = schedule.fuse(group, row)
    schedule.bind(block_x, "blockIdx.x")
    _, thread = schedule.split(column, [None, threads])
    schedule.bind(thread, "threadIdx.x")
    for block in (squares, total):
        schedule.compute_at(block, block_x, preserve_unit_loops=True)
        schedule.set_scope(block, 0, "shared")
        _, thread = schedule.split(schedule.get_loops(block)[-1], [None, threads])
        schedule.bind(thread, "threadIdx.x")
    return schedule.mod["main"]


TEMPLATE = Template("gpu.layer_norm", 1, ("layer_norm",), _layer_norm)
