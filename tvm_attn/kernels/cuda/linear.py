"""Linear layers on tensor cores: one static group of rows (`gemv`) at the speed of memory, or any number (`matmul`).

One row with 16-bit weights needs no tensor cores (`gemv_rows`).

A weight has strips of one column, (N, K, 1): each output's inputs are contiguous, which is the column-major operand of
`mma.sync`. Quantized weights become floats in registers; x is not quantized.
"""

from __future__ import annotations

from tvm import tirx

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.base import TENSOR_CORE_DTYPES
from tvm_attn.kernels.cuda import gemv_rows, hopper_matmul
from tvm_attn.kernels.cuda.gemv import gemv
from tvm_attn.kernels.cuda.gemv_tiles import candidates as gemv_candidates
from tvm_attn.kernels.cuda.gemv_tiles import default_tiles as default_gemv_tiles
from tvm_attn.kernels.cuda.matmul import matmul
from tvm_attn.kernels.cuda.matmul_cost import candidates as matmul_candidates
from tvm_attn.kernels.cuda.matmul_cost import default_tiles as default_matmul_tiles
from tvm_attn.kernels.cuda.tiles import choose_tiles
from tvm_attn.kernels.linear import LinearKernel
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.storage import GROUP
from tvm_attn.targets import CudaTarget

_PROMPT_ROWS = 1024
"""Rows that tiles are chosen for if a kernel does not say how many there can be."""
_BY_ROWS = True
"""Whether one row takes `gemv_rows` if no record says so: a token of 124M takes 0.20 instead of 0.28 ms on an H100."""
_HOPPER_ROWS = 256
"""Rows from which a warpgroup's 64 are worth it; fewer are decoded, and latency decides."""


def _linear(kernel: LinearKernel, target: CudaTarget, choose: Chooser) -> tirx.PrimFunc:
    multiple = 16 if kernel.weights in TENSOR_CORE_DTYPES else GROUP
    if kernel.in_features % multiple:
        raise ScheduleError(
            f"tensor cores take {kernel.weights} weights of a multiple of {multiple} inputs, not {kernel.in_features}; "
            "build with --dtype float32"
        )
    if kernel.groups == 1:
        sizes = kernel, target.multiprocessors
        if gemv_rows.suits(kernel) and choose("by_rows", (0, 1), int(_BY_ROWS)):
            rows_tiles = choose_tiles(choose, gemv_rows.default_tiles(*sizes), gemv_rows.candidates(*sizes))
            return gemv_rows.gemv_rows(kernel, rows_tiles, target.has_dependent_launch)
        tiles = choose_tiles(choose, default_gemv_tiles(*sizes), gemv_candidates(*sizes))
        return gemv(kernel, tiles, target.has_dependent_launch)
    rows = _PROMPT_ROWS if kernel.max_groups is None else kernel.max_groups * kernel.rows
    if target.has_warpgroup_products and rows >= _HOPPER_ROWS and hopper_matmul.suits(kernel):
        best = hopper_matmul.default_tiles(kernel, rows, target.multiprocessors)
        return hopper_matmul.hopper_matmul(kernel, choose_tiles(choose, best, hopper_matmul.candidates(kernel)))
    default, others = default_matmul_tiles(kernel, rows), matmul_candidates(kernel, rows)
    return matmul(kernel, choose_tiles(choose, default, others))


TEMPLATE = Template("cuda.linear", 2, ("linear", "residual_linear", "qkv_linear", "head"), _linear, TENSOR_CORE_DTYPES)
