"""Linear layers on processors.

Vector width and cache size come from the target; everything else is a decision.
"""

from __future__ import annotations

from tvm import s_tir, tirx

from tvm_attn.kernels.base import largest_power
from tvm_attn.kernels.cpu.dot import BFLOAT16, INT8, Dot, find_dot
from tvm_attn.kernels.cpu.prefetch import AHEAD, PREFETCH_LLVM, TILES, insert_prefetches
from tvm_attn.kernels.linear import LinearKernel, ResidualLinear
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.linear import linear
from tvm_attn.kernels.weights import PLAIN
from tvm_attn.storage import numpy_dtype
from tvm_attn.targets import CpuTarget


def _dot_step(kernel: LinearKernel, target: CpuTarget, choose: Chooser) -> tuple[int, Dot | None]:
    """The columns of a step, and its dot product instruction (None without one)."""
    if kernel.weights in PLAIN:
        return 1, None
    dot = find_dot(BFLOAT16 if kernel.weights == "bfloat16_pairs" else INT8, target)
    if dot is None or kernel.columns % dot.lanes:
        return largest_power(kernel.columns, target.lanes), None
    widths = (dot.lanes, 2 * dot.lanes) if kernel.columns % (2 * dot.lanes) == 0 else (dot.lanes,)
    return choose("lanes", widths, widths[-1] if kernel.rows == 1 else dot.lanes), dot


def _matmul(kernel: LinearKernel, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """Register tiles of R x C accumulators over whole columns of K.

    A task is one weight strip times a block of row groups. The block, K wide, fits half of the level-2 cache, so that
    the strip stays there too. Only the loop over a block's groups has an unknown bound, and it is the outer one.
    """
    lanes, dot = _dot_step(kernel, target, choose)
    plain = kernel.weights in PLAIN or kernel.weights == "bfloat16_pairs"
    weight_shape, weight_dtype = kernel.weight_types[0]
    schedule = s_tir.Schedule(
        linear(kernel, lanes, dot.name(lanes) if dot else None, dot is not None and dot.signed), enable_check=False
    )
    matmul, epilogue = schedule.get_child_blocks(schedule.get_sblock("root"))
    group, strip, row, column = schedule.get_loops(epilogue)
    # Powers of two, so that all kernels of a model have the same block borders.
    fitting = max(1, target.l2_bytes // 2 // (kernel.rows * kernel.in_features * 4))
    default = min(32, 1 << (fitting.bit_length() - 1))
    block = choose("group_block", (1, 2, 4, 8, 16, 32), default) if kernel.groups is None else 1
    outer, group = schedule.split(group, [None, block])
    schedule.reorder(outer, strip, group, row, column)
    task = schedule.fuse(outer, strip)
    schedule.parallel(task)
    # With one row, the hardware's prefetcher keeps up, except with int4 (benchmarks/README.md).
    default = 16384 if kernel.rows > 1 or kernel.weights == "int4" else 0
    ahead = choose("prefetch_bytes", (0, 4096, 8192, 16384, 32768), default)
    has_tiles = kernel.groups is None
    if ahead or has_tiles or dot:
        text = (dot.text(lanes) if dot else "") + (PREFETCH_LLVM if ahead or has_tiles else "")
        schedule.annotate(task, "pragma_import_llvm", text)
    schedule.vectorize(column)
    schedule.unroll(row)
    schedule.compute_at(matmul, group, preserve_unit_loops=True)
    schedule.set_scope(matmul, 0, "local")
    row, column, k = schedule.get_loops(matmul)[-3:]
    schedule.reorder(k, row, column)
    steps = int(schedule.get(k).extent)

    unroll = choose("k_unroll", (1, 2, 4, 8), 4 if kernel.rows == 1 and plain else 1)
    innermost = k
    if unroll > 1 and steps % unroll == 0:
        k, innermost = schedule.split(k, [None, unroll])
        schedule.unroll(innermost)
    if ahead:
        row_bytes = kernel.columns * numpy_dtype(weight_dtype).itemsize
        schedule.annotate(innermost, AHEAD, max(1, ahead // row_bytes))
    if has_tiles:
        schedule.annotate(group, TILES, 1)
    # In plain formats the columns are vectorised; the others already have vector statements.
    spread = schedule.vectorize if kernel.weights in PLAIN else schedule.unroll
    spread(column)
    schedule.unroll(row)
    init = schedule.decompose_reduction(matmul, k)
    row, column = schedule.get_loops(init)[-2:]
    spread(column)
    schedule.unroll(row)
    function = schedule.mod["main"]
    weight = function.params[1 if plain else 3]
    residual = function.params[-2] if isinstance(kernel, ResidualLinear) else None
    return insert_prefetches(function, weight, weight_shape[1] // steps, residual)


TEMPLATE = Template("cpu.matmul", 2, ("linear", "residual_linear", "qkv_linear", "head"), _matmul)
