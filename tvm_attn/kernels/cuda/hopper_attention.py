"""Prefill attention with Hopper's warpgroup products (`wgmma`), for heads of 64 and 128 dimensions.

The loop is FlashAttention-3's (Shah et al. 2024, arXiv:2407.08608). A block of threads takes a tile of queries of one
head and sequence: 64 for each consumer warpgroup. One more warpgroup, the producer, copies keys and values into a ring
of stages in shared memory. A consumer starts the product of its queries and the next keys, then that of the last
exponentials and values, and computes the softmax of the one while the other still runs. Warpgroups wait for each other
only through the stages, so the softmax of one also overlaps with the products of another.

Queries and exponentials are left operands in registers: a product's result has the layout of the next product's left
operand. A stage holds keys, then values, in columns of 64 dimensions: rows of 128 bytes whose units are permuted by
their row ("128-byte swizzle"), as `wgmma` reads them. Keys are read along their dimensions, values across.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.attention import MASKED
from tvm_attn.kernels.cuda.lanes import shuffle_xor
from tvm_attn.kernels.cuda.limits import HOPPER_SHARED_BYTES, UNIT_ELEMENTS
from tvm_attn.kernels.cuda.ptx import (
    cp_async,
    cp_async_commit,
    cp_async_wait,
    exp2,
    fence_async_proxy,
    mbarrier_arrive,
    mbarrier_init,
    mbarrier_wait,
    pack,
    reciprocal,
    shared_address,
    uint32,
    wgmma,
    wgmma_commit,
    wgmma_descriptor,
    wgmma_fence,
    wgmma_wait,
)
from tvm_attn.kernels.prefill_attention import PrefillAttention

HEAD_DIMS = (64, 128)
"""Dimensions of a head that fill columns of shared memory."""
_COLUMN = 64
"""Dimensions per column of shared memory: 128 bytes."""
_ALIGNMENT = 1024
"""Of a swizzled matrix: eight rows."""


@dataclass(frozen=True)
class HopperTiles:
    """The sizes of `hopper_attention`.

    Attributes:
        warpgroups: consumer warpgroups, each with 64 queries: 1 to 3.
        keys: keys per stage, a multiple of 16.
        stages: stages of keys and values in shared memory, at least 2.
    """

    warpgroups: int
    keys: int
    stages: int

    @property
    def queries(self) -> int:
        """Queries per block."""
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        """Threads per block, the producer's included."""
        return 128 * (self.warpgroups + 1)

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread of the producer, and of the consumers."""
        return {1: (56, 256), 2: (24, 240), 3: (32, 160)}[self.warpgroups]

    def shared_bytes(self, head_dim: int) -> int:
        """Bytes of shared memory per block."""
        return self.stages * 2 * self.keys * head_dim * 2 + _ALIGNMENT + 16 * self.stages


def default_hopper_tiles(kernel: PrefillAttention) -> HopperTiles:
    """The tiles without a record: good on an H100 for one prompt of 1024 tokens and for 16.

    One warpgroup with 128 keys is a quarter faster for one prompt and a third slower for 16.
    """
    return HopperTiles(2, 64, 4 if kernel.head_dim == 64 else 3)


def hopper_candidates(kernel: PrefillAttention) -> Iterator[HopperTiles]:
    """Tiles for a search to try."""
    for warpgroups in (1, 2, 3):
        for keys in (64, 96, 128, 160, 192):
            for stages in (2, 3, 4):
                tiles = HopperTiles(warpgroups, keys, stages)
                # Scores, exponentials, outputs and queries.
                registers = keys // 2 + keys // 4 + kernel.head_dim // 2 + kernel.head_dim // 4
                if tiles.shared_bytes(kernel.head_dim) <= HOPPER_SHARED_BYTES and registers + 16 <= tiles.registers[1]:
                    yield tiles


def hopper_attention(kernel: PrefillAttention, tiles: HopperTiles) -> tirx.PrimFunc:
    """The function of `PrefillAttention`, one block of threads for each head and tile of queries.

    A block finds its sequence in the table, since sequences have different numbers of tiles; within a sequence the
    longest tiles start first.
    """
    heads, head_dim, context, rows, dtype = kernel.heads, kernel.head_dim, kernel.context, kernel.rows, kernel.dtype
    # exp(scale * x) = 2**(exponent * x)
    width, exponent = heads * head_dim, kernel.scale * math.log2(math.e)
    queries, keys, stages, consumers = tiles.queries, tiles.keys, tiles.stages, tiles.warpgroups
    few, many = tiles.registers
    # Fragments: of 8 keys, 8 output dimensions; steps of 16 along a query's dimensions and along the keys.
    s_tiles, d_tiles, d_steps, k_steps = keys // 8, head_dim // 8, head_dim // 16, keys // 16
    columns, column_bytes = head_dim // _COLUMN, keys * 2 * _COLUMN
    values, stage_bytes = columns * column_bytes, 2 * columns * column_bytes
    # Blocks whose copies run while the producer waits for those of an earlier one. Consumers release a block only when
    # they have the next one: the producer must have passed that on before it waits for a stage.
    ahead = min(stages - 2, 2)

    @T.prim_func
    def hopper_attention(q_handle: T.handle, cache_handle: T.handle, sequences_handle: T.handle, o_handle: T.handle):
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
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        # An upper bound on the number of tiles of sequences of n_i rows, sum(ceil(n_i / queries)).
        head, place = T.cta_id([heads, (g * rows + b * (queries - 1)) // queries])
        warp = T.warp_id([4 * (consumers + 1)])
        lane = T.lane_id([32])
        thread = T.thread_id([128 * (consumers + 1)])
        pool = T.SMEMPool()
        shared = pool.alloc(((stages * stage_bytes + _ALIGNMENT) // 2,), dtype, align=128)
        # For each stage, a barrier that says that it is filled, and one that all consumers have read it.
        barriers = pool.alloc((2 * stages,), "uint64", align=8)
        pool.commit()
        query = T.alloc_local((d_steps, 4), "uint32")
        left = T.alloc_local((k_steps, 4), "uint32")
        scores = T.alloc_local((s_tiles, 4), "float32")
        output = T.alloc_local((d_tiles, 4), "float32")
        # For rows lane / 4 and lane / 4 + 8 of a warp: the maximum times `exponent`, and this thread's part of the sum.
        maximum = T.alloc_local((2,), "float32")
        total = T.alloc_local((2,), "float32")
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
        warpgroup: T.let[T.int32] = warp // 4
        warp_row: T.let[T.int32] = (warp - 4) * 16
        group: T.let[T.int32] = lane // 4
        pair: T.let[T.int32] = lane % 4
        base: T.let[T.uint32] = (shared_address(shared) + uint32(_ALIGNMENT - 1)) & uint32(0x100000000 - _ALIGNMENT)

        @T.inline
        def fill(block):
            """Starts the copies of a block of keys and values, with zeros past the sequence."""
            stage: T.let[T.uint32] = base + uint32(block % stages * stage_bytes)
            for c in T.unroll(columns):
                for i in T.unroll(keys // 16):
                    row: T.let[T.int32] = 16 * i + thread // 8
                    unit: T.let[T.int32] = thread % 8
                    position: T.let[T.int32] = block * keys + row
                    target: T.let[T.uint32] = stage + uint32(
                        c * column_bytes + row * (2 * _COLUMN) + (unit ^ (row % 8)) * 16
                    )
                    column: T.let[T.int32] = c * _COLUMN + unit * UNIT_ELEMENTS
                    cp_async(target, cache.ptr_to([slot, 0, head, position, column]), valid=position < visible)
                    cp_async(
                        target + uint32(values),
                        cache.ptr_to([slot, 1, head, position, column]),
                        valid=position < visible,
                    )
            cp_async_commit()

        @T.inline
        def start_scores(block):
            """Starts scores = queries * keys."""
            stage: T.let[T.uint32] = base + uint32(block % stages * stage_bytes)
            for k in T.unroll(d_steps):
                wgmma(
                    [scores[n // 4, n % 4] for n in range(4 * s_tiles)],
                    [query[k, i] for i in range(4)],
                    wgmma_descriptor(stage + uint32(k // 4 * column_bytes + k % 4 * 32), 0, 1024),
                    dtype,
                    accumulate=k > 0,
                )
            wgmma_commit()

        @T.inline
        def start_output(block):
            """Starts output += exponentials * values."""
            stage: T.let[T.uint32] = base + uint32(block % stages * stage_bytes + values)
            for k in T.unroll(k_steps):
                wgmma(
                    [output[n // 4, n % 4] for n in range(4 * d_tiles)],
                    [left[k, i] for i in range(4)],
                    wgmma_descriptor(stage + uint32(k * 16 * 2 * _COLUMN), column_bytes, 1024),
                    dtype,
                    transposed=True,
                )
            wgmma_commit()

        @T.inline
        def mask(block):
            """Hides the keys after each query."""
            first_query: T.let[T.int32] = first + warp_row
            if block * keys + (keys - 1) > first_query:
                for n in T.unroll(s_tiles):
                    for i in T.unroll(4):
                        if block * keys + 8 * n + 2 * pair + i % 2 > first_query + i // 2 * 8 + group:
                            scores[n, i] = T.float32(-math.inf)

        @T.inline
        def update_softmax():
            """Replaces scores with exponentials of their distance to the running maximum."""
            for half in T.unroll(2):
                largest[0] = T.max(scores[0, 2 * half], scores[0, 2 * half + 1])
                for n in T.unroll(s_tiles - 1):
                    largest[0] = T.max(largest[0], T.max(scores[n + 1, 2 * half], scores[n + 1, 2 * half + 1]))
                for i in T.unroll(2):
                    largest[0] = T.max(largest[0], shuffle_xor(largest[0], 1 + i))
                # The product is rounded once here, so all of a row's terms share its error, which cancels.
                largest[0] = T.max(maximum[half], largest[0] * T.float32(exponent))
                exp2(factor[half], maximum[half] - largest[0])
                maximum[half] = largest[0]
                total[half] = total[half] * factor[half]
                for n in T.unroll(s_tiles):
                    for i in T.unroll(2):
                        at = T.meta_var(2 * half + i)
                        exp2(scores[n, at], scores[n, at] * T.float32(exponent) - largest[0])
                        total[half] = total[half] + scores[n, at]

        @T.inline
        def round_exponentials():
            """Exponentials as the left operand of the next product."""
            for k in T.unroll(k_steps):
                for i in T.unroll(4):
                    at = T.meta_var(i % 2 * 2)
                    pack(left[k, i], scores[2 * k + i // 2, at], scores[2 * k + i // 2, at + 1], dtype)

        @T.inline
        def wait_filled(block):
            mbarrier_wait(barriers.ptr_to([block % stages]), block // stages % 2)

        @T.inline
        def release(block):
            if lane == 0:
                mbarrier_arrive(barriers.ptr_to([stages + block % stages]))

        if thread == 0:
            for i in T.unroll(stages):
                mbarrier_init(barriers.ptr_to([i]), 128)
                mbarrier_init(barriers.ptr_to([stages + i]), 4 * consumers)
        fence_async_proxy()
        T.cuda.cta_sync()
        if warpgroup == 0:
            T.evaluate(T.ptx["setmaxnreg.dec.sync.aligned.u32"](few))
            if found[2] > 0:
                for block in range(blocks + ahead):
                    if block < blocks:
                        if block >= stages:
                            mbarrier_wait(barriers.ptr_to([stages + block % stages]), (block // stages + 1) % 2)
                        fill(block)
                    else:
                        cp_async_commit()
                    if block >= ahead:
                        cp_async_wait(ahead)
                        # wgmma reads through another proxy than these writes.
                        fence_async_proxy()
                        mbarrier_arrive(barriers.ptr_to([(block - ahead) % stages]))
        else:
            T.evaluate(T.ptx["setmaxnreg.inc.sync.aligned.u32"](many))
            if found[2] > 0:
                # Blocks that this warpgroup's last query sees; none if it has no queries.
                last: T.let[T.int32] = T.min((warpgroup - 1) * 64 + 64, count)
                own: T.let[T.int32] = T.if_then_else(
                    (warpgroup - 1) * 64 < count, (first + last + (keys - 1)) // keys, 0
                )
                if own > 0:
                    for half in T.unroll(2):
                        # Rows past the last query repeat that query.
                        row: T.let[T.int32] = first_row + T.min(warp_row + 8 * half + group, count - 1)
                        for k in T.unroll(d_steps):
                            for i in T.unroll(2):
                                query[k, 2 * i + half] = q_words[row, (head * head_dim + 16 * k + 8 * i) // 2 + pair]
                        maximum[half] = T.float32(MASKED)
                        total[half] = T.float32(0.0)
                    for d in T.unroll(d_tiles):
                        for i in T.unroll(4):
                            output[d, i] = T.float32(0.0)
                    wait_filled(0)
                    wgmma_fence()
                    start_scores(0)
                    wgmma_wait(0)
                    mask(0)
                    update_softmax()
                    round_exponentials()
                    for past in range(own - 1):
                        wait_filled(past + 1)
                        wgmma_fence()
                        start_scores(past + 1)
                        start_output(past)
                        wgmma_wait(1)
                        mask(past + 1)
                        update_softmax()
                        wgmma_wait(0)
                        release(past)
                        for half in T.unroll(2):
                            for d in T.unroll(d_tiles):
                                for i in T.unroll(2):
                                    output[d, 2 * half + i] = output[d, 2 * half + i] * factor[half]
                        round_exponentials()
                    wgmma_fence()
                    start_output(own - 1)
                    wgmma_wait(0)
                    release(own - 1)
                # A stage is free when every warpgroup has passed it.
                for rest in range(blocks - own):
                    wait_filled(own + rest)
                    release(own + rest)
                if own > 0:
                    for half in T.unroll(2):
                        for i in T.unroll(2):
                            total[half] = total[half] + shuffle_xor(total[half], 1 + i)
                        reciprocal(factor[half], total[half])
                        row: T.let[T.int32] = warp_row + 8 * half + group
                        if row < count:
                            for d in T.unroll(d_tiles):
                                pack(
                                    word[0],
                                    output[d, 2 * half] * factor[half],
                                    output[d, 2 * half + 1] * factor[half],
                                    dtype,
                                )
                                o_words[first_row + row, (head * head_dim + 8 * d) // 2 + pair] = word[0]

    return hopper_attention
