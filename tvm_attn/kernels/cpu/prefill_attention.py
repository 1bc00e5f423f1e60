"""Prefill attention on processors: FlashAttention-2's loop (Dao, 2023, arXiv:2307.08691).

A tile of queries walks over blocks of keys with a running maximum and sum, and stops at the diagonal. Everything in the
tile is transposed, so that the vectors run along the queries: scores are (keys, queries), the output is (D, queries),
and maximum, sum and rescaling work element by element, with no reduction across a vector.
"""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.script import tirx as T

from tvm_attn.kernels.attention import MASKED
from tvm_attn.kernels.base import largest_power
from tvm_attn.kernels.cpu.dot import BFLOAT16, find_dot
from tvm_attn.kernels.cpu.online_softmax import PrefillTiles, causal_mask, softmax_step
from tvm_attn.kernels.cpu.prefill_attention_bfloat16 import prefill_attention_bfloat16
from tvm_attn.kernels.cpu.vector import vectorize
from tvm_attn.kernels.prefill_attention import PrefillAttention
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.targets import CpuTarget


def prefill_attention(kernel: PrefillAttention, tiles: PrefillTiles) -> tirx.PrimFunc:
    """Block "tile", with the steps of the algorithm as blocks inside."""
    heads, head_dim, context, rows, dtype = kernel.heads, kernel.head_dim, kernel.context, kernel.rows, kernel.dtype
    width, scale = heads * head_dim, kernel.scale
    query_tile, key_block, key_tile, dim_tile = tiles.queries, tiles.key_block, tiles.key_tile, tiles.dim_tile

    converts = dtype != "float32"
    mask_scores, update_softmax = causal_mask(key_block, query_tile), softmax_step(key_block, query_tile)

    @T.prim_func(s_tir=True)
    def prefill_attention(q_handle: T.handle, cache_handle: T.handle, sequences_handle: T.handle, o_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        g = T.int32()
        cache_slots = T.int32()
        b = T.int32()
        q = T.match_buffer(q_handle, (g, rows, width), "float32")
        cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, head_dim), dtype)
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
                query = T.sblock_alloc_buffer((head_dim, query_tile), "float32", scope="local")
                # Keys, then values, if they are not float32: converted once, not for every tile.
                converted = T.sblock_alloc_buffer((key_block, head_dim), "float32", scope="local")
                scores = T.sblock_alloc_buffer((key_block, query_tile), "float32", scope="local")
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
                    for i, d in T.grid(query_tile, head_dim):
                        with T.sblock("load_query"):
                            vi, vd = T.axis.remap("SS", [i, d])
                            row: T.let[T.int32] = first_row + T.min(vt * query_tile + vi, length - 1)
                            query[vd, vi] = q[row // rows, row % rows, vh * head_dim + vd] * T.float32(scale)
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
                        # At the end of the context a block would read past the slot.
                        with T.sblock("key_block"):
                            vk = T.axis.opaque((visible + key_block - 1) // key_block, block)
                            if converts:
                                for j, d in T.grid(key_block, head_dim):
                                    with T.sblock("load_keys"):
                                        vj, vd = T.axis.remap("SS", [j, d])
                                        converted[vj, vd] = T.Cast(
                                            "float32",
                                            cache[slot, 0, vh, T.min(vk * key_block + vj, context - 1), vd],
                                        )
                            for jt in range(key_block // key_tile):
                                with T.sblock("scores"):
                                    vjt = T.axis.spatial(key_block // key_tile, jt)
                                    tile_scores = T.sblock_alloc_buffer(
                                        (key_tile, query_tile), "float32", scope="local"
                                    )
                                    for d, js, i in T.grid(head_dim, key_tile, query_tile):
                                        with T.sblock("products"):
                                            vd, vj, vi = T.axis.remap("RSS", [d, js, i])
                                            with T.init():
                                                tile_scores[vj, vi] = T.float32(0.0)
                                            if converts:
                                                tile_scores[vj, vi] = (
                                                    tile_scores[vj, vi]
                                                    + converted[vjt * key_tile + vj, vd] * query[vd, vi]
                                                )
                                            else:
                                                tile_scores[vj, vi] = (
                                                    tile_scores[vj, vi]
                                                    + cache[
                                                        slot,
                                                        0,
                                                        vh,
                                                        T.min(vk * key_block + vjt * key_tile + vj, context - 1),
                                                        vd,
                                                    ]
                                                    * query[vd, vi]
                                                )
                                    for js, i in T.grid(key_tile, query_tile):
                                        with T.sblock("keep_scores"):
                                            vj, vi = T.axis.remap("SS", [js, i])
                                            scores[vjt * key_tile + vj, vi] = tile_scores[vj, vi]
                            mask_scores(scores, vk * key_block, first)
                            update_softmax(scores, maximum, previous, total)
                            if converts:
                                for j, d in T.grid(key_block, head_dim):
                                    with T.sblock("load_values"):
                                        vj, vd = T.axis.remap("SS", [j, d])
                                        converted[vj, vd] = T.Cast(
                                            "float32",
                                            cache[slot, 1, vh, T.min(vk * key_block + vj, context - 1), vd],
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
                                        T.min(key_block, visible - vk * key_block), dim_tile, query_tile
                                    ):
                                        with T.sblock("accumulate"):
                                            vj, vd, vi = T.axis.remap("RSS", [j, ds, i])
                                            if converts:
                                                acc[vd, vi] = (
                                                    acc[vd, vi] + scores[vj, vi] * converted[vj, vdt * dim_tile + vd]
                                                )
                                            else:
                                                acc[vd, vi] = (
                                                    acc[vd, vi]
                                                    + scores[vj, vi]
                                                    * cache[slot, 1, vh, vk * key_block + vj, vdt * dim_tile + vd]
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


def _prefill_attention(kernel: PrefillAttention, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """A task is one tile of queries of one head; by default two vectors of queries by eight keys (or dimensions) fill
    the registers."""
    query_tile = 2 * target.lanes
    key_tile = choose("key_tile", (4, 8), 8 if target.tile_columns >= 16 else 4)
    dim_tile = largest_power(kernel.head_dim, choose("dim_tile", (4, 8), 8 if target.tile_columns >= 16 else 4))
    key_block = choose("key_block", (32, 64, 128), 32 if kernel.dtype == "float32" else 64)
    native = find_dot(BFLOAT16, target) if kernel.dtype == "bfloat16" and kernel.head_dim % 2 == 0 else None
    tiles = PrefillTiles(query_tile, key_block, key_tile, dim_tile)
    function = prefill_attention_bfloat16(kernel, tiles, native) if native else prefill_attention(kernel, tiles)
    schedule = s_tir.Schedule(function, enable_check=False)
    task = schedule.fuse(*schedule.get_loops(schedule.get_sblock("tile")))
    schedule.parallel(task)
    for name in ("init_softmax", "init_output", "mask", "keep_maximum", "maximum", "correction", "rescale_sum"):
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    for name in ("probabilities", "sum", "normalize"):
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    if native:
        schedule.annotate(task, "pragma_import_llvm", native.text(native.lanes))
        schedule.vectorize(schedule.get_loops(schedule.get_sblock("pairs"))[-1])
    if kernel.dtype != "float32":
        for name in ("load_keys", "load_values"):
            vectorize(schedule, schedule.get_sblock(name), target.lanes)
    # The dot products are vector statements already.
    spread = schedule.unroll if native else schedule.vectorize
    products = schedule.get_sblock("products")
    dim, key, query = schedule.get_loops(products)
    spread(query)
    schedule.unroll(key)
    init = schedule.decompose_reduction(products, dim)
    for block, how in ((init, spread), (schedule.get_sblock("keep_scores"), schedule.vectorize)):
        key, query = schedule.get_loops(block)[-2:]
        how(query)
        schedule.unroll(key)
    for name, how in (
        ("rescale_output", schedule.vectorize),
        ("accumulate", spread),
        ("keep_output", schedule.vectorize),
    ):
        dim, query = schedule.get_loops(schedule.get_sblock(name))[-2:]
        how(query)
        schedule.unroll(dim)
    return schedule.mod["main"]


TEMPLATE = Template("cpu.prefill_attention", 1, ("prefill_attention",), _prefill_attention)
