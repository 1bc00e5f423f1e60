"""Embedding and row gather on processors."""

from __future__ import annotations

from tvm import s_tir, tirx

from tvm_attn.kernels.cpu.vector import is_one_row, vectorize
from tvm_attn.kernels.embedding import Embedding, GatherRows
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.embedding import embedding, gather_rows
from tvm_attn.targets import CpuTarget


def _rows(kernel: Embedding | GatherRows, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    function = embedding(kernel) if isinstance(kernel, Embedding) else gather_rows(kernel)
    schedule = s_tir.Schedule(function, enable_check=False)
    block = schedule.get_sblock("embed" if isinstance(kernel, Embedding) else "gather")
    group, row, _ = schedule.get_loops(block)
    if not is_one_row(kernel):
        schedule.parallel(schedule.fuse(group, row))
    vectorize(schedule, block, target.lanes)
    return schedule.mod["main"]


TEMPLATE = Template("cpu.rows", 1, ("embedding", "gather_rows"), _rows)
