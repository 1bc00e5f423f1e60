"""Float16 linear layers on GPUs with matrix units: KHR cooperative matrices on Vulkan.

A block of subgroups computes a tile of rows by columns. Tiles of x, rounded to float16, and of the weight go through
shared memory; every subgroup computes some of the tile's fragments, with float32 sums in registers. The sums go through
shared memory to the epilogue, because it is unspecified which thread holds which element of a fragment.

Rounding x changes an element by a relative 2**-11 at most, and x beyond 65504 becomes infinite; the plain template
rounds nothing. These kernels are validated, and tested on a software renderer with their matrix calls emulated; they
have never run on a device with matrix instructions.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import s_tir, tirx

from tvm_attn.kernels.base import largest_power
from tvm_attn.kernels.gpu.matrix_intrinsics import intrinsics
from tvm_attn.kernels.linear import LinearKernel
from tvm_attn.kernels.template import Chooser
from tvm_attn.targets import GpuTarget

# Rows of tiles in shared memory are a little longer than a power of two, or their columns would share banks. They begin
# at multiples of 16 bytes, which Vulkan requires for loading and storing a cooperative matrix.
_ALIGN, _PAD_BYTES = 16, 16


def fits(kernel: LinearKernel, target: GpuTarget) -> bool:
    """Whether this template computes a linear layer: the target has matrices, and they divide groups and strips."""
    if target.matrix is None or target.subgroup is None or kernel.weights != "float16" or kernel.groups is not None:
        return False
    m, n, _ = target.matrix
    return kernel.rows % m == 0 and kernel.columns % n == 0 and bool(_group_blocks(kernel, target))


def tiled(kernel: LinearKernel, function: tirx.PrimFunc, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """Many rows, for a kernel that `fits`; rows past the last group and features past K count as zeros."""
    assert target.matrix is not None and target.subgroup is not None
    m, n, k_step = target.matrix
    group_block, strip_block, k_tile = _tile(kernel, target, choose)
    tile_rows, tile_columns = group_block * kernel.rows, strip_block * kernel.columns
    subgroups = target.max_threads // target.subgroup
    down = _parts(group_block, kernel.rows // m, min(subgroups, choose("subgroups_down", (1, 2, 4), 2)))
    most = min(subgroups // math.prod(down), choose("subgroups_across", (1, 2, 4), 2))
    across = _parts(strip_block, kernel.columns // n, most)
    threads = (math.prod(down + across), target.subgroup)

    schedule = s_tir.Schedule(function)
    matmul, epilogue = schedule.get_child_blocks(schedule.get_sblock("root"))
    schedule.pad_einsum(matmul, [group_block, 1, 1, 1, k_tile])
    shared_x = schedule.cache_read(matmul, 0, "shared")
    schedule.unsafe_set_dtype(shared_x, 0, "float16")
    shared_w = schedule.cache_read(matmul, 1, "shared")
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        if schedule.get(block).name_hint.endswith("_pad"):
            schedule.compute_inline(block)

    group, strip, row, column, k = schedule.get_loops(matmul)
    block_y, group = schedule.split(group, [None, group_block])
    block_x, strip = schedule.split(strip, [None, strip_block])
    row, row_in = schedule.split(row, [None, m])
    column, column_in = schedule.split(column, [None, n])
    k_outer, k, k_in = schedule.split(k, [None, k_tile // k_step, k_step])
    places = (group, row, strip, column)
    split = [schedule.split(loop, [count, None]) for loop, count in zip(places, down + across, strict=True)]
    subgroup_loops, loops = zip(*split, strict=True)
    schedule.reorder(block_y, block_x, *subgroup_loops, k_outer, k, *loops, row_in, column_in, k_in)
    subgroup = schedule.fuse(*subgroup_loops)
    for loop, tag in ((block_y, "blockIdx.y"), (block_x, "blockIdx.x"), (subgroup, "threadIdx.y")):
        schedule.bind(loop, tag)

    schedule.set_scope(matmul, 0, "shared")
    store = schedule.cache_write(matmul, 0, "wmma.accumulator")
    schedule.reverse_compute_at(store, subgroup)
    load_a = schedule.cache_read(matmul, 0, "wmma.matrix_a")
    load_b = schedule.cache_read(matmul, 1, "wmma.matrix_b")
    schedule.compute_at(load_a, k)
    schedule.compute_at(load_b, k)
    for block, sizes in ((load_a, (m, k_step)), (load_b, (k_step, n)), (store, (m, n))):
        i, j = schedule.get_loops(block)[-2:]
        i, i_in = schedule.split(i, [None, sizes[0]])
        j, j_in = schedule.split(j, [None, sizes[1]])
        schedule.reorder(i, j, i_in, j_in)
    fill = schedule.decompose_reduction(matmul, k_outer)

    lanes = target.vector_bytes // 4 if kernel.in_features % k_tile == 0 else 1
    for block, size, most in (
        (shared_x, tile_rows * k_tile, lanes),
        (shared_w, tile_columns * k_tile, target.vector_bytes // 2),
    ):
        schedule.compute_at(block, k_outer)
        vector = max(1, largest_power(size, math.prod(threads) * most) // math.prod(threads))
        _share(schedule, schedule.get_loops(block)[4:], threads, vector)
        schedule.storage_align(block, 0, -2, _ALIGN, _PAD_BYTES // 2)
    schedule.reverse_compute_at(epilogue, block_x)
    _share(schedule, schedule.get_loops(epilogue)[2:], threads, 1)

    sums = schedule.get(store).name_hint
    _tensorize(schedule, {"fill": fill, "load_a": load_a, "load_b": load_b, "multiply": matmul, "store": store}, target)
    schedule.storage_align(f"{sums}_o", 0, -2, _ALIGN, _PAD_BYTES // 4)
    return schedule.mod["main"]


def _tile(kernel: LinearKernel, target: GpuTarget, choose: Chooser) -> tuple[int, int, int]:
    """The row groups and strips of a block and the features of a step, chosen from what shared memory allows."""
    assert target.matrix is not None
    k_step = target.matrix[2]
    group_blocks = _group_blocks(kernel, target)
    group_block = choose("matrix_groups", group_blocks, max(size for size in group_blocks if size <= 4))
    rows = group_block * kernel.rows

    def fitting(columns: int, k: int) -> bool:
        return _shared_bytes(rows, columns, k) <= target.shared_bytes

    strips = [n for n in (1, 2, 4) if kernel.strips % n == 0 and fitting(n * kernel.columns, k_step)]
    narrow = [n for n in strips if n * kernel.columns <= 64]
    strip_block = choose("matrix_strips", strips, max(narrow, default=1))
    depths = [n * k_step for n in (1, 2, 4) if fitting(strip_block * kernel.columns, n * k_step)]
    return group_block, strip_block, choose("matrix_k", depths, depths[min(1, len(depths) - 1)])


def _parts(blocks: int, fragments: int, most: int) -> tuple[int, int]:
    """How many parts the subgroups divide a tile's row groups or strips into, and how many the fragments of each."""
    outer = largest_power(blocks, most)
    return outer, largest_power(fragments, most // outer)


def _group_blocks(kernel: LinearKernel, target: GpuTarget) -> list[int]:
    """The numbers of row groups per block for which shared memory has room, together with one strip."""
    assert target.matrix is not None
    columns, k = kernel.columns, target.matrix[2]
    return [n for n in (1, 2, 4, 8) if _shared_bytes(n * kernel.rows, columns, k) <= target.shared_bytes]


def _shared_bytes(rows: int, columns: int, k: int) -> int:
    """Bytes of shared memory of a block: float16 tiles of x and of the weight, float32 sums."""
    return rows * (2 * k + _PAD_BYTES) + k * (2 * columns + _PAD_BYTES) + rows * (4 * columns + _PAD_BYTES)


def _share(schedule: s_tir.Schedule, loops: list[Any], threads: tuple[int, int], vector: int) -> None:
    """Divides the elements that some loops visit among the threads of a block, `vector` neighbours at a time."""
    _, y, x, lane = schedule.split(schedule.fuse(*loops), [None, *threads, vector])
    schedule.bind(y, "threadIdx.y")
    schedule.bind(x, "threadIdx.x")
    if vector > 1:
        schedule.vectorize(lane)


def _tensorize(schedule: s_tir.Schedule, blocks: dict[str, Any], target: GpuTarget) -> None:
    """Replaces each block's loops over the elements of a fragment with its intrinsic; unrolls the loops around it."""
    assert target.matrix is not None
    names = intrinsics(*target.matrix)
    for operation, block in blocks.items():
        loops = schedule.get_loops(block)
        elements = len(loops) - (3 if operation == "multiply" else 2)
        schedule.tensorize(loops[elements], names[operation])
        # A fragment can be in registers only if its index is a constant. The outer loops are those over blocks and
        # subgroups, and for operands the one over tiles of K.
        for loop in loops[3 if operation in ("fill", "store") else 4 : elements]:
            if schedule.get(loop).kind == tirx.ForKind.SERIAL:
                schedule.unroll(loop)
