"""Attention of every kind on GPUs: FlashAttention-2's loop, as in `prefill_attention`, over plain tensors.

Blocks of keys that no query of a tile sees are skipped. `AttentionScores` computes a row of a head by one block of
threads. TVM inserts the barriers that shared memory needs.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.activation import exp
from tvm_attn.kernels.attention_operator import EXCLUDED, LOWEST, UNSEEN, AttentionOperator, AttentionScores
from tvm_attn.kernels.base import operand, without_unused
from tvm_attn.kernels.gpu.prefill_attention import PREFILL_TILES, PrefillTiles
from tvm_attn.kernels.gpu.threads import PARTIALS
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.targets import GpuTarget


def attention_operator(kernel: AttentionOperator, tiles: PrefillTiles) -> tirx.PrimFunc:
    """The function of `AttentionOperator`, one block of threads for each tile of queries, head and sequence."""
    heads, key_heads, head_dim, value_dim = kernel.heads, kernel.key_heads, kernel.head_dim, kernel.value_dim
    dtype, group, scale = kernel.dtype, heads // key_heads, kernel.scale
    has_mask = kernel.mask is not None
    queries, keys, across, down = tiles.queries, tiles.keys, tiles.across, tiles.down
    threads, score_lanes = across * down, tiles.vector(keys)
    lanes, stride, score_stride = tiles.vector(head_dim), head_dim + tiles.padding(head_dim), keys + score_lanes
    value_lanes, value_stride = tiles.vector(value_dim), value_dim + tiles.padding(value_dim)
    vectors, value_vectors = head_dim // lanes, value_dim // value_lanes
    thread_queries, thread_keys, thread_vectors = queries // down, keys // across, -(-value_vectors // across)
    parts = threads // queries  # threads that share a row's softmax
    part_keys = keys // parts

    @T.prim_func(s_tir=True, check_well_formed=False)
    def attention_operator(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        bounds_handle: T.handle,
        mask_handle: T.handle,
        o_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b, n, s = T.int32(), T.int32(), T.int32()
        mb, mh, mn, ms = T.int32(), T.int32(), T.int32(), T.int32()
        q = T.match_buffer(q_handle, (b, heads, n, head_dim), dtype)
        k = T.match_buffer(k_handle, (b, key_heads, s, head_dim), dtype)
        v = T.match_buffer(v_handle, (b, key_heads, s, value_dim), dtype)
        bounds = T.match_buffer(bounds_handle, (b, 2), "int32")
        mask = T.meta_var(operand(has_mask, mask_handle, (mb, mh, mn, ms), kernel.mask))
        o = T.match_buffer(o_handle, (b, heads, n, value_dim), dtype)
        for batch in T.thread_binding(b, thread="blockIdx.z"):
            for head in T.thread_binding(heads, thread="blockIdx.y"):
                for tile in T.thread_binding((n + queries - 1) // queries, thread="blockIdx.x"):
                    for thread in T.thread_binding(threads, thread="threadIdx.x"):
                        with T.sblock("tile"):
                            vb, vh, vt, t = T.axis.remap("SSSS", [batch, head, tile, thread])
                            T.reads(q[vb, vh, 0:n, 0:head_dim], k[vb, vh // group, 0:s, 0:head_dim], bounds[vb, 0:2])
                            T.writes(o[vb, vh, 0:n, 0:value_dim])
                            # One-dimensional: with two dimensions TVM would cut off the padding.
                            query = T.sblock_alloc_buffer((queries * stride,), "float32", scope="shared")
                            # Keys, then values.
                            block_rows = T.sblock_alloc_buffer(
                                (keys * max(stride, value_stride),), "float32", scope="shared"
                            )
                            scores = T.sblock_alloc_buffer((queries * score_stride,), "float32", scope="shared")
                            shared_part = T.sblock_alloc_buffer((queries, parts), "float32", scope="shared")
                            correction = T.sblock_alloc_buffer((queries,), "float32", scope="shared")
                            products = T.sblock_alloc_buffer(
                                (thread_queries, thread_keys, lanes), "float32", scope="local"
                            )
                            output = T.sblock_alloc_buffer(
                                (thread_queries, thread_vectors, value_lanes), "float32", scope="local"
                            )
                            weights = T.sblock_alloc_buffer((thread_queries, score_lanes), "float32", scope="local")
                            maximum = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            largest = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            score = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            # This thread's part of a row: scores, then weights.
                            own = T.sblock_alloc_buffer((part_keys,), "float32", scope="local")
                            count: T.let[T.int32] = T.min(T.min(bounds[vb, 1], s), ms if has_mask else s)
                            rows: T.let[T.int32] = T.min(n - vt * queries, queries)
                            first: T.let[T.int32] = bounds[vb, 0] + vt * queries
                            begin: T.let[T.int32] = kernel.begin(first) // keys
                            end: T.let[T.int32] = kernel.end(first + rows - 1, count)
                            tx: T.let[T.int32] = t % across
                            ty: T.let[T.int32] = t // across
                            row: T.let[T.int32] = t // parts
                            part: T.let[T.int32] = t % parts
                            for i in range(-(-queries * vectors // threads)):
                                at = T.meta_var(i * threads + t)
                                if at < queries * vectors:
                                    source: T.let[T.int32] = vt * queries + T.min(at // vectors, rows - 1)
                                    for lane in T.vectorized(lanes):
                                        query[at // vectors * stride + at % vectors * lanes + lane] = T.Cast(
                                            "float32", q[vb, vh, source, at % vectors * lanes + lane]
                                        ) * T.float32(scale)
                            maximum[0] = T.float32(UNSEEN)
                            total[0] = T.float32(0.0)
                            for i, c in T.grid(thread_queries, thread_vectors):
                                for lane in T.vectorized(value_lanes):
                                    output[i, c, lane] = T.float32(0.0)
                            for block in range(T.max((end + keys - 1) // keys - begin, 0)):
                                first_key = T.meta_var((begin + block) * keys)
                                for i in range(-(-keys * vectors // threads)):
                                    at = T.meta_var(i * threads + t)
                                    if at < keys * vectors:
                                        place: T.let[T.int32] = T.min(first_key + at // vectors, count - 1)
                                        for lane in T.vectorized(lanes):
                                            block_rows[at // vectors * stride + at % vectors * lanes + lane] = T.Cast(
                                                "float32", k[vb, vh // group, place, at % vectors * lanes + lane]
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
                                        score[0] = kernel.biased(
                                            kernel.capped(score[0]),
                                            mask,
                                            vb,
                                            vh,
                                            vt * queries + ty * thread_queries + i,
                                            first_key + tx + across * j,
                                        )
                                        scores[(ty * thread_queries + i) * score_stride + tx + across * j] = T.Select(
                                            kernel.sees(
                                                first_key + tx + across * j, first + ty * thread_queries + i, count
                                            ),
                                            score[0],
                                            T.float32(EXCLUDED),
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
                                for i in range(-(-keys * value_vectors // threads)):
                                    at = T.meta_var(i * threads + t)
                                    if at < keys * value_vectors:
                                        place: T.let[T.int32] = first_key + at // value_vectors
                                        # Keys that do not exist may have any values, which a weight of zero would keep.
                                        for lane in T.vectorized(value_lanes):
                                            block_rows[
                                                at // value_vectors * value_stride
                                                + at % value_vectors * value_lanes
                                                + lane
                                            ] = T.if_then_else(
                                                place < end,
                                                T.Cast(
                                                    "float32",
                                                    v[vb, vh // group, place, at % value_vectors * value_lanes + lane],
                                                ),
                                                T.float32(0.0),
                                            )
                                for i in T.unroll(thread_queries):
                                    for c in T.unroll(thread_vectors):
                                        for lane in T.vectorized(value_lanes):
                                            output[i, c, lane] = (
                                                output[i, c, lane] * correction[ty * thread_queries + i]
                                            )
                                for j in range(keys // score_lanes):
                                    for i in T.unroll(thread_queries):
                                        for lane in T.vectorized(score_lanes):
                                            weights[i, lane] = scores[
                                                (ty * thread_queries + i) * score_stride + j * score_lanes + lane
                                            ]
                                    for key in T.unroll(score_lanes):
                                        for c in T.unroll(thread_vectors):
                                            # A thread past the last vector repeats it and stores nothing.
                                            vector: T.let[T.int32] = T.min(tx + across * c, value_vectors - 1)
                                            for i in T.unroll(thread_queries):
                                                for lane in T.vectorized(value_lanes):
                                                    output[i, c, lane] = (
                                                        output[i, c, lane]
                                                        + weights[i, key]
                                                        * block_rows[
                                                            (j * score_lanes + key) * value_stride
                                                            + vector * value_lanes
                                                            + lane
                                                        ]
                                                    )
                            # A row that sees no key is zero: then the maximum is still the first one.
                            shared_part[row, part] = T.Select(
                                maximum[0] < T.float32((UNSEEN + LOWEST) / 2), T.float32(0.0), total[0]
                            )
                            for i in T.unroll(thread_queries):
                                query_row: T.let[T.int32] = ty * thread_queries + i
                                total[0] = T.float32(0.0)
                                for j in range(parts):
                                    total[0] = total[0] + shared_part[query_row, j]
                                total[0] = T.Select(
                                    total[0] > T.float32(0.0),
                                    T.float32(1.0) / T.max(total[0], T.float32(1e-30)),
                                    T.float32(0.0),
                                )
                                if query_row < rows:
                                    for c in T.unroll(thread_vectors):
                                        if tx + across * c < value_vectors:
                                            for lane in T.vectorized(value_lanes):
                                                o[
                                                    vb,
                                                    vh,
                                                    vt * queries + query_row,
                                                    (tx + across * c) * value_lanes + lane,
                                                ] = T.Cast(dtype, output[i, c, lane] * total[0])

    return without_unused(attention_operator)


def _attention_operator(kernel: AttentionOperator, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """By default the first of `PREFILL_TILES` that the device's threads and shared memory allow."""
    widest = max(kernel.head_dim, kernel.value_dim)
    tiles = [PrefillTiles(*sizes, target.vector_bytes // 4) for sizes in PREFILL_TILES]
    fitting = [
        index
        for index, tile in enumerate(tiles)
        # Twice the padding: head_dim and value_dim may differ in it.
        if tile.across * tile.down <= target.max_threads and tile.shared_bytes(widest + 4) <= target.shared_bytes
    ]
    if not fitting:
        raise ScheduleError(f"heads of {widest} do not fit {target.shared_bytes} bytes of shared memory")
    return attention_operator(kernel, tiles[choose("tiles", fitting, fitting[0])])


def attention_scores(kernel: AttentionScores, threads: int) -> tirx.PrimFunc:
    """The function of `AttentionScores`; a thread computes, and reads again, every `threads`-th key of a row.

    Args:
        kernel: the sizes.
        threads: threads per block, a multiple of 16.
    """
    heads, key_heads, head_dim = kernel.heads, kernel.key_heads, kernel.head_dim
    dtype, group, scale, stage = kernel.dtype, heads // key_heads, kernel.scale, kernel.stage
    has_mask, lowest = kernel.mask is not None, (UNSEEN + LOWEST) / 2

    @T.prim_func(s_tir=True, check_well_formed=False)
    def attention_scores(
        q_handle: T.handle,
        k_handle: T.handle,
        bounds_handle: T.handle,
        mask_handle: T.handle,
        scores_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        b, n, s = T.int32(), T.int32(), T.int32()
        mb, mh, mn, ms = T.int32(), T.int32(), T.int32(), T.int32()
        q = T.match_buffer(q_handle, (b, heads, n, head_dim), dtype)
        k = T.match_buffer(k_handle, (b, key_heads, s, head_dim), dtype)
        bounds = T.match_buffer(bounds_handle, (b, 2), "int32")
        mask = T.meta_var(operand(has_mask, mask_handle, (mb, mh, mn, ms), kernel.mask))
        scores = T.match_buffer(scores_handle, (b, heads, n, s), "float32")
        for batch in T.thread_binding(b, thread="blockIdx.z"):
            for head in T.thread_binding(heads, thread="blockIdx.y"):
                for row in T.thread_binding(n, thread="blockIdx.x"):
                    for thread in T.thread_binding(threads, thread="threadIdx.x"):
                        with T.sblock("row"):
                            vb, vh, vi, t = T.axis.remap("SSSS", [batch, head, row, thread])
                            T.reads(q[vb, vh, vi, 0:head_dim], k[vb, vh // group, 0:s, 0:head_dim], bounds[vb, 0:2])
                            T.writes(scores[vb, vh, vi, 0:s])
                            all_numbers = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                            some_numbers = T.sblock_alloc_buffer((PARTIALS,), "float32", scope="shared")
                            score = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            best = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            count: T.let[T.int32] = T.min(T.min(bounds[vb, 1], s), ms if has_mask else s)
                            position: T.let[T.int32] = bounds[vb, 0] + vi
                            best[0] = T.float32(UNSEEN)
                            for step in range((s + threads - 1) // threads):
                                key = T.meta_var(step * threads + t)
                                if key < s:
                                    score[0] = T.float32(0)
                                    for d in range(head_dim):
                                        score[0] = score[0] + T.Cast("float32", q[vb, vh, vi, d]) * T.Cast(
                                            "float32", k[vb, vh // group, key, d]
                                        )
                                    score[0] = score[0] * T.float32(scale)
                                    if stage != "raw":
                                        score[0] = kernel.capped(score[0])
                                    if stage in ("biased", "weights"):
                                        if kernel.sees(key, position, count):
                                            score[0] = kernel.biased(score[0], mask, vb, vh, vi, key)
                                        else:
                                            score[0] = T.float32(EXCLUDED)
                                        best[0] = T.max(best[0], score[0])
                                    if stage == "biased":
                                        scores[vb, vh, vi, key] = T.Select(
                                            score[0] < T.float32(lowest), T.float32("-inf"), score[0]
                                        )
                                    else:
                                        scores[vb, vh, vi, key] = score[0]
                            if stage == "weights":
                                all_numbers[t] = best[0]
                                if t < PARTIALS:
                                    for j in range(threads // PARTIALS):
                                        best[0] = T.max(best[0], all_numbers[j * PARTIALS + t])
                                    some_numbers[t] = best[0]
                                for j in range(PARTIALS):
                                    best[0] = T.max(best[0], some_numbers[j])
                                total[0] = T.float32(0)
                                for step in range((s + threads - 1) // threads):
                                    key = T.meta_var(step * threads + t)
                                    if key < s:
                                        score[0] = scores[vb, vh, vi, key]
                                        score[0] = T.Select(
                                            score[0] < T.float32(lowest), T.float32(0), exp(score[0] - best[0])
                                        )
                                        scores[vb, vh, vi, key] = score[0]
                                        total[0] = total[0] + score[0]
                                all_numbers[t] = total[0]
                                if t < PARTIALS:
                                    total[0] = T.float32(0)
                                    for j in range(threads // PARTIALS):
                                        total[0] = total[0] + all_numbers[j * PARTIALS + t]
                                    some_numbers[t] = total[0]
                                total[0] = T.float32(0)
                                for j in range(PARTIALS):
                                    total[0] = total[0] + some_numbers[j]
                                total[0] = T.Select(total[0] > T.float32(0), total[0], T.float32(1))
                                for step in range((s + threads - 1) // threads):
                                    key = T.meta_var(step * threads + t)
                                    if key < s:
                                        scores[vb, vh, vi, key] = scores[vb, vh, vi, key] / total[0]

    return without_unused(attention_scores)


def _attention_scores(kernel: AttentionScores, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    return attention_scores(kernel, choose("threads", (32, 64, 128, 256), min(128, target.max_threads)))


TEMPLATE = Template("gpu.attention_operator", 1, ("attention_operator",), _attention_operator)
SCORES_TEMPLATE = Template("gpu.attention_scores", 1, ("attention_scores",), _attention_scores)
