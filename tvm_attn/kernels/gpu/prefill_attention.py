"""Prefill attention on GPUs: FlashAttention-2's loop (Dao, 2023, arXiv:2307.08691).

The tiles of queries, keys and values are in shared memory and the output in registers; tiles past the diagonal are
skipped. Threads are numbered along one dimension. TVM inserts the barriers that shared memory needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.activation import exp
from tvm_attn.kernels.attention import MASKED
from tvm_attn.kernels.base import largest_power
from tvm_attn.kernels.prefill_attention import PrefillAttention
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.cache import CacheRows
from tvm_attn.targets import GpuTarget


@dataclass(frozen=True)
class PrefillTiles:
    """The sizes of `prefill_attention`, all powers of two.

    Attributes:
        queries: queries per block.
        keys: keys in shared memory at a time.
        across: threads along keys and output dimensions, at most `keys`.
        down: threads along queries, at most `queries`; across * down is a multiple of `queries`.
        lanes: the widest vector of a load, in elements.
    """

    queries: int
    keys: int
    across: int
    down: int
    lanes: int

    def shared_bytes(self, head_dim: int) -> int:
        """Bytes of shared memory of a block."""
        return 4 * sum(self._shared_floats(head_dim))

    def _shared_floats(self, head_dim: int) -> tuple[int, int, int, int]:
        """Float32 numbers for queries, for keys or values, for scores, and for what a row's threads share."""
        width = head_dim + self.padding(head_dim)
        return (
            self.queries * width,
            self.keys * width,
            self.queries * (self.keys + self.vector(self.keys)),
            self.across * self.down + self.queries,
        )

    def vector(self, extent: int) -> int:
        """Lanes of a load from rows of `extent` elements."""
        return largest_power(extent, self.lanes)

    def padding(self, head_dim: int) -> int:
        """Padding elements per row in shared memory, so that threads that read different rows read different banks."""
        return self.vector(head_dim)


