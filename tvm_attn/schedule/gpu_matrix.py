"""Schedule template of float16 linear layers for GPUs with matrix units: KHR cooperative matrices on Vulkan.

A block of subgroups computes a tile of rows by columns. Tiles of x, rounded to float16, and of the weight go through
shared memory; every subgroup keeps some of the tile's fragments in registers and multiplies them with float32 sums; the
sums go through shared memory to the epilogue, since which thread holds which element of a fragment is unspecified.

Rounding x costs a relative 2**-11 an element at most, and x beyond 65504 becomes infinite: the plain template rounds
nothing. This has been validated and compared on a software renderer up to the tensor intrinsics, which replace plain
loops over fragments; with them it has never run on a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx

from tvm_attn.kernels.weights import strip_columns as largest_power
from tvm_attn.schedule.base import Chooser
from tvm_attn.schedule.matrix_intrinsics import intrinsics
from tvm_attn.targets import GpuTarget

_PAD_BYTES = 16
"""Added to the rows of tiles in shared memory, whose columns would otherwise share banks. Cooperative matrices ask for
rows that begin at multiples of 16 bytes."""


def fits(kernel: Any, target: GpuTarget) -> bool:
    """Whether this template computes a linear layer: the target has matrices, and whole ones fit groups and strips."""
    if target.matrix is None or target.subgroup is None or kernel.weights != "float16" or kernel.groups is not None:
        return False
    m, n, _ = target.matrix
    return kernel.rows % m == 0 and kernel.columns % n == 0 and bool(_group_blocks(kernel, target))


def tiled(kernel: Any, function: tirx.PrimFunc, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """The scheduled function of a linear layer that `fits`."""
    assert target.matrix is not None
    fragments = plain_fragments(kernel, function, target, choose)
    tensorize(fragments, target.matrix)
    return fragments.schedule.mod["main"]


def _shared_bytes(rows: int, columns: int, k: int) -> int:
    """Shared memory of a block: float16 tiles of x and the weight, float32 sums."""
    return rows * (2 * k + _PAD_BYTES) + k * (2 * columns + _PAD_BYTES) + rows * (4 * columns + _PAD_BYTES)


def _group_blocks(kernel: Any, target: GpuTarget) -> list[int]:
    """How many row groups of a block shared memory allows, with the shortest tiles and a strip."""
    assert target.matrix is not None
    k = target.matrix[2]
    blocks = (1, 2, 4, 8)
    return [n for n in blocks if _shared_bytes(n * kernel.rows, kernel.columns, k) <= target.shared_bytes]


@dataclass(frozen=True)
class Fragments:
    """A schedule whose fragments are plain arrays of each thread, and what all threads of a subgroup do to them.

    Attributes:
        schedule: complete but for `tensorize`.
        fill, load_a, load_b, multiply, store: the blocks that touch fragments; their innermost loops are one fragment.
        whole: loops over whole fragments.
    """

    schedule: s_tir.Schedule
    fill: Any
    load_a: Any
    load_b: Any
    multiply: Any
    store: Any
    whole: list[Any]


def plain_fragments(kernel: Any, function: tirx.PrimFunc, target: GpuTarget, choose: Chooser) -> Fragments:
    """All of the schedule but the tensor intrinsics. It computes the same without them, many times over."""
    assert target.matrix is not None and target.subgroup is not None
    schedule = s_tir.Schedule(function)
    matmul, epilogue = schedule.get_child_blocks(schedule.get_sblock("root"))
    m, n, k_step = target.matrix
    rows, columns = kernel.rows, kernel.columns
    group_blocks = _group_blocks(kernel, target)
    group_block = choose("matrix_groups", group_blocks, max(size for size in group_blocks if size <= 4))
    strip_blocks = [
        count
        for count in (1, 2, 4)
        if kernel.strips % count == 0
        and _shared_bytes(group_block * rows, count * columns, k_step) <= target.shared_bytes
    ]
    strip_block = choose("matrix_strips", strip_blocks, largest_power(strip_blocks[-1], max(1, 64 // columns)))
    tile_rows, tile_columns = group_block * rows, strip_block * columns
    k_tiles = [
        depth * k_step
        for depth in (1, 2, 4)
        if _shared_bytes(tile_rows, tile_columns, depth * k_step) <= target.shared_bytes
    ]
    k_tile = choose("matrix_k", k_tiles, k_tiles[min(1, len(k_tiles) - 1)])
    subgroups = target.max_threads // target.subgroup
    down = largest_power(tile_rows // m, min(subgroups, choose("subgroups_down", (1, 2, 4), 2)))
    across = largest_power(tile_columns // n, min(subgroups // down, choose("subgroups_across", (1, 2, 4), 2)))

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
    schedule.reorder(block_y, block_x, group, row, strip, column, k_outer, k, row_in, column_in, k_in)
    subgroup_y, row = schedule.split(schedule.fuse(group, row), [down, None])
    subgroup_x, column = schedule.split(schedule.fuse(strip, column), [across, None])
    schedule.reorder(subgroup_y, subgroup_x, k_outer, k, row, column)
    subgroup = schedule.fuse(subgroup_y, subgroup_x)
    schedule.bind(block_y, "blockIdx.y")
    schedule.bind(block_x, "blockIdx.x")
    schedule.bind(subgroup, "threadIdx.y")

    schedule.set_scope(matmul, 0, "shared")
    store = schedule.cache_write(matmul, 0, "local")
    schedule.reverse_compute_at(store, subgroup)
    load_a = schedule.cache_read(matmul, 0, "local")
    load_b = schedule.cache_read(matmul, 1, "local")
    for block, sizes in ((load_a, (m, k_step)), (load_b, (k_step, n)), (store, (m, n))):
        if block != store:
            schedule.compute_at(block, k)
        i, j = schedule.get_loops(block)[-2:]
        i, i_in = schedule.split(i, [None, sizes[0]])
        j, j_in = schedule.split(j, [None, sizes[1]])
        schedule.reorder(i, j, i_in, j_in)
    fill = schedule.decompose_reduction(matmul, k_outer)
    whole = [k]
    for block, first, last in ((fill, 3, -2), (load_a, 5, -2), (load_b, 5, -2), (matmul, 5, -3), (store, 3, -2)):
        whole += schedule.get_loops(block)[first:last]

    threads = (down * across, target.subgroup)
    pads_features = kernel.in_features % k_tile != 0
    x_lanes = 1 if pads_features else target.vector_bytes // 4
    for block, size, lanes in (
        (shared_x, tile_rows * k_tile, x_lanes),
        (shared_w, tile_columns * k_tile, target.vector_bytes // 2),
    ):
        schedule.compute_at(block, k_outer)
        vector = max(1, largest_power(size, math.prod(threads) * lanes) // math.prod(threads))
        _share(schedule, schedule.get_loops(block)[4:], threads, vector)
        schedule.storage_align(block, 0, -2, 16, 8)
    schedule.reverse_compute_at(epilogue, block_x)
    _share(schedule, schedule.get_loops(epilogue)[2:], threads, 1)
    return Fragments(schedule, fill, load_a, load_b, matmul, store, whole)


def _share(schedule: s_tir.Schedule, loops: list[Any], threads: tuple[int, int], vector: int) -> None:
    """Gives the elements of some loops to the threads of a block."""
    _, y, x, lane = schedule.split(schedule.fuse(*loops), [None, *threads, vector])
    schedule.bind(y, "threadIdx.y")
    schedule.bind(x, "threadIdx.x")
    if vector > 1:
        schedule.vectorize(lane)


def tensorize(fragments: Fragments, sizes: tuple[int, int, int]) -> None:
    """Moves the fragments to the registers of subgroups and replaces the loops over their elements by intrinsics."""
    schedule, names = fragments.schedule, intrinsics(*sizes)
    sums = schedule.get(fragments.store).name_hint
    schedule.set_scope(fragments.load_a, 0, "wmma.matrix_a")
    schedule.set_scope(fragments.load_b, 0, "wmma.matrix_b")
    schedule.set_scope(fragments.multiply, 0, "wmma.accumulator")
    for block in ("fill", "load_a", "load_b", "multiply", "store"):
        loops = schedule.get_loops(getattr(fragments, block))
        schedule.tensorize(loops[-3 if block == "multiply" else -2], names[block])
    schedule.storage_align(f"{sums}_o", 0, -2, 16, 4)
    for loop in fragments.whole:  # a fragment is in registers only where its index is a constant
        schedule.unroll(loop)
