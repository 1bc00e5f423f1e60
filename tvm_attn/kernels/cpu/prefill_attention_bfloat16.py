"""The loop of prefill attention with bfloat16 dot products, for a bfloat16 cache.

Queries, keys, values and the probabilities of a block are rounded to bfloat16 and go through dot products of pairs
(`DOT_BFLOAT16`) with float32 sums; maximum, exponential and sum stay float32. As in `PackPairs`, the first half is
paired with the second half: dimension p with p + D/2 for scores, key j of a block with j + B/2 for the output. Pairs
are thus made element by element, with no shuffle inside a vector.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.attention import MASKED
from tvm_attn.kernels.cpu.dot import Dot
from tvm_attn.kernels.cpu.online_softmax import PrefillTiles, causal_mask, softmax_step
from tvm_attn.kernels.prefill_attention import PrefillAttention
from tvm_attn.kernels.unscheduled.quant import rounded_pair


def _stored_pair(low: tirx.Expr, high: tirx.Expr) -> tirx.Expr:
    """One word of two bfloat16 values, given as stored."""
    low_bits, high_bits = (T.Cast("int32", T.reinterpret("uint16", value)) for value in (low, high))
    return low_bits | (high_bits << T.int32(16))


def prefill_attention_bfloat16(kernel: PrefillAttention, tiles: PrefillTiles, dot: Dot) -> tirx.PrimFunc:
    """The function of a kernel with an even head_dim; its blocks are named as in the float32 loop.

    The steps of dot products are calls of `dot` for vectors of as many queries as a register has.
    """
    heads, head_dim, context, rows = kernel.heads, kernel.head_dim, kernel.context, kernel.rows
    width, scale, half_dim, half_block = heads * head_dim, kernel.scale, head_dim // 2, tiles.key_block // 2
    query_tile, key_block, key_tile, dim_tile = tiles.queries, tiles.key_block, tiles.key_tile, tiles.dim_tile
    lanes, step = dot.lanes, dot.name(dot.lanes)
    vectors = query_tile // lanes
    mask_scores, update_softmax = causal_mask(key_block, query_tile), softmax_step(key_block, query_tile)

    @T.prim_func(s_tir=True)
    def prefill_attention(q_handle: T.handle, cache_handle: T.handle, sequences_handle: T.handle, o_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        g = T.int32()
        cache_slots = T.int32()
        b = T.int32()
        q = T.match_buffer(q_handle, (g, rows, width), "float32")
        cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, head_dim), "bfloat16")
        sequences = T.match_buffer(sequences_handle, (b, 4), "int32")
        o = T.match_buffer(o_handle, (g, rows, width), "float32")
        for head, sequence, tile in T.grid(heads, b, (g * rows + query_tile - 1) // query_tile):
            with T.sblock("tile"):
                vh, vb, vt = T.axis.remap("SSS", [head, sequence, tile])
                T.reads(
                    sequences[vb, 0:4],
                    q[0:g, 0:rows, vh * head_dim : vh * head_dim + head_dim],
                    cache[0:cache_slots, 0:2, vh, 0:context, 0:head_dim],
                )
                T.writes(o[0:g, 0:rows, vh * head_dim : vh * head_dim + head_dim])
                query = T.sblock_alloc_buffer((half_dim, query_tile), "int32", scope="local")
                keys = T.sblock_alloc_buffer((key_block, half_dim), "int32", scope="local")
                values = T.sblock_alloc_buffer((half_block, head_dim), "int32", scope="local")
                scores = T.sblock_alloc_buffer((key_block, query_tile), "float32", scope="local")
                pairs = T.sblock_alloc_buffer((half_block, query_tile), "int32", scope="local")
                output = T.sblock_alloc_buffer((head_dim, query_tile), "float32", scope="local")
                maximum = T.sblock_alloc_buffer((query_tile,), "float32", scope="local")
                previous = T.sblock_alloc_buffer((query_tile,), "float32", scope="local")
                total = T.sblock_alloc_buffer((query_tile,), "float32", scope="local")
                slot: T.let[T.int32] = sequences[vb, 0]
                first_row: T.let[T.int32] = sequences[vb, 1]
                length: T.let[T.int32] = sequences[vb, 2]
                # The position of the tile's first query, and one past the last position that its last query sees.
                first: T.let[T.int32] = sequences[vb, 3] + vt * query_tile
                visible: T.let[T.int32] = sequences[vb, 3] + T.min(length, vt * query_tile + query_tile)
                if vt * query_tile < length:
                    for i, d in T.grid(query_tile, half_dim):
                        with T.sblock("load_query"):
                            vi, vd = T.axis.remap("SS", [i, d])
                            row: T.let[T.int32] = first_row + T.min(vt * query_tile + vi, length - 1)
                            query[vd, vi] = rounded_pair(
                                q[row // rows, row % rows, vh * head_dim + vd],
                                q[row // rows, row % rows, vh * head_dim + half_dim + vd],
                            )
                    for i in range(query_tile):
                        with T.sblock("init_softmax"):
                            vi = T.axis.spatial(query_tile, i)
                            maximum[vi] = T.float32(MASKED)
                            total[vi] = T.float32(0.0)
                    for d, i in T.grid(head_dim, query_tile):
                        with T.sblock("init_output"):
                            vd, vi = T.axis.remap("SS", [d, i])
                            output[vd, vi] = T.float32(0.0)
                    for block in range((visible + key_block - 1) // key_block):
                        with T.sblock("key_block"):
                            vk = T.axis.opaque((visible + key_block - 1) // key_block, block)
                            for j, d in T.grid(key_block, half_dim):
                                with T.sblock("load_keys"):
                                    vj, vd = T.axis.remap("SS", [j, d])
                                    # At the end of the context a block would read past the slot.
                                    keys[vj, vd] = _stored_pair(
                                        cache[slot, 0, vh, T.min(vk * key_block + vj, context - 1), vd],
                                        cache[slot, 0, vh, T.min(vk * key_block + vj, context - 1), half_dim + vd],
                                    )
                            for jt in range(key_block // key_tile):
                                with T.sblock("scores"):
                                    vjt = T.axis.spatial(key_block // key_tile, jt)
                                    tile_scores = T.sblock_alloc_buffer(
                                        (key_tile, query_tile), "float32", scope="local"
                                    )
                                    for d, js, i in T.grid(half_dim, key_tile, vectors):
                                        with T.sblock("products"):
                                            vd, vj, vi = T.axis.remap("RSS", [d, js, i])
                                            with T.init():
                                                tile_scores[vj, T.ramp(vi * lanes, 1, lanes)] = T.broadcast(
                                                    T.float32(0.0), lanes
                                                )
                                            tile_scores[vj, T.ramp(vi * lanes, 1, lanes)] = T.call_extern(
                                                f"float32x{lanes}",
                                                step,
                                                tile_scores[vj, T.ramp(vi * lanes, 1, lanes)],
                                                keys[vjt * key_tile + vj, vd],
                                                query[vd, T.ramp(vi * lanes, 1, lanes)],
                                            )
                                    for js, i in T.grid(key_tile, query_tile):
                                        with T.sblock("keep_scores"):
                                            vj, vi = T.axis.remap("SS", [js, i])
                                            scores[vjt * key_tile + vj, vi] = tile_scores[vj, vi] * T.float32(scale)
                            mask_scores(scores, vk * key_block, first)
                            update_softmax(scores, maximum, previous, total)
                            for j, i in T.grid(half_block, query_tile):
                                with T.sblock("pairs"):
                                    vj, vi = T.axis.remap("SS", [j, i])
                                    pairs[vj, vi] = rounded_pair(scores[vj, vi], scores[half_block + vj, vi])
                            for j, d in T.grid(half_block, head_dim):
                                with T.sblock("load_values"):
                                    vj, vd = T.axis.remap("SS", [j, d])
                                    # The cache beyond the last visible position may hold NaN.
                                    values[vj, vd] = _stored_pair(
                                        cache[slot, 1, vh, T.min(vk * key_block + vj, context - 1), vd],
                                        cache[slot, 1, vh, T.min(vk * key_block + half_block + vj, context - 1), vd],
                                    ) & T.Select(
                                        vk * key_block + half_block + vj < visible, T.int32(-1), T.int32(65535)
                                    )
                            for dt in range(head_dim // dim_tile):
                                with T.sblock("values"):
                                    vdt = T.axis.spatial(head_dim // dim_tile, dt)
                                    acc = T.sblock_alloc_buffer((dim_tile, query_tile), "float32", scope="local")
                                    for ds, i in T.grid(dim_tile, query_tile):
                                        with T.sblock("rescale_output"):
                                            vd, vi = T.axis.remap("SS", [ds, i])
                                            acc[vd, vi] = output[vdt * dim_tile + vd, vi] * previous[vi]
                                    for j, ds, i in T.grid(
                                        T.min(half_block, visible - vk * key_block), dim_tile, vectors
                                    ):
                                        with T.sblock("accumulate"):
                                            vj, vd, vi = T.axis.remap("RSS", [j, ds, i])
                                            acc[vd, T.ramp(vi * lanes, 1, lanes)] = T.call_extern(
                                                f"float32x{lanes}",
                                                step,
                                                acc[vd, T.ramp(vi * lanes, 1, lanes)],
                                                values[vj, vdt * dim_tile + vd],
                                                pairs[vj, T.ramp(vi * lanes, 1, lanes)],
                                            )
                                    for ds, i in T.grid(dim_tile, query_tile):
                                        with T.sblock("keep_output"):
                                            vd, vi = T.axis.remap("SS", [ds, i])
                                            output[vdt * dim_tile + vd, vi] = acc[vd, vi]
                    for d, i in T.grid(head_dim, query_tile):
                        with T.sblock("normalize"):
                            vd, vi = T.axis.remap("SS", [d, i])
                            output[vd, vi] = output[vd, vi] / total[vi]
                    for i, d in T.grid(T.min(query_tile, length - vt * query_tile), head_dim):
                        with T.sblock("store"):
                            vi = T.axis.spatial(query_tile, i)
                            vd = T.axis.spatial(head_dim, d)
                            row: T.let[T.int32] = first_row + vt * query_tile + vi
                            o[row // rows, row % rows, vh * head_dim + vd] = output[vd, vi]

    return prefill_attention
