"""Linear layers on GPUs; `linear_matrix` has the loops for their matrix units.

A linear layer has two loop structures; if the number of rows is unknown, it has both and a branch on the host. For many
rows, a block of threads computes a tile of rows by columns: tiles of x and of the weight go through shared memory, and
every thread keeps a small tile of sums in registers (Volkov and Demmel, 2008). With few rows, the time goes into
reading the weight: a block takes a few columns, its threads split K, and shared memory is used once, to add their sums.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx

from tvm_attn.kernels.base import largest_power
from tvm_attn.kernels.gpu import linear_matrix
from tvm_attn.kernels.linear import LinearKernel
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.linear import linear
from tvm_attn.kernels.weights import PLAIN
from tvm_attn.storage import numpy_dtype
from tvm_attn.targets import GpuTarget

_TILE_COLUMNS = 64
"""Columns of a block of threads in `_tiled`, unless strips are wider."""


def _linear(kernel: LinearKernel, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """A linear layer with weights of any format."""
    if kernel.weights not in PLAIN:
        return _one_sum_a_thread(kernel, target, choose)
    function = linear(kernel)
    if kernel.rows == 1 and kernel.groups == 1:
        return _split_features(kernel, function, target, choose)
    # A group for matrices has the rows of two groups of register tiles.
    has_matrices = linear_matrix.fits(kernel, target)
    few_groups = choose("few_groups", (0, 1, 2, 4), 1 if has_matrices else 2)
    if kernel.groups is not None:
        return (_split_features if kernel.groups <= few_groups else _tiled)(kernel, function, target, choose)
    tiled = (linear_matrix.tiled if has_matrices else _tiled)(kernel, function, target, choose)
    if not few_groups:
        return tiled
    split = _split_features(kernel, function, target, choose)
    # Schedules of one function share its parameters. The call tells TVM that all threads take the same branch.
    groups = function.params[0].ty.shape[0]
    few = tirx.call_intrin("bool", "tirx.tvm_thread_invariant", groups <= few_groups)
    return tirx.PrimFunc(tiled.params, tirx.IfThenElse(few, split.body, tiled.body), tiled.ret_type, tiled.attrs)


def _tiled(kernel: LinearKernel, function: tirx.PrimFunc, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """Many rows: tiles of whole row groups by columns; rows past the last group and features past K count as zeros."""
    schedule = s_tir.Schedule(function)
    matmul, epilogue = schedule.get_child_blocks(schedule.get_sblock("root"))
    features, rows, columns = kernel.in_features, kernel.rows, kernel.columns
    strips = largest_power(kernel.strips, max(1, _TILE_COLUMNS // columns))
    group_block = choose("group_block", (1, 2, 4, 8), 4) if kernel.groups is None else 1
    k_tile = choose("k_tile", (8, 16, 32), 16)
    thread_columns = largest_power(columns, choose("thread_columns", (2, 4, 8), 4))
    thread_rows = largest_power(rows, choose("thread_rows", (1, 2, 4, 8), 4))
    tile_rows, tile_columns = group_block * rows, strips * columns
    # All are powers of two, and every thread fetches a part of each tile, so loops need no predicates.
    across = tile_columns // thread_columns
    most = min(target.max_threads, k_tile * min(tile_rows, tile_columns))
    down = min(tile_rows // thread_rows, most // across)

    pads_features = features % k_tile != 0
    if pads_features or kernel.groups is None:
        schedule.pad_einsum(matmul, [group_block, 1, 1, 1, k_tile])
    shared_x = schedule.cache_read(matmul, 0, "shared")
    shared_w = schedule.cache_read(matmul, 1, "shared")
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        if schedule.get(block).name_hint.endswith("_pad"):
            schedule.compute_inline(block)

    group, strip, row, column, k = schedule.get_loops(matmul)
    group_outer, group = schedule.split(group, [None, group_block])
    strip_outer, strip = schedule.split(strip, [None, strips])
    k_outer, k_vector, k = schedule.split(k, [None, k_tile // 4, 4])
    schedule.reorder(group_outer, strip_outer, group, row, strip, column)
    thread_y, row = schedule.split(schedule.fuse(group, row), [down, None])
    thread_x, column = schedule.split(schedule.fuse(strip, column), [None, thread_columns])
    schedule.reorder(group_outer, strip_outer, thread_y, thread_x, k_outer, k_vector, k, row, column)
    _bind(schedule, {"blockIdx.y": group_outer, "blockIdx.x": strip_outer})
    _bind(schedule, {"threadIdx.y": thread_y, "threadIdx.x": thread_x})
    schedule.set_scope(matmul, 0, "local")
    schedule.reverse_compute_at(epilogue, thread_x)
    _unroll(schedule, schedule.get_loops(epilogue)[4:])

    lanes = target.vector_bytes // 4
    fetch_lanes = lanes if not pads_features and features % lanes == 0 else 1
    for block, most in ((shared_x, fetch_lanes), (shared_w, lanes)):
        schedule.compute_at(block, k_outer)
        loops = schedule.get_loops(block)[5:]
        fetched = k_tile * (tile_rows if block == shared_x else tile_columns)
        vector = min(int(schedule.get(loops[-1]).extent), fetched // (across * down), most)
        _, fetch_y, fetch_x, lane = schedule.split(schedule.fuse(*loops), [None, down, across, vector])
        _bind(schedule, {"threadIdx.y": fetch_y, "threadIdx.x": fetch_x})
        schedule.vectorize(lane)
    # Four features of a row are one load from shared memory.
    register_x = schedule.cache_read(matmul, 0, "local")
    schedule.compute_at(register_x, k_vector)
    schedule.vectorize(schedule.get_loops(register_x)[-1])
    _unroll(schedule, schedule.get_loops(register_x)[6:-1])
    _unroll(schedule, [k_vector, k, row])
    schedule.vectorize(column)
    init = schedule.decompose_reduction(matmul, k_outer)
    init_row, init_column = schedule.get_loops(init)[-2:]
    schedule.unroll(init_row)
    schedule.vectorize(init_column)
    return schedule.mod["main"]


def _split_features(kernel: LinearKernel, function: tirx.PrimFunc, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """Few rows: a block takes some columns of a strip for one row group, and its threads split K."""
    schedule = s_tir.Schedule(function)
    total, epilogue = schedule.get_child_blocks(schedule.get_sblock("root"))
    features, rows, columns = kernel.in_features, kernel.rows, kernel.columns
    weight_bytes = numpy_dtype(kernel.weights).itemsize
    vector = largest_power(columns, choose("vector", (1, 2, 4, 8), min(4, target.vector_bytes // weight_bytes)))
    across = largest_power(columns // vector, choose("column_threads", (2, 4, 8, 16), 8))
    block_columns = vector * across
    # All partial sums of a block are in shared memory at the same time.
    fitting = target.shared_bytes // (4 * rows * block_columns)
    parts = largest_power(features, 1 << (min(fitting, target.max_threads // across).bit_length() - 1))
    unroll = largest_power(features // parts, choose("k_unroll", (1, 2, 4, 8), 4))

    group, strip, row, column, k = schedule.get_loops(total)
    part, thread_x, lane = schedule.split(column, [None, across, vector])
    k_outer, thread_y, k = schedule.split(k, [None, parts, unroll])
    schedule.reorder(group, strip, part, thread_y, thread_x, k_outer, k, row, lane)
    partial = schedule.rfactor(thread_y, 0)
    shared = schedule.cache_read(total, 0, "shared")
    schedule.set_scope(partial, 0, "local")
    schedule.set_scope(total, 0, "local")

    group, strip, part, thread_y, thread_x, row, lane = schedule.get_loops(total)
    schedule.reorder(group, strip, part, row, thread_x, lane, thread_y)
    block_x = schedule.fuse(strip, part)
    schedule.bind(group, "blockIdx.y")
    schedule.bind(block_x, "blockIdx.x")
    output = schedule.fuse(row, thread_x, lane)
    schedule.reverse_compute_at(epilogue, output)
    schedule.compute_at(shared, block_x, preserve_unit_loops=True)
    schedule.compute_at(partial, block_x, preserve_unit_loops=True)
    # Not earlier: the predicate that this split adds must apply to the epilogue only.
    _, output_y, output_x = schedule.split(output, [None, parts, across])
    _bind(schedule, {"threadIdx.y": output_y, "threadIdx.x": output_x})

    thread_y, _, _, row, column, k_outer, k = schedule.get_loops(partial)[2:]
    thread_x, lane = schedule.split(column, [across, vector])
    schedule.reorder(thread_y, thread_x, k_outer, k, row, lane)
    _bind(schedule, {"threadIdx.y": thread_y, "threadIdx.x": thread_x})
    _unroll(schedule, [k, row])
    schedule.vectorize(lane)
    init = schedule.decompose_reduction(partial, k_outer)
    init_row, init_lane = schedule.get_loops(init)[-2:]
    schedule.unroll(init_row)
    schedule.vectorize(init_lane)
    thread_y, _, _, row, column = schedule.get_loops(shared)[2:]
    thread_x, lane = schedule.split(column, [across, vector])
    schedule.reorder(thread_y, thread_x, row, lane)
    _bind(schedule, {"threadIdx.y": thread_y, "threadIdx.x": thread_x})
    schedule.unroll(row)
    schedule.vectorize(lane)
    return schedule.mod["main"]


def _one_sum_a_thread(kernel: LinearKernel, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """Weights in words: a thread unpacks and multiplies one column for one row; its neighbours take the next ones."""
    schedule = s_tir.Schedule(linear(kernel), enable_check=False)
    matmul, epilogue = schedule.get_child_blocks(schedule.get_sblock("root"))
    threads = choose("threads", (32, 64, 128, 256), min(128, target.max_threads))
    group, strip, row, column = schedule.get_loops(epilogue)
    schedule.reorder(group, row, strip, column)
    block_x, thread = schedule.split(schedule.fuse(group, row, strip, column), [None, threads])
    _bind(schedule, {"blockIdx.x": block_x, "threadIdx.x": thread})
    schedule.compute_at(matmul, thread)
    schedule.set_scope(matmul, 0, "local")
    return schedule.mod["main"]


def _bind(schedule: s_tir.Schedule, loops: dict[str, Any]) -> None:
    for tag, loop in loops.items():
        schedule.bind(loop, tag)


def _unroll(schedule: s_tir.Schedule, loops: list[Any]) -> None:
    for loop in loops:
        schedule.unroll(loop)


TEMPLATE = Template("gpu.matmul", 1, ("linear", "residual_linear", "qkv_linear", "head"), _linear)
