"""Greedy sampling at the end of a decode step on NVIDIA GPUs: the next token and position of each row, in place.

One block reads a row. At 50257 columns that takes one multiprocessor about 2 us (200 KB at 64 bytes per clock), as long
as a second launch would take, so rows are not split over blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.cuda.lanes import shuffle_xor
from tvm_attn.kernels.cuda.ptx import kernel_attributes, load_global, wait_for_earlier_kernel
from tvm_attn.kernels.cuda.tiles import choose_tiles
from tvm_attn.kernels.sampling import Advance
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.targets import CudaTarget


@dataclass(frozen=True)
class AdvanceTiles:
    """The sizes of `advance`.

    Attributes:
        threads: threads per block, a power of two from 32 to 1024.
        unroll: columns per thread whose loads are in flight together.
    """

    threads: int = 1024
    unroll: int = 8


def default_tiles(kernel: Advance) -> AdvanceTiles:
    """As many threads as there are columns, up to 1024."""
    threads = 32
    while threads < min(kernel.vocabulary, 1024):
        threads *= 2
    return AdvanceTiles(threads)


def advance(kernel: Advance, tiles: AdvanceTiles, dependent: bool = False) -> tirx.PrimFunc:
    """The function of `Advance`; with `dependent`, it starts before the kernel before it has ended.

    A thread keeps the first of its largest numbers, and whether it saw a NaN. Threads then compare unsigned integer
    keys
    in the order of the numbers: the sign bit is set for positive numbers, all bits are inverted for negative ones, -0
    counts as 0, and NaN is above everything. The largest key wins, and of equal keys the smallest index.
    """
    vocabulary, columns, rows, groups = kernel.vocabulary, kernel.columns, kernel.rows, kernel.groups
    threads, unroll, warps = tiles.threads, tiles.unroll, tiles.threads // 32
    nan_key, last = 0xFFFFFFFF, 2**31 - 1

    attributes = kernel_attributes(dependent)

    @T.prim_func
    def advance(logits_handle: T.handle, token_ids_handle: T.handle, positions_handle: T.handle):
        T.func_attr(attributes)
        g = T.int32() if groups is None else T.meta_var(groups)
        logits = T.match_buffer(logits_handle, (g, rows, columns), "float32")
        token_ids = T.match_buffer(token_ids_handle, (g, rows), "int32")
        positions = T.match_buffer(positions_handle, (g, rows), "int32")
        T.device_entry()
        block = T.cta_id([g * rows])
        warp = T.warp_id([warps])
        lane = T.lane_id([32])
        thread = T.thread_id([threads])
        warp_key = T.alloc_shared((warps,), "uint32")
        warp_index = T.alloc_shared((warps,), "int32")
        values = T.alloc_local((unroll,), "float32")
        best = T.alloc_local((1,), "float32")
        nan = T.alloc_local((1,), "bool")
        key = T.alloc_local((2,), "uint32")
        index = T.alloc_local((2,), "int32")
        group: T.let[T.int32] = block // rows
        row: T.let[T.int32] = block % rows
        position: T.let[T.int32] = positions[group, row]

        @T.inline
        def reduce():
            """Finds the best of all lanes; all lanes get it."""
            for i in T.unroll(5):
                key[1] = shuffle_xor(key[0], 1 << i)
                index[1] = shuffle_xor(index[0], 1 << i)
                wins: T.let[T.bool] = key[1] > key[0] or (key[1] == key[0] and index[1] < index[0])
                key[0] = T.Select(wins, key[1], key[0])
                index[0] = T.Select(wins, index[1], index[0])

        wait_for_earlier_kernel(dependent)
        if position >= 0:
            best[0] = T.float32(-math.inf)
            nan[0] = False
            # If everything is minus infinity, the first column wins.
            index[0] = T.Select(thread < vocabulary, thread, last)
            for step in range(-(-vocabulary // (threads * unroll))):
                first: T.let[T.int32] = step * (threads * unroll) + thread
                for i in T.unroll(unroll):
                    values[i] = T.float32(-math.inf)
                    if first + i * threads < vocabulary:
                        load_global([values[i]], logits.ptr_to([group, row, first + i * threads]))
                for i in T.unroll(unroll):
                    nan[0] = nan[0] or tirx.isnan(values[i])
                    index[0] = T.Select(values[i] > best[0], first + i * threads, index[0])
                    best[0] = T.Select(values[i] > best[0], values[i], best[0])
            bits: T.let[T.uint32] = T.reinterpret("uint32", best[0])
            ordered: T.let[T.uint32] = T.Select(
                best[0] < T.float32(0.0), bits ^ T.uint32(nan_key), bits | T.uint32(0x80000000)
            )
            key[0] = T.Select(nan[0], T.uint32(nan_key), ordered)
            reduce()
            if lane == 0:
                warp_key[warp] = key[0]
                warp_index[warp] = index[0]
            T.cuda.cta_sync()
            if warp == 0:
                key[0] = T.Select(lane < warps, warp_key[T.min(lane, warps - 1)], T.uint32(0))
                index[0] = T.Select(lane < warps, warp_index[T.min(lane, warps - 1)], last)
                reduce()
        # Before the position changes, all threads have read it: they passed the barrier above.
        if thread == 0:
            if position >= 0:
                token_ids[group, row] = T.Select(key[0] == T.uint32(nan_key), -1, index[0])
                positions[group, row] = position + 1
            else:
                token_ids[group, row] = 0

    return advance


def _advance(kernel: Advance, target: CudaTarget, choose: Chooser) -> tirx.PrimFunc:
    default = default_tiles(kernel)
    candidates = [replace(default, threads=threads) for threads in (128, 256, 512, 1024)]
    return advance(kernel, choose_tiles(choose, default, candidates), target.has_dependent_launch)


TEMPLATE = Template("cuda.advance", 1, ("advance",), _advance)
