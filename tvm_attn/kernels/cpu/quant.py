"""Packing and quantizing activations on processors."""

from __future__ import annotations

from tvm import s_tir, tirx

from tvm_attn.kernels.cpu.vector import is_one_row, vectorize
from tvm_attn.kernels.quant import PackPairs, QuantizeRows
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.quant import pack_pairs, quantize_rows
from tvm_attn.targets import CpuTarget


def _pack_pairs(kernel: PackPairs, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(pack_pairs(kernel), enable_check=False)
    block = schedule.get_sblock("pack")
    group, row, _ = schedule.get_loops(block)
    if not is_one_row(kernel):
        schedule.parallel(schedule.fuse(group, row))
    vectorize(schedule, block, target.lanes)
    return schedule.mod["main"]


def _quantize_rows(kernel: QuantizeRows, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(quantize_rows(kernel), enable_check=False)
    group, row, _ = schedule.get_loops(schedule.get_sblock("group"))
    if not is_one_row(kernel):
        schedule.parallel(schedule.fuse(group, row))
    for name in ("largest", "words"):
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    return schedule.mod["main"]


TEMPLATES = (
    Template("cpu.pack_pairs", 1, ("pack_pairs",), _pack_pairs),
    Template("cpu.quantize_rows", 1, ("quantize_rows",), _quantize_rows),
)
