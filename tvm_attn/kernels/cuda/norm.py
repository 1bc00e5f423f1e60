"""LayerNorm (Ba et al., 2016, arXiv:1607.06450) on NVIDIA GPUs: one pass over memory.

A row stays in the registers of one or more warps, so the variance is the mean of squared distances from the mean, as in
`tvm_attn.kernels.norm`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import TENSOR_CORE_DTYPES
from tvm_attn.kernels.cuda.lanes import add_lanes, registers, sum_of
from tvm_attn.kernels.cuda.ptx import load_global, pack, store_global
from tvm_attn.kernels.cuda.tiles import choose_tiles
from tvm_attn.kernels.norm import LayerNorm
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.targets import CudaTarget


@dataclass(frozen=True)
class NormTiles:
    """The sizes of `layer_norm`.

    Attributes:
        row_warps: warps per row, a power of two.
        block_rows: rows per block.
    """

    row_warps: int = 1
    block_rows: int = 4

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 32 * self.row_warps * self.block_rows


def default_tiles(kernel: LayerNorm) -> NormTiles:
    """One warp per 1024 numbers of a row, so that a lane holds at most 32; a block has four warps or one row."""
    row_warps = 1
    while row_warps < 32 and 1024 * row_warps < kernel.width:
        row_warps *= 2
    return NormTiles(row_warps, max(1, 4 // row_warps))


def candidates(kernel: LayerNorm) -> list[NormTiles]:
    """Tiles to measure: a lane holds 4 to 64 numbers."""
    widths = [warps for warps in (1, 2, 4, 8, 16) if 4 <= -(-kernel.width // (32 * warps)) <= 64]
    return [NormTiles(warps, rows) for warps in widths or [1] for rows in (1, 2, 4, 8) if 2 <= warps * rows <= 16]


def layer_norm(kernel: LayerNorm, tiles: NormTiles) -> tirx.PrimFunc:
    """The function of `LayerNorm`; a thread's numbers come in runs of four if the width is a multiple of 4."""
    width, rows, dtype, epsilon, groups = kernel.width, kernel.rows, kernel.activations, kernel.epsilon, kernel.groups
    row_warps, block_rows, threads = tiles.row_warps, tiles.block_rows, tiles.threads
    run = 4 if width % 4 == 0 else 1
    row_threads = 32 * row_warps
    count = -(-width // (run * row_threads))
    whole = width % (run * row_threads) == 0

    @T.prim_func
    def layer_norm(x_handle: T.handle, gamma_handle: T.handle, beta_handle: T.handle, y_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        g = T.int32() if groups is None else T.meta_var(groups)
        x = T.match_buffer(x_handle, (g, rows, width), "float32")
        gamma = T.match_buffer(gamma_handle, (width,), "float32")
        beta = T.match_buffer(beta_handle, (width,), "float32")
        y = T.match_buffer(y_handle, (g, rows, width), dtype)
        T.device_entry()
        block = T.cta_id([(g * rows + block_rows - 1) // block_rows])
        warp = T.warp_id([row_warps * block_rows])
        lane = T.lane_id([32])
        thread = T.thread_id([threads])
        if row_warps > 1:
            shares = T.alloc_shared((2, block_rows, row_warps), "float32")
        numbers = T.alloc_local((count * run,), "float32")
        scale = T.alloc_local((count * run,), "float32")
        shift = T.alloc_local((count * run,), "float32")
        words = T.alloc_local((2,), "uint32")
        moments = T.alloc_local((2,), "float32")
        row: T.let[T.int32] = block * block_rows + warp // row_warps
        # Warps past the last row compute it again and store nothing.
        group: T.let[T.int32] = T.min(row, g * rows - 1) // rows
        member: T.let[T.int32] = T.min(row, g * rows - 1) % rows
        first: T.let[T.int32] = thread % row_threads * run
        last_inside: T.let[T.bool] = (count - 1) * run * row_threads + first < width

        @T.inline
        def add_warps(moment):
            """Replaces moments[moment] with its sum over the threads of this row."""
            add_lanes(moments, moment)
            if row_warps > 1:
                if lane == 0:
                    shares[moment, warp // row_warps, warp % row_warps] = moments[moment]
                T.cuda.cta_sync()
                moments[moment] = sum_of([shares[moment, warp // row_warps, i] for i in range(row_warps)])

        # All loads are in flight at once; past the row they repeat its end, which counts as zero.
        for i in T.unroll(count):
            at: T.let[T.int32] = T.min(i * run * row_threads + first, width - run)
            load_global(registers(numbers, i * run, run), x.ptr_to([group, member, at]))
        for i in T.unroll(count):
            at: T.let[T.int32] = T.min(i * run * row_threads + first, width - run)
            load_global(registers(scale, i * run, run), gamma.ptr_to([at]))
            load_global(registers(shift, i * run, run), beta.ptr_to([at]))
        if not whole:
            for i in T.unroll((count - 1) * run, count * run):
                numbers[i] = T.Select(last_inside, numbers[i], T.float32(0.0))
        moments[0] = sum_of(registers(numbers, 0, count * run))
        add_warps(0)
        moments[0] = moments[0] * T.float32(1.0 / width)
        for i in T.unroll(count * run):
            numbers[i] = numbers[i] - moments[0]
        if not whole:
            for i in T.unroll((count - 1) * run, count * run):
                numbers[i] = T.Select(last_inside, numbers[i], T.float32(0.0))
        moments[1] = sum_of([number * number for number in registers(numbers, 0, count * run)])
        add_warps(1)
        moments[1] = T.float32(1.0) / T.sqrt(moments[1] * T.float32(1.0 / width) + T.float32(epsilon))
        for i in T.unroll(count * run):
            numbers[i] = numbers[i] * moments[1] * scale[i] + shift[i]
        if row < g * rows:
            for i in T.unroll(count):
                at: T.let[T.int32] = i * run * row_threads + first
                if at < width:
                    if run == 1:
                        y[group, member, at] = T.Cast(dtype, numbers[i])
                    else:
                        for j in T.unroll(2):
                            pack(words[j], numbers[i * run + 2 * j], numbers[i * run + 2 * j + 1], dtype)
                        store_global(y.ptr_to([group, member, at]), registers(words, 0, 2))

    return layer_norm


def _layer_norm(kernel: LayerNorm, target: CudaTarget, choose: Chooser) -> tirx.PrimFunc:
    return layer_norm(kernel, choose_tiles(choose, default_tiles(kernel), candidates(kernel)))


TEMPLATE = Template("cuda.layer_norm", 1, ("layer_norm",), _layer_norm, TENSOR_CORE_DTYPES)
