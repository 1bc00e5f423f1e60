"""Packing weights on GPUs."""

from __future__ import annotations

from tvm import s_tir, tirx

from tvm_attn.kernels.gpu.threads import elementwise
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.weights import pack_plain, pack_words
from tvm_attn.kernels.weights import PackPlain, PackWords
from tvm_attn.targets import GpuTarget


def _pack(kernel: PackPlain | PackWords, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(pack_plain(kernel) if isinstance(kernel, PackPlain) else pack_words(kernel))
    elementwise(schedule, schedule.get_sblock("pack"), target, choose)
    return schedule.mod["main"]


TEMPLATE = Template("gpu.pack", 1, ("pack_plain", "pack_words"), _pack)
