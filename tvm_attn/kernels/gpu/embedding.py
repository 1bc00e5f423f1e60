"""Embedding and row gather on GPUs."""

from __future__ import annotations

from tvm import s_tir, tirx

from tvm_attn.kernels.base import largest_power
from tvm_attn.kernels.embedding import Embedding, GatherRows
from tvm_attn.kernels.gpu.threads import elementwise
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.embedding import embedding, gather_rows
from tvm_attn.targets import GpuTarget


def _rows(kernel: Embedding | GatherRows, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(embedding(kernel) if isinstance(kernel, Embedding) else gather_rows(kernel))
    block = schedule.get_sblock("embed" if isinstance(kernel, Embedding) else "gather")
    # A column of the packed token table is spread over K: only a gather reads neighbours.
    lanes = largest_power(kernel.width, target.vector_bytes // 4) if isinstance(kernel, GatherRows) else 1
    elementwise(schedule, block, target, choose, lanes)
    return schedule.mod["main"]


TEMPLATE = Template("gpu.rows", 1, ("embedding", "gather_rows"), _rows)
