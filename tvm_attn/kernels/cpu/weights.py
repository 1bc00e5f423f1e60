"""Packing weights on processors."""

from __future__ import annotations

from tvm import s_tir, tirx

from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.weights import pack_plain, pack_words
from tvm_attn.kernels.weights import PackPlain, PackWords
from tvm_attn.targets import CpuTarget


def _pack(kernel: PackPlain | PackWords, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    function = pack_plain(kernel) if isinstance(kernel, PackPlain) else pack_words(kernel)
    schedule = s_tir.Schedule(function, enable_check=False)
    strip, row, column = schedule.get_loops(schedule.get_sblock("pack"))
    if kernel.transposed:
        # Rows of the source run along K: within a block of K, cache lines stay from one column to the next.
        block = choose("row_block", (8, 16, 32, 64), 16)
        outer, row = schedule.split(row, [None, block])
        schedule.reorder(strip, outer, column, row)
    else:
        schedule.vectorize(column)
    schedule.parallel(strip)
    return schedule.mod["main"]


TEMPLATE = Template("cpu.pack", 1, ("pack_plain", "pack_words"), _pack)
