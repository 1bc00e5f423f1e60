"""How the tensor-core matmul is divided into blocks, warps and pipeline stages, which a tuner chooses."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_attn.kernels.cuda.limits import REGISTERS, SHARED_BYTES
from tvm_attn.kernels.linear import Linear, LinearKernel, QKVLinear
from tvm_attn.storage import GROUP

_MOST_REGISTERS = 236
"""Estimated registers above which kernels were seen to spill: a thread has at most 255."""
_WORD_BYTES = {"int8": 32, "int4": 16}
"""Bytes of a group of 32 rows of one column."""


@dataclass(frozen=True)
class MatmulTiles:
    """The free choices of one matmul kernel.

    Attributes:
        rows: rows of x per block, a multiple of 16 `warp_rows`.
        columns: columns of the weight per block, a multiple of 8 `warp_columns`.
        depth: extent of a pipeline stage along K, a power of two.
        warp_rows: warps along the rows.
        warp_columns: warps along the columns.
        warp_slices: warps that share an output tile, each with its part of every stage; their sums are added in shared
            memory. For few rows, when one warp cannot keep enough work in flight.
        stages: pipeline stages, at least 2.
        raster: row tiles that are computed together, column by column, so that what they read stays in L2.
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
        """Threads per block."""
        return 32 * self.warp_rows * self.warp_columns * self.warp_slices

    @property
    def steps(self) -> int:
        """m16n8k16 steps along K per warp and stage."""
        return self.depth // 16 // self.warp_slices

    @property
    def row_fragments(self) -> int:
        """Fragments of 16 rows per warp."""
        return self.rows // self.warp_rows // 16

    @property
    def column_fragments(self) -> int:
        """Fragments of 8 columns per warp."""
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
        """Bytes per row of a 16-bit result in shared memory; 16 more than needed, to avoid bank conflicts."""
        return self.columns * 2 + 16

    def shared_bytes(self, kernel: LinearKernel) -> int:
        """Bytes of shared memory per block: for the pipeline, or afterwards for the epilogue, whichever is more."""
        pipeline = self.stages * sum(self.stage_bytes(kernel.weights))
        slices = (self.warp_slices - 1) * self.rows * self.columns * 4
        staging = self.rows * self.staging_row_bytes if kernel.output_dtype != "float32" else 0
        return max(pipeline, slices, staging)

    def registers(self, kernel: LinearKernel) -> int:
        """An estimate of a thread's registers: sums, fragments, addresses. ptxas uses up to 30 more if it can."""
        fragments = 8 * self.row_fragments + (6 if kernel.weights in _WORD_BYTES else 4) * self.column_fragments
        copies = sum(self.stage_bytes(kernel.weights)) // (16 * self.threads)
        return 4 * self.row_fragments * self.column_fragments + fragments + 24 + copies * 3 // 2

    def fits(self, kernel: LinearKernel) -> bool:
        """Whether a kernel with these tiles runs on every architecture and keeps its sums in registers."""
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
            and self.suits_epilogue(kernel)
        )

    @staticmethod
    def suits_epilogue(kernel: LinearKernel) -> bool:
        """Whether the epilogue stores a kernel's results: 16-bit ones in pairs, all of one row and head."""
        return (
            kernel.epsilon is None
            and (not isinstance(kernel, Linear) or kernel.out_features % 2 == 0)
            and (not isinstance(kernel, QKVLinear) or kernel.out_features // 3 // kernel.heads % 2 == 0)
        )
