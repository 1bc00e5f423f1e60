"""The epilogue of the tensor-core matmul: bias, activation, residual, KV cache, stores.

float32 results are stored from the registers, two columns per lane: the four lanes of a fragment's row write 32 bytes,
a whole sector. 16-bit results would fill half a sector, so they go through shared memory and are stored 16 bytes per
lane, with a row's lanes side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import e, gcd, log2, pi, sqrt

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.cuda import ptx
from tvm_attn.kernels.cuda.matmul_block import Block
from tvm_attn.kernels.linear import Linear, QKVLinear


@dataclass(frozen=True)
class Operands:
    """The parameters of the function that the epilogue reads and writes; see the kernels' docstrings."""

    bias: tirx.Buffer | None
    residual: tirx.Buffer | None
    slots: tirx.Buffer | None
    positions: tirx.Buffer | None
    cache: tirx.Buffer | None
    y: tirx.Buffer


def epilogue(block: Block, sums: tirx.Buffer, operands: Operands) -> None:
    """Finishes and stores the sums, (row fragments, column fragments, 4) in each lane's registers.

    All copies to shared memory must be complete, and all threads past their last load from it.
    """
    if block.tiles.warp_slices > 1:
        _add_slices(block, sums)
    own = block.slice == 0 if block.tiles.warp_slices > 1 else None
    if block.kernel.output_dtype == "float32":
        with ptx.when(own):
            _store_float32(block, sums, operands)
        return
    with ptx.when(own):
        _stage(block, sums, operands)
    T.evaluate(T.cuda.cta_sync())
    _store_staged(block, operands)


def _add_slices(block: Block, sums: tirx.Buffer) -> None:
    """Adds the sums of all slices to those of slice 0, in the order of slices."""
    tiles = block.tiles
    count, threads = tiles.row_fragments * tiles.column_fragments * 4, tiles.threads // tiles.warp_slices
    address = block.shared + ptx.uint32(block.tile_thread * 4)
    with ptx.when(block.slice > 0):
        start = address + ptx.uint32((block.slice - 1) * (count * threads * 4))
        with T.unroll(count) as i:
            ptx.store_shared(start + ptx.uint32(i * (threads * 4)), [sums[i]])
    T.evaluate(T.cuda.cta_sync())
    with ptx.when(block.slice == 0):
        value = T.alloc_local((1,), "float32")
        with T.unroll(count) as i, T.unroll(tiles.warp_slices - 1) as other:
            ptx.load_shared([value[0]], address + ptx.uint32((other * count + i) * (threads * 4)))
            ptx.assign(sums[i], sums[i] + value[0])
    if block.kernel.output_dtype != "float32":
        T.evaluate(T.cuda.cta_sync())


def _column(block: Block, fragment: tirx.Expr) -> tirx.Expr:
    """The first of a lane's two columns of a fragment, relative to the output tile."""
    return block.warp_column + fragment * 8 + block.lane % 4 * 2


def _load_pair(
    block: Block,
    registers: list[tirx.Expr],
    flat: tirx.Buffer,
    first: tirx.Expr,
    column: tirx.Expr,
) -> None:
    """Loads two consecutive float32, from `first` on, at `column` of a row; leaves registers past N unchanged."""
    n = block.kernel.out_features
    if n % 2 == 0:
        with ptx.when(column < n if block.column_bound else None):
            ptx.load_global(registers, flat.ptr_to([first]))
        return
    for i in range(2):
        with ptx.when(column + i < n):
            ptx.assign(registers[i], flat[first + T.int64(i)])


