"""Matrix multiplication on tensor cores for any number of rows: `mma.sync` fed by `cp.async` and `ldmatrix`, sm_80 up.

A block computes `rows` x `columns` of the result, see `MatmulTiles`. Tiles of x and of the weight go through a ring of
`stages` buffers in shared memory: while one is multiplied, `stages` - 1 others are being loaded (the multistage
pipeline of CUTLASS, "Efficient GEMM in CUDA"). A warp loads the fragments of the next step while it multiplies those of
the current one, also across stages, so that products hide the barrier between stages. Rows and columns past the end,
and steps past K, are zeros in shared memory and are not stored.

Shared memory has no padding: 16-byte units are swizzled within their row (`ptx.swizzle`), so that a row of 64 or 128
bytes is written by one `cp.async` after another and read by `ldmatrix`, both without bank conflicts. Since a swizzle
depends only on the row modulo 8 and steps take two units, a lane's address in step s is its address in step 0 xor 32 s,
plus constants.

Blocks are numbered in groups of `raster` row tiles, column by column inside a group, so that blocks that run at the
same time share their tiles of both operands in L2.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.cuda import ptx
from tvm_attn.kernels.cuda.matmul_block import Block
from tvm_attn.kernels.cuda.matmul_epilogue import Operands, epilogue
from tvm_attn.kernels.cuda.matmul_tiles import MatmulTiles
from tvm_attn.kernels.cuda.matmul_weights import PlainWeight, QuantizedWeight
from tvm_attn.kernels.linear import LinearKernel, QKVLinear, ResidualLinear


def matmul(kernel: LinearKernel, tiles: MatmulTiles) -> tirx.PrimFunc:
    """The TIRx function of a linear layer with `groups` None and `epsilon` None; its name is the kernel's family.

    The number of row groups is symbolic: any multiple of `kernel.rows` rows, even less than one tile.

    Raises:
        ScheduleError: the tiles do not fit the kernel (`MatmulTiles.fits`).
    """
    if not tiles.fits(kernel):
        raise ScheduleError(f"{tiles} does not fit {kernel}: choose from tvm_attn.kernels.cuda.matmul_cost.candidates")
    with IRBuilder() as ir, builder.prim_func():
        T.func_name(kernel.family)
        T.func_attr(ptx.kernel_attributes())
        x, weights, operands = parameters(kernel)
        T.device_entry()
        block = launch(kernel, tiles, x.shape[0] * kernel.rows)
        sums = _multiply(block, x, weights)
        epilogue(block, sums, operands)
    return ir.get()


def parameters(kernel: LinearKernel) -> tuple[tirx.Buffer, list[tirx.Buffer], Operands]:
    """The function's parameters in the order of the kernel's docstring."""
    k, n, dtype = kernel.in_features, kernel.out_features, kernel.activations
    shape = (tirx.Var("groups", "int32"), kernel.rows)

    def parameter(name: str, extents: tuple[tirx.Expr | int, ...], element: str) -> tirx.Buffer:
        return T.arg(name, T.buffer(extents, element))

    x = parameter("x", (*shape, k), dtype)
    names = ("weight", "scales")
    weights = [parameter(name, *typed) for name, typed in zip(names, kernel.weight_types, strict=False)]
    bias = parameter("bias", (n,), "float32") if kernel.has_bias else None
    residual = slots = positions = cache = None
    if isinstance(kernel, ResidualLinear):
        residual = parameter("residual", (*shape, n), "float32")
    if isinstance(kernel, QKVLinear):
        slots, positions = parameter("slots", shape, "int32"), parameter("positions", shape, "int32")
        heads, width = kernel.heads, n // 3
        extents = (tirx.Var("cache_slots", "int32"), 2, heads, kernel.context, width // heads)
        cache = parameter("cache", extents, dtype)
        y = parameter("q", (*shape, width), dtype)
    else:
        y = parameter("y", (*shape, n), kernel.output_dtype)
    return x, weights, Operands(bias, residual, slots, positions, cache, y)


def launch(kernel: LinearKernel, tiles: MatmulTiles, rows: tirx.Expr, align: int = 16) -> Block:
    """Launches the blocks and assigns each its output tile.

    Args:
        kernel: the layer.
        tiles: its tiles.
        rows: M.
        align: bytes that the address of the block's shared memory is a multiple of, a power of two.
    """
    row_tiles = (rows + (tiles.rows - 1)) // tiles.rows
    column_tiles = -(-kernel.out_features // tiles.columns)
    number, thread = T.cta_id([row_tiles * column_tiles]), T.thread_id([tiles.threads])
    padding = align if align > 64 else 0  # what CUDA aligns it to
    shared = T.alloc_buffer((tiles.shared_bytes(kernel) + padding,), "uint8", scope="shared.dyn")
    first = number // (tiles.raster * column_tiles) * tiles.raster
    within, height = number % (tiles.raster * column_tiles), T.min(row_tiles - first, tiles.raster)
    # None of these is negative, so truncated division needs no correction.
    row = ptx.variable("int32", (first + T.truncmod(within, height)) * tiles.rows)
    column = ptx.variable("int32", T.truncdiv(within, height) * tiles.columns)
    start = ptx.shared_address(shared)
    if padding:
        start = (start + T.uint32(align - 1)) & T.uint32(2**32 - align)
    address = ptx.variable("uint32", start)
    return Block(kernel, tiles, address, rows, row, column, thread)


class _Rows:
    """The tile of x as fragments of A, double-buffered across steps."""

    def __init__(self, block: Block, x: tirx.Buffer) -> None:
        self.block, tiles, k = block, block.tiles, block.kernel.in_features
        self.count, self.row_bytes = tiles.row_fragments, tiles.depth * 2
        self.x = T.decl_buffer((ptx.int64(block.rows) * k,), block.kernel.activations, data=x.data)
        self.fragments = T.alloc_local((2 * self.count * 4,), "uint32")
        # The four matrices of a load: rows 0-7 and 8-15 with k 0-7, then both with k 8-15.
        lane = block.lane
        unit = ptx.swizzle(lane % 8, block.slice * (2 * tiles.steps) + lane // 16, self.row_bytes)
        self.offset = ptx.variable("uint32", ptx.uint32((block.warp_row + lane % 16) * self.row_bytes + unit * 16))

    def copy(self, shared: tirx.Expr, tile: tirx.Expr | int) -> None:
        """Starts the copies of a stage."""
        block, tiles = self.block, self.block.tiles
        columns = (tile * tiles.depth, tiles.depth, block.kernel.in_features)
        block.copy(self.x, (block.first_row, tiles.rows, block.rows), columns, shared)

    def load(self, shared: tirx.Expr, step: int) -> None:
        """Loads the fragments of a step."""
        address = shared + (self.offset ^ T.uint32(step * 32))
        with T.unroll(self.count) as row:
            ptx.ldmatrix(self.fragment(step, row), address + ptx.uint32(row * (16 * self.row_bytes)))

    def fragment(self, step: int, row: tirx.Expr) -> list[tirx.Expr]:
        """The four registers of a fragment."""
        base = (step % 2 * self.count + row) * 4
        return [self.fragments[base + i] for i in range(4)]


def _multiply(block: Block, x: tirx.Buffer, weights: list[tirx.Buffer]) -> tirx.Buffer:
    """x W for the block's tile: (row fragments, column fragments, 4) float32 in each lane's registers."""
    kernel, tiles = block.kernel, block.tiles
    count = tiles.row_fragments * tiles.column_fragments * 4
    sums = T.alloc_local((count,), "float32")
    with T.unroll(count) as i:
        ptx.assign(sums[i], T.float32(0))
    a = _Rows(block, x)
    b = PlainWeight(block, weights) if len(weights) == 1 else QuantizedWeight(block, weights)
    rows_bytes, *weight_bytes = tiles.stage_bytes(kernel.weights)
    stage_bytes = rows_bytes + sum(weight_bytes)
    tile_count = -(-kernel.in_features // tiles.depth)

    def copy(stage: tirx.Expr, tile: tirx.Expr | int) -> None:
        a.copy(stage, tile)
        b.copy(stage + T.uint32(rows_bytes), tile)

    def load(stage: tirx.Expr, step: int) -> None:
        a.load(stage, step)
        b.load(stage + T.uint32(rows_bytes), step)

    def advance(stage: tirx.Expr) -> None:
        end = block.shared + T.uint32(tiles.stages * stage_bytes)
        following = stage + T.uint32(stage_bytes)
        ptx.assign(stage, T.Select(following == end, block.shared, following))

    def await_stage() -> None:
        # All groups of copies (one per stage) but the newest `stages` - 2 are complete, so the next stage is.
        ptx.cp_async_wait(tiles.stages - 2)
        T.evaluate(T.cuda.cta_sync())

    filled = min(tiles.stages - 1, tile_count)
    with T.unroll(filled) as tile:
        copy(block.shared + ptx.uint32(tile * stage_bytes), tile)
        ptx.cp_async_commit()
    for _ in range(filled, tiles.stages - 1):
        ptx.cp_async_commit()
    read = ptx.variable("uint32", block.shared)
    write = ptx.variable("uint32", block.shared + T.uint32((tiles.stages - 1) * stage_bytes))
    await_stage()
    load(read, 0)
    with T.serial(tile_count) as tile:
        for step in range(tiles.steps):
            b.prepare(step)
            if step == tiles.steps - 1:
                # All warps have loaded their last fragments of this stage, so the next copies may overwrite it.
                advance(read)
                await_stage()
            load(read, (step + 1) % tiles.steps)
            if step == 0:
                with ptx.when(tile + (tiles.stages - 1) < tile_count):
                    copy(write, tile + (tiles.stages - 1))
                # Commit a group for every tile, at the end an empty one, so that the count to wait for stays the same.
                ptx.cp_async_commit()
                advance(write)
            with T.unroll(tiles.row_fragments) as row, T.unroll(tiles.column_fragments) as column:
                index = (row * tiles.column_fragments + column) * 4
                registers = [sums[index + i] for i in range(4)]
                ptx.mma(registers, a.fragment(step, row), b.fragment(step, column), kernel.activations)
    # The epilogue reuses shared memory, and the last fragments, which nothing multiplies, were loaded from there.
    ptx.cp_async_wait(0)
    T.evaluate(T.cuda.cta_sync())
    return sums
