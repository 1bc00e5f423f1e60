"""Matrix multiplication with Hopper's warpgroup products (`wgmma`), for any number of rows and 16-bit weights.

The same blocks, stages and epilogue as in `tvm_attn.kernels.cuda.matmul`, with another product: a warpgroup multiplies
64 rows by all columns of the block, and both operands come from shared memory. A stage is 64 deep, so its rows have 128
bytes, and the swizzle in which `Block.copy` writes them is the one that `wgmma` reads. A product runs while the next
stage is being waited for: a stage is free one turn later than in `matmul`, when every warpgroup has passed the barrier
after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.cuda import ptx
from tvm_attn.kernels.cuda.limits import HOPPER_SHARED_BYTES
from tvm_attn.kernels.cuda.matmul import launch, parameters
from tvm_attn.kernels.cuda.matmul_block import Block
from tvm_attn.kernels.cuda.matmul_epilogue import epilogue
from tvm_attn.kernels.cuda.matmul_tiles import MatmulTiles
from tvm_attn.kernels.linear import LinearKernel

_DEPTH = 64
"""Extent of a stage along K: 128 bytes."""
_SWIZZLE_BYTES = 1024
"""Eight rows: the alignment of a swizzled matrix."""
_ALL_SHARED_BYTES = 228 << 10
"""Bytes of shared memory of a multiprocessor; each block takes 1 KiB more than it asks for."""
_BARRIER, _LATENCY = 60.0, 1500.0  # clocks: of a barrier, and from the start of a block to its first product


def tiles_of(warpgroups: int, columns: int, stages: int) -> MatmulTiles:
    """Tiles of `hopper_matmul`: 64 rows for each warpgroup."""
    return MatmulTiles(64 * warpgroups, columns, _DEPTH, 4 * warpgroups, 1, 1, stages)


def candidates(kernel: LinearKernel) -> Iterator[MatmulTiles]:
    """Tiles for a search to try: all that fit."""
    for warpgroups, columns, stages in product((1, 2, 3), (64, 96, 128, 160, 192, 256), (3, 4, 5, 6)):
        tiles = tiles_of(warpgroups, columns, stages)
        if fits(kernel, tiles):
            yield tiles


def default_tiles(kernel: LinearKernel, rows: int, multiprocessors: int = 132) -> MatmulTiles:
    """The tiles that `predicted_clocks` prefers for this number of rows; of equal ones, those with more stages."""
    return min(
        candidates(kernel), key=lambda tiles: (predicted_clocks(kernel, tiles, rows, multiprocessors), -tiles.stages)
    )


def predicted_clocks(kernel: LinearKernel, tiles: MatmulTiles, rows: int, multiprocessors: int) -> float:
    """Clocks of a call on an H100, without starting and ending it.

    A stage takes the longer of its products (2048 a clock, of 16-bit numbers) and of its copies from L2 (64 bytes a
    clock), and a barrier. Blocks on one multiprocessor share both.
    """
    blocks = -(-rows // tiles.rows) * -(-kernel.out_features // tiles.columns)
    resident = min(
        _ALL_SHARED_BYTES // (tiles.shared_bytes(kernel) + 2 * _SWIZZLE_BYTES), 65536 // (168 * tiles.threads)
    )
    turns = -(-blocks // (multiprocessors * max(1, resident)))
    together = min(max(1, resident), -(-blocks // multiprocessors))
    products, copies = tiles.rows * tiles.columns * _DEPTH / 2048, (tiles.rows + tiles.columns) * 2 * _DEPTH / 64
    stage = together * max(products, copies) + _BARRIER
    finish = together * tiles.rows * tiles.columns * (4 if kernel.output_dtype == "float32" else 3) / 64
    return turns * (_LATENCY + -(-kernel.in_features // _DEPTH) * stage + finish)


def suits(kernel: LinearKernel) -> bool:
    """Whether `hopper_matmul` computes a kernel: with weights of 16 bits, and results that the epilogue stores."""
    return kernel.weights == kernel.activations and MatmulTiles.suits_epilogue(kernel)


def fits(kernel: LinearKernel, tiles: MatmulTiles) -> bool:
    """Whether `hopper_matmul` computes a kernel with these tiles, without spilling registers."""
    return (
        suits(kernel)
        and tiles == tiles_of(tiles.rows // 64, tiles.columns, tiles.stages)
        and tiles.columns % 8 == 0
        and tiles.columns <= 256
        and tiles.stages >= 3
        and tiles.columns // 2 + 72 <= 65536 // tiles.threads
        and tiles.shared_bytes(kernel) + _SWIZZLE_BYTES <= HOPPER_SHARED_BYTES
    )


def hopper_matmul(kernel: LinearKernel, tiles: MatmulTiles) -> tirx.PrimFunc:
    """The TIRx function of a linear layer with `groups` None and `epsilon` None; see `matmul`.

    Raises:
        ScheduleError: the tiles do not fit the kernel.
    """
    if not fits(kernel, tiles):
        raise ScheduleError(
            f"{tiles} does not fit {kernel}: choose from tvm_attn.kernels.cuda.hopper_matmul.candidates"
        )
    with IRBuilder() as ir, builder.prim_func():
        T.func_name(kernel.family)
        T.func_attr(ptx.kernel_attributes())
        x, (weight,), operands = parameters(kernel)
        T.device_entry()
        block = launch(kernel, tiles, x.shape[0] * kernel.rows, align=_SWIZZLE_BYTES)
        sums = _multiply(block, x, weight)
        epilogue(block, sums, operands)
    return ir.get()


def _multiply(block: Block, x: tirx.Buffer, weight: tirx.Buffer) -> tirx.Buffer:
    """x W for the block's tile: (column fragments, 4) float32 in each lane's registers."""
    kernel, tiles = block.kernel, block.tiles
    k, n, dtype, stages = kernel.in_features, kernel.out_features, kernel.activations, tiles.stages
    x = T.decl_buffer((ptx.int64(block.rows) * k,), dtype, data=x.data)
    weight = T.decl_buffer((n * k,), dtype, data=weight.data)
    count = tiles.column_fragments * 4
    sums = T.alloc_local((count,), "float32")
    with T.unroll(count) as i:
        ptx.assign(sums[i], T.float32(0))
    rows_bytes, stage_bytes = tiles.rows * 2 * _DEPTH, (tiles.rows + tiles.columns) * 2 * _DEPTH
    tile_count = -(-k // _DEPTH)

    def copy(stage: tirx.Expr, tile: tirx.Expr | int) -> None:
        columns = (tile * _DEPTH, _DEPTH, k)
        block.copy(x, (block.first_row, tiles.rows, block.rows), columns, stage)
        block.copy(
            weight, (block.first_column, tiles.columns, block.column_bound), columns, stage + T.uint32(rows_bytes)
        )

    def advance(stage: tirx.Expr) -> None:
        end = block.shared + T.uint32(stages * stage_bytes)
        following = stage + T.uint32(stage_bytes)
        ptx.assign(stage, T.Select(following == end, block.shared, following))

    for tile in range(stages - 2):
        if tile < tile_count:
            copy(block.shared + T.uint32(tile * stage_bytes), tile)
        ptx.cp_async_commit()
    read = ptx.variable("uint32", block.shared)
    write = ptx.variable("uint32", block.shared + T.uint32((stages - 2) * stage_bytes))
    warpgroup_rows = ptx.variable("uint32", ptx.uint32(block.thread // 128 * (64 * 2 * _DEPTH)))
    with T.serial(tile_count) as tile:
        ptx.cp_async_wait(stages - 3)
        ptx.fence_async_proxy()
        T.evaluate(T.cuda.cta_sync())
        ptx.wgmma_fence()
        for step in range(_DEPTH // 16):
            ptx.wgmma(
                [sums[i] for i in range(count)],
                ptx.wgmma_descriptor(read + warpgroup_rows + T.uint32(step * 32), 0, _SWIZZLE_BYTES),
                ptx.wgmma_descriptor(read + T.uint32(rows_bytes + step * 32), 0, _SWIZZLE_BYTES),
                dtype,
            )
        ptx.wgmma_commit()
        # Every warpgroup has passed the barrier above, so the products of the stage before the last are complete.
        with ptx.when(tile + (stages - 2) < tile_count):
            copy(write, tile + (stages - 2))
        ptx.cp_async_commit()
        ptx.wgmma_wait(1)
        advance(read)
        advance(write)
    ptx.wgmma_wait(0)
    ptx.cp_async_wait(0)
    T.evaluate(T.cuda.cta_sync())
    return sums
