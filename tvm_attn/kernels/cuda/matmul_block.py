"""The block of threads that runs the tensor-core matmul, and how it copies a tile to shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tvm import DataType, tirx
from tvm.script import tirx as T

from tvm_attn.kernels.cuda import ptx
from tvm_attn.kernels.cuda.matmul_tiles import MatmulTiles
from tvm_attn.kernels.linear import LinearKernel


@dataclass(frozen=True)
class Block:
    """One block of threads: its output tile, and the positions of a thread and its warp in it."""

    kernel: LinearKernel
    tiles: MatmulTiles
    shared: tirx.Expr
    """Address of the block's shared memory, uint32."""
    rows: tirx.Expr
    """M, the rows of x."""
    first_row: tirx.Expr
    first_column: tirx.Expr
    thread: tirx.Expr

    @property
    def lane(self) -> tirx.Expr:
        """The lane's number in its warp."""
        return self.thread % 32

    @property
    def tile_thread(self) -> tirx.Expr:
        """The thread's number in its slice: threads of equal number have the same part of the output."""
        return self.thread % (32 * self.tiles.warp_rows * self.tiles.warp_columns)

    @property
    def slice(self) -> tirx.Expr:
        """The slice of K that the thread's warp takes in every stage."""
        return self.thread // (32 * self.tiles.warp_rows * self.tiles.warp_columns)

    @property
    def warp_row(self) -> tirx.Expr:
        """The first row of the warp's part of the output tile."""
        return self.tile_thread // 32 // self.tiles.warp_columns * (self.tiles.row_fragments * 16)

    @property
    def warp_column(self) -> tirx.Expr:
        """The first column of the warp's part of the output tile."""
        return self.tile_thread // 32 % self.tiles.warp_columns * (self.tiles.column_fragments * 8)

    @property
    def column_bound(self) -> int | None:
        """N if a tile may reach past it, otherwise None."""
        n = self.kernel.out_features
        return n if n % self.tiles.columns else None

    def spread(self, count: int) -> Iterator[tirx.Expr]:
        """Numbers 0 to `count` - 1, divided among the threads, neighbours to neighbours; the body runs for each."""
        whole, rest = divmod(count, self.tiles.threads)
        if whole:
            with T.unroll(whole) as turn:
                yield self.thread + turn * self.tiles.threads
        if rest:
            with ptx.when(self.thread < rest):
                yield self.thread + whole * self.tiles.threads

    def copy(
        self,
        source: tirx.Buffer,
        rows: tuple[tirx.Expr, int, tirx.Expr | int | None],
        columns: tuple[tirx.Expr, int, int],
        shared: tirx.Expr,
        unit_bytes: int = 16,
    ) -> None:
        """Starts the copies of a tile of a matrix into rows of shared memory, swizzled in units.

        Args:
            source: the matrix, flat.
            rows: first row of the tile, its number of rows, and the rows of the matrix if the tile may reach past them.
            columns: first column of the tile, its number of columns, and the columns of the matrix; zeros past them.
            shared: address of the tile, uint32.
            unit_bytes: bytes that swizzling keeps together, a multiple of 16.
        """
        (first_row, row_count, row_bound), (first_column, column_count, row_length) = rows, columns
        size = DataType(source.dtype).bits // 8
        row_bytes, chunk = column_count * size, 16 // size
        chunks, per_unit = row_bytes // 16, unit_bytes // 16
        for index in self.spread(row_count * chunks):
            row, place = index // chunks, index % chunks
            unit = ptx.swizzle(row, place // per_unit, row_bytes, unit_bytes)
            address = shared + ptx.uint32(row * row_bytes + unit * unit_bytes + place % per_unit * 16)
            column = first_column + place * chunk
            valid = [] if row_bound is None else [first_row + row < row_bound]
            valid += [] if row_length % column_count == 0 else [column < row_length]
            index64 = ptx.int64(first_row + row) * row_length + ptx.int64(column)
            ptx.cp_async(address, source.ptr_to([index64]), 16, tirx.all(*valid) if valid else None)
