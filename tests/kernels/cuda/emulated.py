"""The tensor-core kernels that the emulation runs, and their tiles.

Compiling C++ is slow, so kernels that only combine features of others are left out, and the tiles cover every kind of
tile once. A real GPU runs all kernels with the tiles that they are compiled with.
"""

from __future__ import annotations

import functools
from unittest import mock

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn import targets
from tvm_attn.kernels import Advance, Head, Kernel, LayerNorm, Linear, LinearKernel, QKVLinear, ResidualLinear
from tvm_attn.kernels.base import TENSOR_CORE_DTYPES
from tvm_attn.kernels.cuda import gemv_tiles, norm
from tvm_attn.kernels.cuda.gemv import GemvTiles, gemv
from tvm_attn.kernels.cuda.matmul import matmul
from tvm_attn.kernels.cuda.matmul_tiles import MatmulTiles
from tvm_attn.kernels.cuda.norm import NormTiles
from tvm_attn.kernels.cuda.sampling import AdvanceTiles, advance, default_tiles
from tvm_attn.kernels.template import activations_of
from tvm_attn.schedule import schedule

# One row group: every layer, format, number of rows and size of tiles occurs. None means the default tiles.
_QKV = {"heads": 2, "context": 16}
GEMV: dict[LinearKernel, GemvTiles | None] = {
    Linear(96, 72, 1, 1, "float16", 1, "float16", 1e-5, activation="gelu_new"): None,
    ResidualLinear(3072, 48, 1, 1, "float16", 1, "float16"): None,
    ResidualLinear(192, 72, 1, 1, "int4", 1, "bfloat16", 1e-5): None,
    QKVLinear(64, 192, 8, 1, "bfloat16", 1, "bfloat16", 1e-5, cache_dtype="bfloat16", **_QKV): GemvTiles(
        16, 2, 2, stages=2, repeats=2
    ),
    QKVLinear(64, 192, 8, 1, "int8", 1, "float16", cache_dtype="float16", **_QKV): GemvTiles(8, 4, 2, steps=2),
    Linear(96, 72, 8, 1, "int8", 1, "bfloat16", activation="gelu_new"): GemvTiles(16, 1, 1, stages=3, parts=2),
    Head(64, 1021, 8, 1, "int4", 1, "float16", 1e-5): GemvTiles(16, 4, 1, stages=3, repeats=5),
}

# Any number of rows. These tiles cover one to eight warps, along every axis; one, two and three fragments; every depth;
# copies that do not divide evenly among the threads; more stages than tiles of K; more row tiles than `raster`.
MATMUL_TILES = [
    MatmulTiles(32, 32, 64, 1, 2, stages=2),
    MatmulTiles(16, 24, 64, 1, 1, 2, stages=3, raster=2),
    MatmulTiles(64, 32, 64, 2, 2, stages=4),
    MatmulTiles(16, 32, 128, 1, 1, 4, stages=2),
    MatmulTiles(48, 16, 64, 3, 1, stages=3, raster=1),
    MatmulTiles(32, 48, 128, 2, 1, 2, stages=5),
    MatmulTiles(16, 16, 32, 1, 2, stages=3, raster=3),
    MatmulTiles(128, 64, 64, 4, 2, stages=2),
]

# Several warps per row, and blocks that reach past the last row.
NORM = {
    LayerNorm(1600, 1e-5, 8, activations="bfloat16"): NormTiles(4, 3),
    LayerNorm(768, 1e-5, 1, 1, "bfloat16"): NormTiles(2, 1),
}


def is_emulated(kernel: Kernel) -> bool:
    """Whether the emulation runs a kernel."""
    if isinstance(kernel, Advance):
        return True
    if activations_of(kernel) not in TENSOR_CORE_DTYPES:
        return False
    if not isinstance(kernel, LinearKernel):
        return True
    return kernel in GEMV or (kernel.groups is None and kernel in _matmul_kernels())


@functools.cache
def _matmul_kernels() -> list[LinearKernel]:
    """All dtypes and weights with `Linear`; of the epilogue, only the dtype of stores depends on them."""
    kernels = dict.fromkeys(
        case.kernel
        for family in (Linear, ResidualLinear, QKVLinear, Head)
        for case in family.cases()
        if case.kernel.activations in TENSOR_CORE_DTYPES and case.kernel.groups is None
    )
    return [k for k in kernels if isinstance(k, Linear) or (k.activations == "bfloat16") == (k.weights == "int4")]


def matmul_tiles_for(kernel: LinearKernel) -> MatmulTiles:
    """The next tiles that fit the kernel, so that different kernels get different tiles."""
    start = _matmul_kernels().index(kernel)
    turns = (MATMUL_TILES[(start + i) % len(MATMUL_TILES)] for i in range(len(MATMUL_TILES)))
    return next(tiles for tiles in turns if tiles.fits(kernel))


def rolled() -> mock._patch:
    """A context in which loops are not unrolled: the same statements, which compile in half the time."""
    return mock.patch.object(T, "unroll", T.serial)


@functools.cache
def function_for(kernel: Kernel) -> tirx.PrimFunc:
    """The function that the emulation runs."""
    if isinstance(kernel, Advance):
        # Emulating 1024 threads takes long, and computes the same.
        return advance(kernel, AdvanceTiles(min(default_tiles(kernel).threads, 256)))
    if isinstance(kernel, LayerNorm):
        return norm.layer_norm(kernel, NORM.get(kernel) or norm.default_tiles(kernel))
    if isinstance(kernel, LinearKernel) and kernel.groups == 1:
        return gemv(kernel, GEMV[kernel] or gemv_tiles.default_tiles(kernel))
    with rolled():
        if isinstance(kernel, LinearKernel):
            return matmul(kernel, matmul_tiles_for(kernel))
        return schedule(kernel, targets.read("cuda-sm80"))
