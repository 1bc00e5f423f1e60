"""Attention of every kind on processors: FlashAttention-2's loop, as in `prefill_attention`, over plain tensors.

Keys that no query of a tile sees are skipped by blocks. `AttentionScores` computes a row of a head by one thread.
"""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.script import tirx as T

from tvm_attn.kernels.activation import exp
from tvm_attn.kernels.attention_operator import EXCLUDED, LOWEST, UNSEEN, AttentionOperator, AttentionScores
from tvm_attn.kernels.base import largest_power, operand, without_unused
from tvm_attn.kernels.cpu.online_softmax import PrefillTiles, softmax_step
from tvm_attn.kernels.cpu.vector import vectorize
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.targets import CpuTarget


def attention_operator(kernel: AttentionOperator, tiles: PrefillTiles) -> tirx.PrimFunc:
    """Block "tile", with the steps of the algorithm as blocks inside."""
    heads, key_heads, head_dim, value_dim = kernel.heads, kernel.key_heads, kernel.head_dim, kernel.value_dim
    query_tile, key_block, key_tile, dim_tile = tiles.queries, tiles.key_block, tiles.key_tile, tiles.dim_tile
    dtype, group, scale, converts = kernel.dtype, heads // key_heads, kernel.scale, kernel.dtype != "float32"
    has_mask, adjusts = kernel.mask is not None, kernel.mask is not None or kernel.softcap != 0.0
    update_softmax = softmax_step(key_block, query_tile)

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
        for batch, head, tile in T.grid(b, heads, (n + query_tile - 1) // query_tile):
            with T.sblock("tile"):
                vb, vh, vt = T.axis.remap("SSS", [batch, head, tile])
                T.reads(q[vb, vh, 0:n, 0:head_dim], k[vb, vh // group, 0:s, 0:head_dim], bounds[vb, 0:2])
                T.writes(o[vb, vh, 0:n, 0:value_dim])
                query = T.sblock_alloc_buffer((head_dim, query_tile), "float32", scope="local")
                # Keys and values that are not float32 are converted once, not for every tile.
                keys = T.sblock_alloc_buffer((key_block, head_dim), "float32", scope="local")
                values = T.sblock_alloc_buffer((key_block, value_dim), "float32", scope="local")
                scores = T.sblock_alloc_buffer((key_block, query_tile), "float32", scope="local")
                output = T.sblock_alloc_buffer((value_dim, query_tile), "float32", scope="local")
                maximum = T.sblock_alloc_buffer((query_tile,), "float32", scope="local")
                previous = T.sblock_alloc_buffer((query_tile,), "float32", scope="local")
                total = T.sblock_alloc_buffer((query_tile,), "float32", scope="local")
                count: T.let[T.int32] = T.min(T.min(bounds[vb, 1], s), ms if has_mask else s)
                first: T.let[T.int32] = bounds[vb, 0] + vt * query_tile
                begin: T.let[T.int32] = kernel.begin(first) // key_block
                end: T.let[T.int32] = kernel.end(first + T.min(query_tile, n - vt * query_tile) - 1, count)
                for i, d in T.grid(query_tile, head_dim):
                    with T.sblock("load_query"):
                        vi, vd = T.axis.remap("SS", [i, d])
                        query[vd, vi] = T.Cast(
                            "float32", q[vb, vh, T.min(vt * query_tile + vi, n - 1), vd]
                        ) * T.float32(scale)
                for i in range(query_tile):
                    with T.sblock("init_softmax"):
                        vi = T.axis.spatial(query_tile, i)
                        maximum[vi] = T.float32(UNSEEN)
                        total[vi] = T.float32(0.0)
                for d, i in T.grid(value_dim, query_tile):
                    with T.sblock("init_output"):
                        vd, vi = T.axis.remap("SS", [d, i])
                        output[vd, vi] = T.float32(0.0)
                for block in range(T.max((end + key_block - 1) // key_block - begin, 0)):
                    with T.sblock("key_block"):
                        vk = T.axis.opaque(T.max((end + key_block - 1) // key_block - begin, 0), block)
                        first_key = T.meta_var((begin + vk) * key_block)
                        if converts:
                            for j, d in T.grid(key_block, head_dim):
                                with T.sblock("load_keys"):
                                    vj, vd = T.axis.remap("SS", [j, d])
                                    keys[vj, vd] = T.Cast(
                                        "float32", k[vb, vh // group, T.min(first_key + vj, count - 1), vd]
                                    )
                        for jt in range(key_block // key_tile):
                            with T.sblock("scores"):
                                vjt = T.axis.spatial(key_block // key_tile, jt)
                                tile_scores = T.sblock_alloc_buffer((key_tile, query_tile), "float32", scope="local")
                                for d, js, i in T.grid(head_dim, key_tile, query_tile):
                                    with T.sblock("products"):
                                        vd, vj, vi = T.axis.remap("RSS", [d, js, i])
                                        with T.init():
                                            tile_scores[vj, vi] = T.float32(0.0)
                                        if converts:
                                            tile_scores[vj, vi] = (
                                                tile_scores[vj, vi] + keys[vjt * key_tile + vj, vd] * query[vd, vi]
                                            )
                                        else:
                                            tile_scores[vj, vi] = (
                                                tile_scores[vj, vi]
                                                + k[
                                                    vb,
                                                    vh // group,
                                                    T.min(first_key + vjt * key_tile + vj, count - 1),
                                                    vd,
                                                ]
                                                * query[vd, vi]
                                            )
                                for js, i in T.grid(key_tile, query_tile):
                                    with T.sblock("keep_scores"):
                                        vj, vi = T.axis.remap("SS", [js, i])
                                        scores[vjt * key_tile + vj, vi] = tile_scores[vj, vi]
                        if adjusts:
                            # Queries outside: a row of the mask is contiguous along the keys.
                            for i, j in T.grid(query_tile, key_block):
                                with T.sblock("adjust"):
                                    vi, vj = T.axis.remap("SS", [i, j])
                                    scores[vj, vi] = kernel.biased(
                                        kernel.capped(scores[vj, vi]),
                                        mask,
                                        vb,
                                        vh,
                                        vt * query_tile + vi,
                                        first_key + vj,
                                    )
                        if tirx.Not(
                            tirx.And(
                                kernel.sees(first_key, first + query_tile - 1, count),
                                kernel.sees(first_key + key_block - 1, first, count),
                            )
                        ):
                            for j, i in T.grid(key_block, query_tile):
                                with T.sblock("mask"):
                                    vj, vi = T.axis.remap("SS", [j, i])
                                    scores[vj, vi] = T.Select(
                                        kernel.sees(first_key + vj, first + vi, count),
                                        scores[vj, vi],
                                        T.float32(EXCLUDED),
                                    )
                        update_softmax(scores, maximum, previous, total)
                        if converts:
                            for j, d in T.grid(key_block, value_dim):
                                with T.sblock("load_values"):
                                    vj, vd = T.axis.remap("SS", [j, d])
                                    values[vj, vd] = T.Cast(
                                        "float32", v[vb, vh // group, T.min(first_key + vj, count - 1), vd]
                                    )
                        for dt in range(value_dim // dim_tile):
                            with T.sblock("values"):
                                vdt = T.axis.spatial(value_dim // dim_tile, dt)
                                acc = T.sblock_alloc_buffer((dim_tile, query_tile), "float32", scope="local")
                                for ds, i in T.grid(dim_tile, query_tile):
                                    with T.sblock("rescale_output"):
                                        vd, vi = T.axis.remap("SS", [ds, i])
                                        acc[vd, vi] = output[vdt * dim_tile + vd, vi] * previous[vi]
                                # Keys that do not exist may have any values.
                                for j, ds, i in T.grid(T.min(key_block, end - first_key), dim_tile, query_tile):
                                    with T.sblock("accumulate"):
                                        vj, vd, vi = T.axis.remap("RSS", [j, ds, i])
                                        if converts:
                                            acc[vd, vi] = acc[vd, vi] + scores[vj, vi] * values[vj, vdt * dim_tile + vd]
                                        else:
                                            acc[vd, vi] = (
                                                acc[vd, vi]
                                                + scores[vj, vi]
                                                * v[vb, vh // group, first_key + vj, vdt * dim_tile + vd]
                                            )
                                for ds, i in T.grid(dim_tile, query_tile):
                                    with T.sblock("keep_output"):
                                        vd, vi = T.axis.remap("SS", [ds, i])
                                        output[vdt * dim_tile + vd, vi] = acc[vd, vi]
                for d, i in T.grid(value_dim, query_tile):
                    with T.sblock("normalize"):
                        vd, vi = T.axis.remap("SS", [d, i])
                        output[vd, vi] = T.Select(
                            maximum[vi] < T.float32((UNSEEN + LOWEST) / 2), T.float32(0.0), output[vd, vi] / total[vi]
                        )
                for i, d in T.grid(T.min(query_tile, n - vt * query_tile), value_dim):
                    with T.sblock("store"):
                        vi = T.axis.spatial(query_tile, i)
                        vd = T.axis.spatial(value_dim, d)
                        o[vb, vh, vt * query_tile + vi, vd] = T.Cast(dtype, output[vd, vi])

    return without_unused(attention_operator)


def _attention_operator(kernel: AttentionOperator, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """The tiles are those of `prefill_attention`."""
    key_tile = choose("key_tile", (4, 8), 8 if target.tile_columns >= 16 else 4)
    dim_tile = largest_power(kernel.value_dim, choose("dim_tile", (4, 8), 8 if target.tile_columns >= 16 else 4))
    key_block = choose("key_block", (32, 64, 128), 32 if kernel.dtype == "float32" else 64)
    tiles = PrefillTiles(2 * target.lanes, key_block, key_tile, dim_tile)
    schedule = s_tir.Schedule(attention_operator(kernel, tiles), enable_check=False)
    schedule.parallel(schedule.fuse(*schedule.get_loops(schedule.get_sblock("tile"))))
    for name in ("init_softmax", "init_output", "mask", "keep_maximum", "maximum", "correction", "rescale_sum"):
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    for name in ("probabilities", "sum", "normalize"):
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    if kernel.dtype != "float32":
        for name in ("load_keys", "load_values"):
            vectorize(schedule, schedule.get_sblock(name), target.lanes)
    products = schedule.get_sblock("products")
    dim, key, query = schedule.get_loops(products)
    schedule.vectorize(query)
    schedule.unroll(key)
    init = schedule.decompose_reduction(products, dim)
    for block in (init, *(schedule.get_sblock(name) for name in ("keep_scores", "rescale_output", "accumulate"))):
        outer, query = schedule.get_loops(block)[-2:]
        schedule.vectorize(query)
        schedule.unroll(outer)
    dim, query = schedule.get_loops(schedule.get_sblock("keep_output"))[-2:]
    schedule.vectorize(query)
    schedule.unroll(dim)
    return schedule.mod["main"]


def attention_scores(kernel: AttentionScores) -> tirx.PrimFunc:
    """Block "row"."""
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
        for batch, head, row in T.grid(b, heads, n):
            with T.sblock("row"):
                vb, vh, vi = T.axis.remap("SSS", [batch, head, row])
                T.reads(q[vb, vh, vi, 0:head_dim], k[vb, vh // group, 0:s, 0:head_dim], bounds[vb, 0:2])
                T.writes(scores[vb, vh, vi, 0:s])
                score = T.sblock_alloc_buffer((1,), "float32", scope="local")
                maximum = T.sblock_alloc_buffer((1,), "float32", scope="local")
                total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                count: T.let[T.int32] = T.min(T.min(bounds[vb, 1], s), ms if has_mask else s)
                position: T.let[T.int32] = bounds[vb, 0] + vi
                maximum[0] = T.float32(UNSEEN)
                total[0] = T.float32(0)
                for key in range(s):
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
                        maximum[0] = T.max(maximum[0], score[0])
                    if stage == "biased":
                        scores[vb, vh, vi, key] = T.Select(score[0] < T.float32(lowest), T.float32("-inf"), score[0])
                    else:
                        scores[vb, vh, vi, key] = score[0]
                if stage == "weights":
                    for key in range(s):
                        score[0] = scores[vb, vh, vi, key]
                        scores[vb, vh, vi, key] = T.Select(
                            score[0] < T.float32(lowest), T.float32(0), exp(score[0] - maximum[0])
                        )
                        total[0] = total[0] + scores[vb, vh, vi, key]
                    for key in range(s):
                        scores[vb, vh, vi, key] = scores[vb, vh, vi, key] / T.Select(
                            total[0] > T.float32(0), total[0], T.float32(1)
                        )

    return without_unused(attention_scores)


def _attention_scores(kernel: AttentionScores, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    schedule = s_tir.Schedule(attention_scores(kernel), enable_check=False)
    schedule.parallel(schedule.fuse(*schedule.get_loops(schedule.get_sblock("row"))))
    return schedule.mod["main"]


TEMPLATE = Template("cpu.attention_operator", 1, ("attention_operator",), _attention_operator)
SCORES_TEMPLATE = Template("cpu.attention_scores", 1, ("attention_scores",), _attention_scores)
