"""Prefill attention on tensor cores: FlashAttention-2's loop (Dao, 2023, arXiv:2307.08691) with `mma.sync`.

A block of threads takes a tile of queries of one head and sequence and walks over the keys up to the diagonal. A warp
holds 16 queries (or a multiple) in registers as left operands; keys and values come through a ring of stages in shared
memory, filled with `cp.async`. Scores never leave registers: a product's result has the layout of the next product's
left operand, so the exponentials are rounded, packed and multiplied with the values in place. The division by the sums
comes last.

Warps may also split the keys of a stage (`key_warps`), each with its own softmax; they merge through shared memory
after the loop. That halves the time of the longest tile, which a single prompt waits for.

Rows in shared memory are one unit of 16 bytes longer than their data. The number of units is then odd, so the eight
rows of a matrix that `ldmatrix` reads are in different banks for every head size, and the address of each matrix is one
register plus a constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.attention import MASKED
from tvm_attn.kernels.base import TENSOR_CORE_DTYPES
from tvm_attn.kernels.cuda.attention import check_head
from tvm_attn.kernels.cuda.hopper_attention import (
    HEAD_DIMS,
    default_hopper_tiles,
    hopper_attention,
    hopper_candidates,
)
from tvm_attn.kernels.cuda.lanes import shuffle_xor
from tvm_attn.kernels.cuda.limits import REGISTERS, SHARED_BYTES, UNIT_ELEMENTS
from tvm_attn.kernels.cuda.ptx import (
    cp_async,
    cp_async_commit,
    cp_async_wait,
    exp2,
    ldmatrix,
    mma,
    pack,
    reciprocal,
    shared_address,
    uint32,
)
from tvm_attn.kernels.cuda.tiles import choose_tiles
from tvm_attn.kernels.prefill_attention import PrefillAttention
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.targets import CudaTarget


@dataclass(frozen=True)
class PrefillTiles:
    """The sizes of `prefill_attention`.

    Attributes:
        queries: queries per block, a multiple of 16 * `query_warps`.
        keys: keys per stage, a multiple of 16 * `key_warps`.
        query_warps: warps along the queries.
        key_warps: warps along the keys.
        stages: stages of keys and values in shared memory, at least 2.
        blocks: blocks per multiprocessor that registers must leave room for. (Without it ptxas spills some to fit
            more.)
    """

    queries: int
    keys: int
    query_warps: int
    key_warps: int = 1
    stages: int = 2
    blocks: int = 1

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 32 * self.query_warps * self.key_warps

    @property
    def fragments(self) -> int:
        """Fragments of 16 queries that a warp holds."""
        return self.queries // self.query_warps // 16

    def shared_bytes(self, head_dim: int) -> int:
        """Bytes of shared memory per block: the stages, or afterwards the results that warps along the keys merge."""
        stages = self.stages * 2 * self.keys * (head_dim + UNIT_ELEMENTS) * 2
        return max(stages, 4 * self.merge_floats(head_dim))

    def merge_floats(self, head_dim: int) -> int:
        """Numbers that the warps along the keys pass on: the outputs, a maximum and a sum of each row."""
        return (self.key_warps - 1) * self.query_warps * 32 * self.fragments * (head_dim // 2 + 4)

    def registers(self, head_dim: int) -> int:
        """An estimate of a thread's registers: queries, scores, outputs, and what else the loop needs."""
        scores = self.keys // self.key_warps // 2
        return self.fragments * (head_dim // 4 + scores + head_dim // 2) + 72


def default_prefill_tiles(kernel: PrefillAttention) -> PrefillTiles:
    """The tiles without a record.

    Two fragments of queries per warp, if registers allow, halve the reads from shared memory per product. Eight warps,
    in two halves of the keys, are as many as fit then, and keep a single prompt's longest tile short.
    """
    if kernel.head_dim <= 64:
        return PrefillTiles(128, 128, 4, 2)
    if kernel.head_dim <= 96:
        return PrefillTiles(128, 64, 4, 2)
    return PrefillTiles(64, 64, 4, 2)


def prefill_candidates(kernel: PrefillAttention) -> Iterator[PrefillTiles]:
    """Tiles for a search to try: all that fit every supported GPU."""
    sizes = itertools.product((64, 128), (32, 64, 128), (2, 4, 8), (1, 2), (2, 3), (1, 2, 3, 4))
    for queries, keys, query_warps, key_warps, stages, blocks in sizes:
        tiles = PrefillTiles(queries, keys, query_warps, key_warps, stages, blocks)
        if (
            4 <= query_warps * key_warps <= 8
            and tiles.fragments >= 1
            and tiles.registers(kernel.head_dim) <= min(248, 1.2 * REGISTERS / (tiles.threads * blocks))
            and tiles.shared_bytes(kernel.head_dim) <= SHARED_BYTES
        ):
            yield tiles


def copy_place(index: Any, units: int) -> tuple[Any, Any]:
    """The row and the unit in its row of a stage's copy of this index, for rows of `units` units of 16 bytes.

    Eight neighbouring threads write at once, and rows are one unit longer in shared memory than in the cache. So if a
    row is not a multiple of eight units, the eight write one column of eight rows. Two neighbouring units are still
    read by the same warp: they share a sector of 32 bytes.
    """
    if units % 8 == 0:
        return index // units, index % units
    return index // (8 * units) * 8 + index % 8, index // 8 % units


def prefill_attention(kernel: PrefillAttention, tiles: PrefillTiles) -> tirx.PrimFunc:
    """The function of `PrefillAttention`, one block of threads for each head and tile of queries.

    A block finds its sequence in the table, since sequences have different numbers of tiles; within a sequence the
    longest tiles start first. Indices count elements and stay below 2**31 (a cache of 64 slots of the largest GPT-2 has
    2.1e8 elements); byte offsets are computed in 64 bits.
    """
    heads, head_dim, context, rows, dtype = kernel.heads, kernel.head_dim, kernel.context, kernel.rows, kernel.dtype
    # exp(scale * x) = 2**(exponent * x)
    width, exponent = heads * head_dim, kernel.scale * math.log2(math.e)
    queries, keys, stages = tiles.queries, tiles.keys, tiles.stages
    query_warps, key_warps, threads = tiles.query_warps, tiles.key_warps, tiles.threads
    warp_queries, warp_keys = queries // query_warps, keys // key_warps
    # Fragments per warp: of 16 queries, 8 keys, 8 output dimensions; and steps of 16 along a query's dimensions.
    m_tiles, s_tiles, d_tiles, d_steps = tiles.fragments, warp_keys // 8, head_dim // 8, head_dim // 16
    stride, units = head_dim + UNIT_ELEMENTS, head_dim // UNIT_ELEMENTS
    values, stage_elements, copies = keys * stride, 2 * keys * stride, keys * units
    merge_threads, merge_numbers = 32 * query_warps, m_tiles * (head_dim // 2 + 4)

    @T.prim_func
    def prefill_attention(q_handle: T.handle, cache_handle: T.handle, sequences_handle: T.handle, o_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        g = T.int32()
        cache_slots = T.int32()
        b = T.int32()
        q = T.match_buffer(q_handle, (g, rows, width), dtype)
        cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, head_dim), dtype)
        sequences = T.match_buffer(sequences_handle, (b, 4), "int32")
        o = T.match_buffer(o_handle, (g, rows, width), dtype)
        # Words of two numbers each.
        q_words = T.decl_buffer((g * rows, width // 2), "uint32", data=q.data)
        o_words = T.decl_buffer((g * rows, width // 2), "uint32", data=o.data)
        T.device_entry()
        # An upper bound on the number of tiles of sequences of n_i rows, sum(ceil(n_i / queries)).
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": tiles.blocks})
        head, place = T.cta_id([heads, (g * rows + b * (queries - 1)) // queries])
        warp = T.warp_id([query_warps * key_warps])
        lane = T.lane_id([32])
        thread = T.thread_id([threads])
        pool = T.SMEMPool()
        shared = pool.alloc((stages * stage_elements,), dtype, align=128)
        pool.move_base_to(0)
        merged = pool.alloc((max(tiles.merge_floats(head_dim), 1),), "float32", align=128)
        pool.commit()
        query = T.alloc_local((m_tiles, d_steps, 4), "uint32")
        right = T.alloc_local((4,), "uint32")
        left = T.alloc_local((m_tiles, 4), "uint32")
        scores = T.alloc_local((m_tiles, s_tiles, 4), "float32")
        output = T.alloc_local((m_tiles, d_tiles, 4), "float32")
        # For rows lane / 4 and lane / 4 + 8 of a fragment: the maximum times `exponent`, and this thread's part of the
        # sum.
        maximum = T.alloc_local((m_tiles, 2), "float32")
        total = T.alloc_local((m_tiles, 2), "float32")
        largest = T.alloc_local((1,), "float32")
        factor = T.alloc_local((2,), "float32")
        word = T.alloc_local((1,), "uint32")
        # This block's sequence, its first tile and its number of tiles; and the tiles of all sequences so far.
        found = T.alloc_local((3,), "int32")
        passed = T.alloc_local((1,), "int32")

        found[0] = 0
        found[1] = 0
        found[2] = 0
        passed[0] = 0
        for i in range(b):
            own: T.let[T.int32] = (sequences[i, 2] + (queries - 1)) // queries
            if place >= passed[0] and place < passed[0] + own:
                found[0] = i
                found[1] = passed[0]
                found[2] = own
            passed[0] = passed[0] + own
        tile: T.let[T.int32] = found[1] + found[2] - 1 - place
        slot: T.let[T.int32] = sequences[found[0], 0]
        first_row: T.let[T.int32] = sequences[found[0], 1] + tile * queries
        count: T.let[T.int32] = T.min(sequences[found[0], 2] - tile * queries, queries)
        # The position of the first query, and one past the last position that the last query sees.
        first: T.let[T.int32] = sequences[found[0], 3] + tile * queries
        visible: T.let[T.int32] = first + count
        blocks: T.let[T.int32] = (visible + (keys - 1)) // keys
        key_warp: T.let[T.int32] = warp // query_warps
        warp_row: T.let[T.int32] = warp % query_warps * warp_queries
        merge_thread: T.let[T.int32] = warp % query_warps * 32 + lane
        group: T.let[T.int32] = lane // 4
        pair: T.let[T.int32] = lane % 4
        # Rows of matrices whose addresses this lane gives: 16 keys by 16 dimensions, of keys and of transposed values.
        base: T.let[T.uint32] = shared_address(shared)
        key_row: T.let[T.uint32] = uint32(
            2 * ((key_warp * warp_keys + lane // 16 * 8 + lane % 8) * stride + lane // 8 % 2 * 8)
        )
        value_row: T.let[T.uint32] = uint32(2 * (values + (key_warp * warp_keys + lane % 16) * stride + lane // 16 * 8))

        @T.inline
        def load(block):
            """Starts the copies of a block of keys and values, with zeros past the sequence."""
            stage: T.let[T.int32] = block % stages * stage_elements
            for i in T.unroll(-(-copies // threads)):
                at = T.meta_var(i * threads + thread)
                if copies % threads == 0 or at < copies:
                    row: T.let[T.int32] = copy_place(at, units)[0]
                    column: T.let[T.int32] = copy_place(at, units)[1] * UNIT_ELEMENTS
                    position: T.let[T.int32] = block * keys + row
                    target: T.let[T.uint32] = base + uint32(2 * (stage + row * stride + column))
                    cp_async(target, cache.ptr_to([slot, 0, head, position, column]), valid=position < visible)
                    cp_async(
                        target + uint32(2 * values),
                        cache.ptr_to([slot, 1, head, position, column]),
                        valid=position < visible,
                    )

        @T.inline
        def multiply_keys(stage):
            """scores = queries * keys."""
            for m in T.unroll(m_tiles):
                for n in T.unroll(s_tiles):
                    for i in T.unroll(4):
                        scores[m, n, i] = T.float32(0.0)
            for k in T.unroll(d_steps):
                for n in T.unroll(s_tiles // 2):
                    ldmatrix(
                        [right[i] for i in range(4)],
                        stage + key_row + uint32(2 * (16 * n * stride + 16 * k)),
                    )
                    for m in T.unroll(m_tiles):
                        for i in T.unroll(2):
                            mma(
                                [scores[m, 2 * n + i, j] for j in range(4)],
                                [query[m, k, j] for j in range(4)],
                                [right[2 * i + j] for j in range(2)],
                                dtype,
                            )

        @T.inline
        def update_softmax(m, half):
            """Replaces scores with exponentials of their distance to the running maximum."""
            largest[0] = scores[m, 0, 2 * half]
            for n in T.unroll(s_tiles):
                largest[0] = T.max(largest[0], T.max(scores[m, n, 2 * half], scores[m, n, 2 * half + 1]))
            for i in T.unroll(2):
                largest[0] = T.max(largest[0], shuffle_xor(largest[0], 1 + i))
            # The product is rounded once here, so all of a row's terms share its error, which cancels.
            largest[0] = T.max(maximum[m, half], largest[0] * T.float32(exponent))
            exp2(factor[0], maximum[m, half] - largest[0])
            maximum[m, half] = largest[0]
            total[m, half] = total[m, half] * factor[0]
            for d in T.unroll(d_tiles):
                for i in T.unroll(2):
                    output[m, d, 2 * half + i] = output[m, d, 2 * half + i] * factor[0]
            for n in T.unroll(s_tiles):
                for i in T.unroll(2):
                    at = T.meta_var(2 * half + i)
                    exp2(scores[m, n, at], scores[m, n, at] * T.float32(exponent) - largest[0])
                    total[m, half] = total[m, half] + scores[m, n, at]

        @T.inline
        def multiply_values(stage):
            """output += exponentials * values."""
            for k in T.unroll(warp_keys // 16):
                for m in T.unroll(m_tiles):
                    for i in T.unroll(4):
                        at = T.meta_var(i % 2 * 2)
                        pack(left[m, i], scores[m, 2 * k + i // 2, at], scores[m, 2 * k + i // 2, at + 1], dtype)
                for d in T.unroll(d_tiles // 2):
                    ldmatrix(
                        [right[i] for i in range(4)],
                        stage + value_row + uint32(2 * (16 * k * stride + 16 * d)),
                        transpose=True,
                    )
                    for m in T.unroll(m_tiles):
                        for i in T.unroll(2):
                            mma(
                                [output[m, 2 * d + i, j] for j in range(4)],
                                [left[m, j] for j in range(4)],
                                [right[2 * i + j] for j in range(2)],
                                dtype,
                            )

        @T.inline
        def pass_on():
            """Warps with later keys write their outputs, maxima and sums to shared memory."""
            for m in T.unroll(m_tiles):
                at = T.meta_var(
                    ((key_warp - 1) * merge_numbers + m * (head_dim // 2 + 4)) * merge_threads + merge_thread
                )
                for d in T.unroll(d_tiles):
                    for i in T.unroll(4):
                        merged[at + (4 * d + i) * merge_threads] = output[m, d, i]
                for half in T.unroll(2):
                    merged[at + (head_dim // 2 + half) * merge_threads] = maximum[m, half]
                    merged[at + (head_dim // 2 + 2 + half) * merge_threads] = total[m, half]

        @T.inline
        def merge(other):
            """Merges the results of warp `other` + 1 along the keys."""
            for m in T.unroll(m_tiles):
                at = T.meta_var((other * merge_numbers + m * (head_dim // 2 + 4)) * merge_threads + merge_thread)
                for half in T.unroll(2):
                    largest[0] = T.max(maximum[m, half], merged[at + (head_dim // 2 + half) * merge_threads])
                    exp2(factor[0], maximum[m, half] - largest[0])
                    exp2(factor[1], merged[at + (head_dim // 2 + half) * merge_threads] - largest[0])
                    maximum[m, half] = largest[0]
                    total[m, half] = (
                        total[m, half] * factor[0] + merged[at + (head_dim // 2 + 2 + half) * merge_threads] * factor[1]
                    )
                    for d in T.unroll(d_tiles):
                        for i in T.unroll(2):
                            output[m, d, 2 * half + i] = (
                                output[m, d, 2 * half + i] * factor[0]
                                + merged[at + (4 * d + 2 * half + i) * merge_threads] * factor[1]
                            )

        if found[2] > 0:
            for i in T.unroll(stages - 1):
                if i < blocks:
                    load(i)
                cp_async_commit()
            for m in T.unroll(m_tiles):
                for half in T.unroll(2):
                    # Rows past the last query repeat that query.
                    row: T.let[T.int32] = first_row + T.min(warp_row + 16 * m + 8 * half + group, count - 1)
                    for k in T.unroll(d_steps):
                        for i in T.unroll(2):
                            query[m, k, 2 * i + half] = q_words[row, (head * head_dim + 16 * k + 8 * i) // 2 + pair]
                    maximum[m, half] = T.float32(MASKED)
                    total[m, half] = T.float32(0.0)
                for d in T.unroll(d_tiles):
                    for i in T.unroll(4):
                        output[m, d, i] = T.float32(0.0)
            for block in range(blocks):
                cp_async_wait(stages - 2)
                T.cuda.cta_sync()
                # This fills the stage that all warps had read before the barrier.
                if block + (stages - 1) < blocks:
                    load(block + (stages - 1))
                cp_async_commit()
                # This warp's first key, and the position of its first query.
                first_key: T.let[T.int32] = block * keys + key_warp * warp_keys
                first_query: T.let[T.int32] = first + warp_row
                if warp_row < count and first_key < first_query + warp_queries:
                    stage: T.let[T.uint32] = base + uint32(2 * (block % stages * stage_elements))
                    multiply_keys(stage)
                    if first_key + (warp_keys - 1) > first_query:
                        for m in T.unroll(m_tiles):
                            for n in T.unroll(s_tiles):
                                for i in T.unroll(4):
                                    if first_key + 8 * n + 2 * pair + i % 2 > first_query + 16 * m + i // 2 * 8 + group:
                                        scores[m, n, i] = T.float32(-math.inf)
                    for m in T.unroll(m_tiles):
                        for half in T.unroll(2):
                            update_softmax(m, half)
                    multiply_values(stage)
            if key_warps > 1:
                T.cuda.cta_sync()
                if key_warp > 0:
                    pass_on()
                T.cuda.cta_sync()
            if key_warp == 0:
                for other in T.unroll(key_warps - 1):
                    merge(other)
                for m in T.unroll(m_tiles):
                    for half in T.unroll(2):
                        for i in T.unroll(2):
                            total[m, half] = total[m, half] + shuffle_xor(total[m, half], 1 + i)
                        reciprocal(factor[0], total[m, half])
                        row: T.let[T.int32] = warp_row + 16 * m + 8 * half + group
                        if row < count:
                            for d in T.unroll(d_tiles):
                                pack(
                                    word[0],
                                    output[m, d, 2 * half] * factor[0],
                                    output[m, d, 2 * half + 1] * factor[0],
                                    dtype,
                                )
                                o_words[first_row + row, (head * head_dim + 8 * d) // 2 + pair] = word[0]

    return prefill_attention


def _prefill_attention(kernel: PrefillAttention, target: CudaTarget, choose: Chooser) -> tirx.PrimFunc:
    check_head(kernel)
    if target.has_warpgroup_products and kernel.head_dim in HEAD_DIMS:
        hopper_tiles = choose_tiles(choose, default_hopper_tiles(kernel), hopper_candidates(kernel))
        return hopper_attention(kernel, hopper_tiles)
    tiles = choose_tiles(choose, default_prefill_tiles(kernel), prefill_candidates(kernel))
    return prefill_attention(kernel, tiles)


TEMPLATE = Template("cuda.prefill_attention", 1, ("prefill_attention",), _prefill_attention, TENSOR_CORE_DTYPES)