def _add_bias(block: Block, sums: tirx.Buffer, bias: tirx.Buffer) -> None:
    tiles = block.tiles
    pair = T.alloc_local((2 * tiles.column_fragments,), "float32")
    with T.unroll(tiles.column_fragments) as fragment:
        registers = [pair[2 * fragment], pair[2 * fragment + 1]]
        for register in registers:
            ptx.assign(register, T.float32(0))
        column = block.first_column + _column(block, fragment)
        _load_pair(block, registers, bias, ptx.int64(column), column)
    with T.unroll(tiles.row_fragments) as row, T.unroll(4 * tiles.column_fragments) as i:
        index = row * (4 * tiles.column_fragments) + i
        ptx.assign(sums[index], sums[index] + pair[i // 4 * 2 + i % 2])


def _store_float32(block: Block, sums: tirx.Buffer, operands: Operands) -> None:
    """Stores y = sums, plus bias and residual if the kernel has them."""
    tiles, n = block.tiles, block.kernel.out_features
    size = ptx.int64(block.rows) * n
    y = T.decl_buffer((size,), "float32", data=operands.y.data)
    if operands.bias is not None:
        _add_bias(block, sums, operands.bias)
    count = tiles.column_fragments
    if operands.residual is not None:
        residual = T.decl_buffer((size,), "float32", data=operands.residual.data)
        loaded = T.alloc_local((2 * count,), "float32")
    with T.unroll(tiles.row_fragments) as fragment, T.unroll(2) as half:
        row = block.first_row + block.warp_row + fragment * 16 + half * 8 + block.lane // 4
        first = ptx.int64(row) * n

        def part(i: tirx.Expr) -> tuple[tirx.Expr, list[tirx.Expr]]:
            """A lane's first column of a fragment, and the registers of its two columns."""
            index = (fragment * count + i) * 4 + half * 2
            return block.first_column + _column(block, i), [sums[index], sums[index + 1]]

        with ptx.when(row < block.rows):
            if operands.residual is not None:
                # All loads of a row come before its stores, because the compiler may not reorder them.
                with T.unroll(count) as i:
                    column, _ = part(i)
                    registers = [loaded[2 * i], loaded[2 * i + 1]]
                    _load_pair(block, registers, residual, first + ptx.int64(column), column)
                with T.unroll(count) as i:
                    for j, value in enumerate(part(i)[1]):
                        ptx.assign(value, value + loaded[2 * i + j])
            with T.unroll(count) as i:
                column, values = part(i)
                place = first + ptx.int64(column)
                if n % 2 == 0:
                    with ptx.when(column < n if block.column_bound else None):
                        ptx.store_global(y.ptr_to([place]), values)
                else:
                    for j, value in enumerate(values):
                        with ptx.when(column + j < n):
                            T.buffer_store(y, value, [place + T.int64(j)])


def _activate(name: str, x: tirx.Expr) -> None:
    """Replaces x by activation(x).

    `kernels.activation.EXPRESSIONS` are polynomials for CPU vectors. Here they would cost as much as a product of 768
    steps, because a lane has 64 to 128 values to finish. The sigmoid uses two special functions of the hardware, with
    relative errors of 2**-22; erf and tanh are CUDA's.
    """
    if name == "relu":
        ptx.assign(x, T.max(x, T.float32(0)))
    elif name == "tanh":
        ptx.assign(x, T.tanh(x))
    elif name == "gelu":
        ptx.assign(x, T.float32(0.5) * x * (T.float32(1) + T.erf(x * T.float32(sqrt(0.5)))))
    elif name in ("silu", "gelu_new"):
        # silu is x / (1 + e**-x); gelu_new is 0.5 x (1 + tanh(u)) = x / (1 + e**(-2 u)).
        argument = x * T.float32(-log2(e))
        if name == "gelu_new":
            factor = -2.0 * sqrt(2.0 / pi) * log2(e)
            argument = x * (T.float32(factor) + T.float32(factor * 0.044715) * x * x)
        power = T.alloc_local((1,), "float32")[0]
        ptx.exp2(power, argument)
        ptx.reciprocal(power, power + T.float32(1))
        ptx.assign(x, x * power)
    else:
        raise ScheduleError(f"no activation {name!r} here: use one of tvm_attn.kernels.activation.EXPRESSIONS")


def _stage(block: Block, sums: tirx.Buffer, operands: Operands) -> None:
    """Writes the finished tile as `dtype` to shared memory, in rows of `staging_row_bytes`."""
    kernel, tiles = block.kernel, block.tiles
    assert operands.bias is not None
    _add_bias(block, sums, operands.bias)
    packed = T.alloc_local((1,), "uint32")[0]
    row_bytes = tiles.staging_row_bytes
    first = (block.warp_row + block.lane // 4) * row_bytes + (block.warp_column + block.lane % 4 * 2) * 2
    address = ptx.variable("uint32", block.shared + ptx.uint32(first))
    with T.unroll(tiles.row_fragments) as row, T.unroll(tiles.column_fragments) as column, T.unroll(2) as half:
        index = (row * tiles.column_fragments + column) * 4 + half * 2
        values = [sums[index], sums[index + 1]]
        if isinstance(kernel, Linear) and kernel.activation:
            for value in values:
                _activate(kernel.activation, value)
        ptx.pack(packed, values[0], values[1], kernel.activations)
        ptx.store_shared(address + ptx.uint32((row * 16 + half * 8) * row_bytes + column * 16), [packed])


def _store_staged(block: Block, operands: Operands) -> None:
    """Copies the tile from shared memory to y, or to q and the KV cache."""
    kernel, tiles, n = block.kernel, block.tiles, block.kernel.out_features
    # As many columns per lane as stay in one row and one head: 16 bytes, except for odd sizes.
    width = gcd(n // 3 // kernel.heads if isinstance(kernel, QKVLinear) else n, 8)
    chunks, buffer = tiles.columns // width, T.alloc_local((width // 2,), "uint32")
    registers = [buffer[i] for i in range(width // 2)]
    y = T.decl_buffer((_size(operands.y),), kernel.activations, data=operands.y.data)
    for index in block.spread(tiles.rows * chunks):
        tile_row, tile_column = index // chunks, index % chunks * width
        row, column = block.first_row + tile_row, block.first_column + tile_column
        valid = [row < block.rows] + ([] if block.column_bound is None else [column < n])
        with ptx.when(tirx.all(*valid)):
            ptx.load_shared(registers, block.shared + ptx.uint32(tile_row * tiles.staging_row_bytes + tile_column * 2))
            if isinstance(kernel, QKVLinear):
                _store_qkv(block, operands, y, row, column, registers)
            else:
                ptx.store_global(y.ptr_to([ptx.int64(row) * n + ptx.int64(column)]), registers)


def _store_qkv(
    block: Block,
    operands: Operands,
    q: tirx.Buffer,
    row: tirx.Expr,
    column: tirx.Expr,
    registers: list[tirx.Expr],
) -> None:
    """Stores neighbouring columns of one head: of q, or of a key or value into the cache."""
    kernel = block.kernel
    assert isinstance(kernel, QKVLinear) and operands.slots is not None and operands.positions is not None
    assert operands.cache is not None
    width, context = kernel.out_features // 3, kernel.context
    head_dim, rows = width // kernel.heads, kernel.rows
    cache = T.decl_buffer((_size(operands.cache),), kernel.activations, data=operands.cache.data)
    with T.If(column < width):
        with T.Then():
            ptx.store_global(q.ptr_to([ptx.int64(row) * width + ptx.int64(column)]), registers)
        with T.Else():
            slot = operands.slots[row // rows, row % rows]
            position = operands.positions[row // rows, row % rows]
            with ptx.when(position >= 0):
                # Keys and values of a slot are (2 H, P, D), and columns from `width` on are (2 H, D).
                head, place = column // head_dim - kernel.heads, column % head_dim
                line = (ptx.int64(slot) * (2 * kernel.heads) + ptx.int64(head)) * context + ptx.int64(position)
                ptx.store_global(cache.ptr_to([line * head_dim + ptx.int64(place)]), registers)


def _size(buffer: tirx.Buffer) -> tirx.Expr:
    """The number of elements, int64."""
    size = T.int64(1)
    for extent in buffer.shape:
        size = size * ptx.int64(extent)
    return size
