"""Packing and quantizing activations on GPUs."""

from __future__ import annotations

from tvm import s_tir, tirx

from tvm_attn.kernels.gpu.threads import elementwise
from tvm_attn.kernels.quant import PackPairs, QuantizeRows
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.quant import pack_pairs, quantize_rows
from tvm_attn.targets import GpuTarget


def _pack_pairs(kernel: PackPairs, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(pack_pairs(kernel))
    elementwise(schedule, schedule.get_sblock("pack"), target, choose)
    return schedule.mod["main"]


def _quantize_rows(kernel: QuantizeRows, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """One thread per group of 32 elements."""
    schedule = s_tir.Schedule(quantize_rows(kernel))
    elementwise(schedule, schedule.get_sblock("group"), target, choose)
    for name in ("largest", "words"):
        schedule.unroll(schedule.get_loops(schedule.get_sblock(name))[-1])
    return schedule.mod["main"]


TEMPLATES = (
    Template("gpu.pack_pairs", 1, ("pack_pairs",), _pack_pairs),
    Template("gpu.quantize_rows", 1, ("quantize_rows",), _quantize_rows),
)
