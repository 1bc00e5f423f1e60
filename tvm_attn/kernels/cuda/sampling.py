"""Greedy sampling at the end of a decode step on NVIDIA GPUs: the next token and position of each row, in place.

At 50257 columns one block reads a row in several passes, each of which waits for memory. So if the number of rows is
static, blocks split a row, each leaves its best column, and the last one, which a counter tells, compares them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import ZEROED
from tvm_attn.kernels.cuda.lanes import shuffle_xor
from tvm_attn.kernels.cuda.ptx import arrive, kernel_attributes, load_global, wait_for_earlier_kernel
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
        blocks: blocks per row, up to 32; 1 if the number of row groups is symbolic.
    """

    threads: int = 1024
    unroll: int = 8
    blocks: int = 1


def default_tiles(kernel: Advance) -> AdvanceTiles:
    """Blocks that read all their columns at once; a single block has a thread for each column, up to 1024."""
    threads, tiles = 32, AdvanceTiles(256)
    blocks = -(-kernel.vocabulary // (tiles.threads * tiles.unroll))
    if kernel.groups is not None and blocks > 1:
        return replace(tiles, blocks=min(32, blocks))
    while threads < min(kernel.vocabulary, 1024):
        threads *= 2
    return AdvanceTiles(threads)


def advance(kernel: Advance, tiles: AdvanceTiles, dependent: bool = False) -> tirx.PrimFunc:
    """The function of `Advance`; with `dependent`, it starts before the kernel before it has ended.

    A thread keeps the first of its largest numbers, and whether it saw a NaN. Threads then compare unsigned integer
    keys in the order of the numbers: the sign bit is set for positive numbers, all bits are inverted for negative ones,
    -0 counts as 0, and NaN is above everything. The largest key wins, and of equal keys the smallest index.
    """
    vocabulary, columns, rows, groups = kernel.vocabulary, kernel.columns, kernel.rows, kernel.groups
    threads, unroll, blocks, warps = tiles.threads, tiles.unroll, tiles.blocks, tiles.threads // 32
    nan_key, last = 0xFFFFFFFF, 2**31 - 1
    static_rows = rows * (groups or 0)

    attributes = kernel_attributes(dependent)

    @T.prim_func
    def advance(logits_handle: T.handle, token_ids_handle: T.handle, positions_handle: T.handle):
        T.func_attr(attributes)
        g = T.int32() if groups is None else T.meta_var(groups)
        logits = T.match_buffer(logits_handle, (g, rows, columns), "float32")
        token_ids = T.match_buffer(token_ids_handle, (g, rows), "int32")
        positions = T.match_buffer(positions_handle, (g, rows), "int32")
        if blocks > 1:
            found_keys = T.alloc_buffer((static_rows * blocks,), "uint32", scope="global")
            found_indices = T.alloc_buffer((static_rows * blocks,), "int32", scope="global")
            counters = T.alloc_buffer((static_rows,), "uint32", scope="global")
            with T.attr(0, "tirx.device_entry", True):
                block = T.cta_id([-(-static_rows // 32)])
                lane = T.thread_id([32])
                wait_for_earlier_kernel(dependent)
                if block * 32 + lane < static_rows:
                    counters[block * 32 + lane] = T.uint32(0)

        T.device_entry()
        piece, block = T.cta_id([blocks, g * rows])
        warp = T.warp_id([warps])
        lane = T.lane_id([32])
        thread = T.thread_id([threads])
        warp_key = T.alloc_shared((warps,), "uint32")
        warp_index = T.alloc_shared((warps,), "int32")
        arrived = T.alloc_shared((1,), "uint32")
        before = T.alloc_local((1,), "uint32")
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

        @T.inline
        def finish():
            """Writes the row's token and position."""
            token_ids[group, row] = T.Select(key[0] == T.uint32(nan_key), -1, index[0])
            positions[group, row] = position + 1

        wait_for_earlier_kernel(dependent)
        if position >= 0:
            best[0] = T.float32(-math.inf)
            nan[0] = False
            # If everything is minus infinity, the first column wins.
            own: T.let[T.int32] = piece * (threads * unroll) + thread
            index[0] = T.Select(own < vocabulary, own, last)
            for step in range(-(-vocabulary // (threads * unroll * blocks))):
                first: T.let[T.int32] = step * (threads * unroll * blocks) + own
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
                if blocks > 1:
                    if lane == 0:
                        found_keys[block * blocks + piece] = key[0]
                        found_indices[block * blocks + piece] = index[0]
                        arrive(before[0], counters.ptr_to([block]), blocks)
                        arrived[0] = before[0]
                    T.cuda.warp_sync()
        # Before the position changes, all threads of all blocks have read it.
        if position < 0:
            if piece == 0 and thread == 0:
                token_ids[group, row] = 0
        elif warp == 0:
            if blocks == 1:
                if lane == 0:
                    finish()
            elif arrived[0] == T.uint32(blocks - 1):
                key[0] = T.uint32(0)
                index[0] = last
                if lane < blocks:
                    key[0] = found_keys[block * blocks + lane]
                    index[0] = found_indices[block * blocks + lane]
                reduce()
                if lane == 0:
                    finish()

    return advance.with_attr(ZEROED, "counters") if blocks > 1 else advance


def _advance(kernel: Advance, target: CudaTarget, choose: Chooser) -> tirx.PrimFunc:
    default = default_tiles(kernel)
    candidates = [default, *(AdvanceTiles(threads) for threads in (128, 256, 512, 1024))]
    if kernel.groups is not None:
        candidates += [AdvanceTiles(threads, unroll, 32) for threads in (128, 256) for unroll in (4, 8)]
    return advance(kernel, choose_tiles(choose, default, candidates), target.has_dependent_launch)


TEMPLATE = Template("cuda.advance", 2, ("advance",), _advance)
