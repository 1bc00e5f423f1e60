"""How the tensor-core matmul is cut into blocks, warps and pipeline stages: what a tuner chooses."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_attn.kernels.cuda.limits import REGISTERS, SHARED_BYTES
from tvm_attn.kernels.linear import Linear, LinearKernel, QKVLinear
from tvm_attn.storage import GROUP

_MOST_REGISTERS = 236
"""Estimates above this were seen to spill: a thread has at most 255."""
_WORD_BYTES = {"int8": 32, "int4": 16}
"""The bytes of a group of 32 rows of one column."""


@dataclass(frozen=True)
class MatmulTiles:
    """The free choices of one matmul kernel.

    Attributes:
        rows: of x that a block computes, a multiple of 16 `warp_rows`.
        columns: of the weight that a block computes, a multiple of 8 `warp_columns`.
        depth: steps of K that a pipeline stage holds, a power of two.
        warp_rows: warps side by side along the rows.
        warp_columns: warps side by side along the columns.
        warp_slices: warps that share an output tile, each with its part of every stage; their sums meet in shared
            memory. For few rows, where one warp cannot keep enough work in flight.
        stages: of the pipeline, at least 2.
        raster: tiles of rows that are computed together, column after column, so that what they read stays in L2.
    """

    rows: int
    columns: int
    depth: int
    warp_rows: int
    warp_columns: int
    warp_slices: int = 1
    stages: int = 3
    raster: int = 8

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warp_rows * self.warp_columns * self.warp_slices

    @property
    def steps(self) -> int:
        """m16n8k16 steps along K that a warp does in one stage."""
        return self.depth // 16 // self.warp_slices

    @property
    def row_fragments(self) -> int:
        """Fragments of 16 rows of a warp."""
        return self.rows // self.warp_rows // 16

    @property
    def column_fragments(self) -> int:
        """Fragments of 8 columns of a warp."""
        return self.columns // self.warp_columns // 8

    def weight_row_bytes(self, weights: str) -> int:
        """Bytes of one column of the weight in a stage, without scales."""
        return self.depth // GROUP * _WORD_BYTES[weights] if weights in _WORD_BYTES else self.depth * 2

    def stage_bytes(self, weights: str) -> tuple[int, int, int]:
        """Bytes of x, of the weight, and of its scales (one word for two groups of 32) in one stage."""
        scales = self.columns * self.depth // GROUP * 2 if weights in _WORD_BYTES else 0
        return self.rows * self.depth * 2, self.columns * self.weight_row_bytes(weights), scales

    @property
    def staging_row_bytes(self) -> int:
        """Bytes between two rows of a 16-bit result in shared memory; 16 more than needed, against bank conflicts."""
        return self.columns * 2 + 16

    def shared_bytes(self, kernel: LinearKernel) -> int:
        """Bytes of shared memory of a block: of the pipeline, or of what the epilogue keeps there after it."""
        pipeline = self.stages * sum(self.stage_bytes(kernel.weights))
        slices = (self.warp_slices - 1) * self.rows * self.columns * 4
        staging = self.rows * self.staging_row_bytes if kernel.output_dtype != "float32" else 0
        return max(pipeline, slices, staging)

    def registers(self, kernel: LinearKernel) -> int:
        """An estimate of a thread's registers: sums, fragments, addresses. ptxas takes up to 30 more where it can."""
        fragments = 8 * self.row_fragments + (6 if kernel.weights in _WORD_BYTES else 4) * self.column_fragments
        copies = sum(self.stage_bytes(kernel.weights)) // (16 * self.threads)
        return 4 * self.row_fragments * self.column_fragments + fragments + 24 + copies * 3 // 2

    def fits(self, kernel: LinearKernel) -> bool:
        """Whether these tiles make a kernel that every architecture can run, and that keeps its sums in registers."""
        quantized = kernel.weights in _WORD_BYTES
        return (
            self.rows % (16 * self.warp_rows) == 0
            and self.columns % (8 * self.warp_columns) == 0
            and self.depth & (self.depth - 1) == 0
            # Fragments are double-buffered, so a warp needs an even number of steps; a group of 32 is two.
            and self.depth % (32 * self.warp_slices) == 0
            and (not quantized or self.depth % (2 * GROUP) == 0)
            and self.stages >= 2
            and self.threads <= 1024
            and self.registers(kernel) <= min(_MOST_REGISTERS, REGISTERS // self.threads)
            and self.shared_bytes(kernel) <= SHARED_BYTES
            and kernel.in_features % (GROUP if quantized else 16) == 0
            and kernel.epsilon is None
            # 16-bit results are stored in pairs, which must not cross a row or a head.
            and (not isinstance(kernel, Linear) or kernel.out_features % 2 == 0)
            and (not isinstance(kernel, QKVLinear) or kernel.out_features // 3 // kernel.heads % 2 == 0)
        )