def prefill_attention(kernel: PrefillAttention, tiles: PrefillTiles) -> tirx.PrimFunc:
    """The function of `PrefillAttention`, one block of threads for each tile of queries, head and sequence."""
    heads, head_dim, context, rows = kernel.heads, kernel.head_dim, kernel.context, kernel.rows
    stored = CacheRows(kernel)
    width, scale = heads * head_dim, kernel.scale
    queries, keys, across, down = tiles.queries, tiles.keys, tiles.across, tiles.down
    threads, lanes, score_lanes = across * down, stored.lanes(tiles.lanes), tiles.vector(keys)
    stride, score_stride = head_dim + tiles.padding(head_dim), keys + score_lanes
    vectors = head_dim // lanes
    thread_queries, thread_keys, thread_vectors = queries // down, keys // across, -(-vectors // across)
    parts = threads // queries  # threads that share a row's softmax
    part_keys = keys // parts

    @T.prim_func(s_tir=True, check_well_formed=False)
    def prefill_attention(q_handle: T.handle, cache_handle: T.handle, sequences_handle: T.handle, o_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        g = T.int32()
        cache_slots = T.int32()
        b = T.int32()
        q = T.match_buffer(q_handle, (g, rows, width), "float32")
        cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, stored.width), stored.dtype)
        sequences = T.match_buffer(sequences_handle, (b, 4), "int32")
        o = T.match_buffer(o_handle, (g, rows, width), "float32")
        for sequence in T.thread_binding(b, thread="blockIdx.z"):
            for head in T.thread_binding(heads, thread="blockIdx.y"):
                for tile in T.thread_binding((g * rows + queries - 1) // queries, thread="blockIdx.x"):
                    for thread in T.thread_binding(threads, thread="threadIdx.x"):
                        with T.sblock("tile"):
                            vb, vh, vt, t = T.axis.remap("SSSS", [sequence, head, tile, thread])
                            T.reads(
                                sequences[vb, 0:4],
                                q[0:g, 0:rows, vh * head_dim : vh * head_dim + head_dim],
                                cache[0:cache_slots, 0:2, vh, 0:context, 0 : stored.width],
                            )
                            T.writes(o[0:g, 0:rows, vh * head_dim : vh * head_dim + head_dim])
                            # One-dimensional: with two dimensions TVM would cut off the padding.
                            query = T.sblock_alloc_buffer((queries * stride,), "float32", scope="shared")
                            # Keys, then values.
                            block_rows = T.sblock_alloc_buffer((keys * stride,), "float32", scope="shared")
                            scores = T.sblock_alloc_buffer((queries * score_stride,), "float32", scope="shared")
                            shared_part = T.sblock_alloc_buffer((queries, parts), "float32", scope="shared")
                            correction = T.sblock_alloc_buffer((queries,), "float32", scope="shared")
                            products = T.sblock_alloc_buffer(
                                (thread_queries, thread_keys, lanes), "float32", scope="local"
                            )
                            output = T.sblock_alloc_buffer(
                                (thread_queries, thread_vectors, lanes), "float32", scope="local"
                            )
                            weights = T.sblock_alloc_buffer((thread_queries, score_lanes), "float32", scope="local")
                            maximum = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            largest = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            score = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            # This thread's part of a row: scores, then weights.
                            own = T.sblock_alloc_buffer((part_keys,), "float32", scope="local")
                            slot: T.let[T.int32] = sequences[vb, 0]
                            first_row: T.let[T.int32] = sequences[vb, 1] + vt * queries
                            count: T.let[T.int32] = T.min(sequences[vb, 2] - vt * queries, queries)
                            # The position of the tile's first query, and one past the last that its last query sees.
                            first: T.let[T.int32] = sequences[vb, 3] + vt * queries
                            visible: T.let[T.int32] = first + count
                            tx: T.let[T.int32] = t % across
                            ty: T.let[T.int32] = t // across
                            row: T.let[T.int32] = t // parts
                            part: T.let[T.int32] = t % parts
                            if T.tvm_thread_invariant(count > 0):
                                for i in range(-(-queries * vectors // threads)):
                                    at = T.meta_var(i * threads + t)
                                    if at < queries * vectors:
                                        source: T.let[T.int32] = first_row + T.min(at // vectors, count - 1)
                                        for lane in T.vectorized(lanes):
                                            query[at // vectors * stride + at % vectors * lanes + lane] = q[
                                                source // rows,
                                                source % rows,
                                                vh * head_dim + at % vectors * lanes + lane,
                                            ] * T.float32(scale)
                                maximum[0] = T.float32(MASKED)
                                total[0] = T.float32(0.0)
                                for i, c in T.grid(thread_queries, thread_vectors):
                                    for lane in T.vectorized(lanes):
                                        output[i, c, lane] = T.float32(0.0)
                                for block in range((visible + keys - 1) // keys):
                                    for i in range(-(-keys * vectors // threads)):
                                        at = T.meta_var(i * threads + t)
                                        if at < keys * vectors:
                                            # At the end of the context a block would read past the slot.
                                            place: T.let[T.int32] = T.min(block * keys + at // vectors, context - 1)
                                            for lane in T.vectorized(lanes):
                                                block_rows[at // vectors * stride + at % vectors * lanes + lane] = (
                                                    stored.scaled(
                                                        stored.at(
                                                            cache, (slot, 0, vh, place), at % vectors * lanes + lane
                                                        ),
                                                        cache,
                                                        slot,
                                                        0,
                                                        vh,
                                                        place,
                                                    )
                                                )
                                    for i, j in T.grid(thread_queries, thread_keys):
                                        for lane in T.vectorized(lanes):
                                            products[i, j, lane] = T.float32(0.0)
                                    for d in range(vectors):
                                        for i in T.unroll(thread_queries):
                                            for j in T.unroll(thread_keys):
                                                for lane in T.vectorized(lanes):
                                                    products[i, j, lane] = (
                                                        products[i, j, lane]
                                                        + query[(ty * thread_queries + i) * stride + d * lanes + lane]
                                                        * block_rows[(tx + across * j) * stride + d * lanes + lane]
                                                    )
                                    for i in T.unroll(thread_queries):
                                        for j in T.unroll(thread_keys):
                                            score[0] = T.float32(0.0)
                                            for lane in T.unroll(lanes):
                                                score[0] = score[0] + products[i, j, lane]
                                            scores[(ty * thread_queries + i) * score_stride + tx + across * j] = (
                                                T.Select(
                                                    block * keys + tx + across * j <= first + ty * thread_queries + i,
                                                    score[0],
                                                    T.float32(MASKED),
                                                )
                                            )
                                    largest[0] = maximum[0]
                                    for j in T.unroll(part_keys):
                                        own[j] = scores[row * score_stride + part * part_keys + j]
                                        largest[0] = T.max(largest[0], own[j])
                                    shared_part[row, part] = largest[0]
                                    for j in range(parts):
                                        largest[0] = T.max(largest[0], shared_part[row, j])
                                    maximum[0] = exp(maximum[0] - largest[0])
                                    total[0] = total[0] * maximum[0]
                                    correction[row] = maximum[0]
                                    maximum[0] = largest[0]
                                    for j in T.unroll(part_keys):
                                        own[j] = exp(own[j] - largest[0])
                                        total[0] = total[0] + own[j]
                                        scores[row * score_stride + part * part_keys + j] = own[j]
                                    for i in range(-(-keys * vectors // threads)):
                                        at = T.meta_var(i * threads + t)
                                        if at < keys * vectors:
                                            place: T.let[T.int32] = block * keys + at // vectors
                                            # Past the sequence there may be NaN, which a weight of zero would keep.
                                            for lane in T.vectorized(lanes):
                                                block_rows[at // vectors * stride + at % vectors * lanes + lane] = (
                                                    T.if_then_else(
                                                        place < visible,
                                                        stored.scaled(
                                                            stored.at(
                                                                cache, (slot, 1, vh, place), at % vectors * lanes + lane
                                                            ),
                                                            cache,
                                                            slot,
                                                            1,
                                                            vh,
                                                            place,
                                                        ),
                                                        T.float32(0.0),
                                                    )
                                                )
                                    for i in T.unroll(thread_queries):
                                        for c in T.unroll(thread_vectors):
                                            for lane in T.vectorized(lanes):
                                                output[i, c, lane] = (
                                                    output[i, c, lane] * correction[ty * thread_queries + i]
                                                )
                                    for j in range(keys // score_lanes):
                                        for i in T.unroll(thread_queries):
                                            for lane in T.vectorized(score_lanes):
                                                weights[i, lane] = scores[
                                                    (ty * thread_queries + i) * score_stride + j * score_lanes + lane
                                                ]
                                        for k in T.unroll(score_lanes):
                                            for c in T.unroll(thread_vectors):
                                                # A thread past the last vector repeats it and stores nothing.
                                                vector: T.let[T.int32] = T.min(tx + across * c, vectors - 1)
                                                for i in T.unroll(thread_queries):
                                                    for lane in T.vectorized(lanes):
                                                        output[i, c, lane] = (
                                                            output[i, c, lane]
                                                            + weights[i, k]
                                                            * block_rows[
                                                                (j * score_lanes + k) * stride + vector * lanes + lane
                                                            ]
                                                        )
                                shared_part[row, part] = total[0]
                                for i in T.unroll(thread_queries):
                                    query_row: T.let[T.int32] = ty * thread_queries + i
                                    total[0] = T.float32(0.0)
                                    for j in range(parts):
                                        total[0] = total[0] + shared_part[query_row, j]
                                    if query_row < count:
                                        target: T.let[T.int32] = first_row + query_row
                                        for c in T.unroll(thread_vectors):
                                            if tx + across * c < vectors:
                                                for lane in T.vectorized(lanes):
                                                    o[
                                                        target // rows,
                                                        target % rows,
                                                        vh * head_dim + (tx + across * c) * lanes + lane,
                                                    ] = output[i, c, lane] / total[0]

    return prefill_attention


# Queries, keys, threads across and down; see `PrefillTiles`. Records refer to them by index: add new ones at the end.
PREFILL_TILES = (
    (64, 32, 16, 16),
    (32, 32, 16, 8),
    (32, 16, 16, 8),
    (16, 16, 16, 8),
    (16, 8, 8, 16),
    (8, 8, 8, 8),
    (4, 4, 4, 4),
)


def _prefill_attention(kernel: PrefillAttention, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """By default the first of `PREFILL_TILES` that the device's threads and shared memory allow."""
    tiles = [PrefillTiles(*sizes, target.vector_bytes // 4) for sizes in PREFILL_TILES]
    fitting = [
        index
        for index, tile in enumerate(tiles)
        if tile.across * tile.down <= target.max_threads and tile.shared_bytes(kernel.head_dim) <= target.shared_bytes
    ]
    if not fitting:
        raise ScheduleError(f"heads of {kernel.head_dim} do not fit {target.shared_bytes} bytes of shared memory")
    return prefill_attention(kernel, tiles[choose("tiles", fitting, fitting[0])])


TEMPLATE = Template("gpu.prefill_attention", 1, ("prefill_attention",), _prefill_attention)
