"""Decode attention on processors: a row's keys are split into chunks that run independently; the results are merged."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import s_tir, tirx
from tvm.script import tirx as T

from tvm_attn.kernels.activation import exp
from tvm_attn.kernels.attention import MASKED
from tvm_attn.kernels.base import largest_power, row_groups
from tvm_attn.kernels.cpu.prefetch import PREFETCH, PREFETCH_LLVM
from tvm_attn.kernels.cpu.vector import is_one_row, vectorize
from tvm_attn.kernels.decode_attention import DecodeAttention
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.cache import CacheRows
from tvm_attn.storage import numpy_dtype
from tvm_attn.targets import CpuTarget

_LINE_BYTES = 64


@dataclass(frozen=True)
class DecodeTiles:
    """The sizes of `decode_attention`.

    Attributes:
        key_chunk: keys of one task.
        key_block: keys whose scores form one vector, a divisor of `key_chunk`.
        lanes: partial sums of a dot product, a divisor of `CacheRows.run`.
        prefetch: whether values are fetched while keys are read, and the next head's keys while values are read. The
            keys or values of one head are too short a run for the hardware's prefetcher.
    """

    key_chunk: int
    key_block: int
    lanes: int
    prefetch: bool


def _sum_of_lanes(vector: tirx.Buffer, lanes: int) -> tirx.Expr:
    """The sum of `lanes` elements, a power of two, in pairs: in a chain each addition would wait for the one before."""
    total = vector[tirx.Ramp(0, 1, lanes)] if lanes > 1 else vector[0]
    while lanes > 1:
        lanes //= 2
        halves = (tirx.Shuffle([total], list(range(first, first + lanes))) for first in (0, lanes))
        total = next(halves) + next(halves)
    return total


def decode_attention(kernel: DecodeAttention, tiles: DecodeTiles) -> tirx.PrimFunc:
    """Blocks "chunk" and "merge".

    A chunk's scores are kept until all are known, so there is one maximum and nothing to rescale.
    """
    heads, head_dim, context, rows = kernel.heads, kernel.head_dim, kernel.context, kernel.rows
    stored = CacheRows(kernel)
    width, scale, g = heads * head_dim, kernel.scale, row_groups(kernel.groups)
    key_chunk, key_block, lanes = tiles.key_chunk, tiles.key_block, tiles.lanes
    chunks = -(-context // key_chunk)
    prefetches = tiles.prefetch
    per_line = _LINE_BYTES // numpy_dtype(stored.dtype).itemsize

    @T.inline
    def fetch_row(cache, slot, kind, head, position):
        for line in T.unroll((stored.width + per_line - 1) // per_line):
            element = T.meta_var(cache[slot, kind, head, position, line * per_line])
            T.evaluate(T.call_extern("int32", PREFETCH, T.address_of(element)))

    @T.prim_func(s_tir=True)
    def decode_attention(
        q_handle: T.handle,
        cache_handle: T.handle,
        slots_handle: T.handle,
        positions_handle: T.handle,
        o_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        cache_slots = T.int32()
        q = T.match_buffer(q_handle, (g, rows, width), "float32")
        cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, stored.width), stored.dtype)
        slots = T.match_buffer(slots_handle, (g, rows), "int32")
        positions = T.match_buffer(positions_handle, (g, rows), "int32")
        o = T.match_buffer(o_handle, (g, rows, width), "float32")
        outputs = T.sblock_alloc_buffer((g, rows, heads, chunks, head_dim), "float32")
        maxima = T.sblock_alloc_buffer((g, rows, heads, chunks), "float32")
        totals = T.sblock_alloc_buffer((g, rows, heads, chunks), "float32")
        for group, row, head, chunk in T.grid(g, rows, heads, chunks):
            with T.sblock("chunk"):
                vg, vr, vh, vk = T.axis.remap("SSSS", [group, row, head, chunk])
                T.reads(
                    q[vg, vr, vh * head_dim : vh * head_dim + head_dim],
                    cache[0:cache_slots, 0:2, vh, 0:context, 0 : stored.width],
                    slots[vg, vr],
                    positions[vg, vr],
                )
                T.writes(outputs[vg, vr, vh, vk, 0:head_dim], maxima[vg, vr, vh, vk], totals[vg, vr, vh, vk])
                scores = T.sblock_alloc_buffer((key_chunk,), "float32", scope="local")
                # One maximum and one sum for each key of a block; merged at the end.
                maxima_of_lanes = T.sblock_alloc_buffer((key_block,), "float32", scope="local")
                totals_of_lanes = T.sblock_alloc_buffer((key_block,), "float32", scope="local")
                maximum = T.sblock_alloc_buffer((1,), "float32", scope="local")
                total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                output = T.sblock_alloc_buffer((head_dim,), "float32", scope="local")
                slot: T.let[T.int32] = slots[vg, vr]
                first: T.let[T.int32] = vk * key_chunk
                count: T.let[T.int32] = T.max(T.min(positions[vg, vr] + 1 - first, key_chunk), 0)
                # Nothing reads the results of a chunk without keys.
                if count > 0:
                    for j in range(key_block):
                        with T.sblock("init_maxima"):
                            vj = T.axis.spatial(key_block, j)
                            maxima_of_lanes[vj] = T.float32(MASKED)
                    for block in range((count + key_block - 1) // key_block):
                        with T.sblock("key_block"):
                            vb = T.axis.opaque((count + key_block - 1) // key_block, block)
                            if prefetches:
                                for j in T.unroll(key_block):
                                    fetch_row(cache, slot, 1, vh, T.min(first + vb * key_block + j, context - 1))
                            for j in range(key_block):
                                with T.sblock("key"):
                                    vj = T.axis.spatial(key_block, j)
                                    partial = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                                    # At the end of the context a block would read past the slot.
                                    position = T.meta_var(T.min(first + vb * key_block + vj, context - 1))
                                    for plane, d, lane in T.grid(stored.planes, stored.run // lanes, lanes):
                                        with T.sblock("products"):
                                            vp, vd, vl = T.axis.remap("RRS", [plane, d, lane])
                                            with T.init():
                                                partial[vl] = T.float32(0.0)
                                            partial[vl] = partial[vl] + q[
                                                vg, vr, vh * head_dim + vp * stored.run + vd * lanes + vl
                                            ] * stored.value(cache[slot, 0, vh, position, vd * lanes + vl], vp)
                                    scores[vb * key_block + vj] = stored.scaled(
                                        _sum_of_lanes(partial, lanes), cache, slot, 0, vh, position
                                    )
                            for j in range(key_block):
                                with T.sblock("mask"):
                                    vj = T.axis.spatial(key_block, j)
                                    scores[vb * key_block + vj] = T.Select(
                                        vb * key_block + vj < count,
                                        scores[vb * key_block + vj] * T.float32(scale),
                                        T.float32(MASKED),
                                    )
                            for j in range(key_block):
                                with T.sblock("maxima"):
                                    vj = T.axis.spatial(key_block, j)
                                    maxima_of_lanes[vj] = T.max(maxima_of_lanes[vj], scores[vb * key_block + vj])
                    maximum[0] = T.float32(MASKED)
                    for j in range(key_block):
                        with T.sblock("maximum"):
                            vj = T.axis.reduce(key_block, j)
                            maximum[0] = T.max(maximum[0], maxima_of_lanes[vj])
                    for j in range(key_block):
                        with T.sblock("init_totals"):
                            vj = T.axis.spatial(key_block, j)
                            totals_of_lanes[vj] = T.float32(0.0)
                    for block in range((count + key_block - 1) // key_block):
                        with T.sblock("probability_block"):
                            vb = T.axis.opaque((count + key_block - 1) // key_block, block)
                            for j in range(key_block):
                                with T.sblock("probabilities"):
                                    vj = T.axis.spatial(key_block, j)
                                    scores[vb * key_block + vj] = exp(scores[vb * key_block + vj] - maximum[0])
                            for j in range(key_block):
                                with T.sblock("totals"):
                                    vj = T.axis.spatial(key_block, j)
                                    totals_of_lanes[vj] = totals_of_lanes[vj] + scores[vb * key_block + vj]
                    total[0] = T.float32(0.0)
                    for j in range(key_block):
                        with T.sblock("total"):
                            vj = T.axis.reduce(key_block, j)
                            total[0] = total[0] + totals_of_lanes[vj]
                    for d in range(head_dim):
                        with T.sblock("init_output"):
                            vd = T.axis.spatial(head_dim, d)
                            output[vd] = T.float32(0.0)
                    for j in range(count):
                        if prefetches:
                            fetch_row(cache, slot, 0, T.min(vh + 1, heads - 1), first + j)
                        for plane, d in T.grid(stored.planes, stored.run):
                            with T.sblock("accumulate"):
                                vj = T.axis.reduce(count, j)
                                vp, vd = T.axis.remap("SS", [plane, d])
                                output[vp * stored.run + vd] = output[vp * stored.run + vd] + stored.scaled(
                                    scores[vj], cache, slot, 1, vh, first + vj
                                ) * stored.value(cache[slot, 1, vh, first + vj, vd], vp)
                    for d in range(head_dim):
                        with T.sblock("keep_output"):
                            vd = T.axis.spatial(head_dim, d)
                            outputs[vg, vr, vh, vk, vd] = output[vd]
                    maxima[vg, vr, vh, vk] = maximum[0]
                    totals[vg, vr, vh, vk] = total[0]
        for group, row, head in T.grid(g, rows, heads):
            with T.sblock("merge"):
                vg, vr, vh = T.axis.remap("SSS", [group, row, head])
                T.reads(
                    positions[vg, vr],
                    outputs[vg, vr, vh, 0:chunks, 0:head_dim],
                    maxima[vg, vr, vh, 0:chunks],
                    totals[vg, vr, vh, 0:chunks],
                )
                T.writes(o[vg, vr, vh * head_dim : vh * head_dim + head_dim])
                maximum = T.sblock_alloc_buffer((1,), "float32", scope="local")
                weights = T.sblock_alloc_buffer((chunks,), "float32", scope="local")
                total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                output = T.sblock_alloc_buffer((head_dim,), "float32", scope="local")
                used: T.let[T.int32] = (positions[vg, vr] + key_chunk) // key_chunk
                maximum[0] = T.float32(MASKED)
                total[0] = T.float32(0.0)
                for chunk in range(used):
                    with T.sblock("merge_maximum"):
                        vk = T.axis.reduce(used, chunk)
                        maximum[0] = T.max(maximum[0], maxima[vg, vr, vh, vk])
                for chunk in range(used):
                    with T.sblock("merge_weights"):
                        vk = T.axis.spatial(used, chunk)
                        weights[vk] = exp(maxima[vg, vr, vh, vk] - maximum[0])
                for chunk in range(used):
                    with T.sblock("merge_total"):
                        vk = T.axis.reduce(used, chunk)
                        total[0] = total[0] + weights[vk] * totals[vg, vr, vh, vk]
                for d in range(head_dim):
                    with T.sblock("merge_init"):
                        vd = T.axis.spatial(head_dim, d)
                        output[vd] = T.float32(0.0)
                for chunk, d in T.grid(used, head_dim):
                    with T.sblock("merge_outputs"):
                        vk, vd = T.axis.remap("RS", [chunk, d])
                        output[vd] = output[vd] + weights[vk] * outputs[vg, vr, vh, vk, vd]
                for d in range(head_dim):
                    with T.sblock("store"):
                        vd = T.axis.spatial(head_dim, d)
                        # A padding row sees no key: compute 0 / 1 instead of 0 / 0.
                        o[vg, vr, vh * head_dim + vd] = output[vd] / T.Select(
                            positions[vg, vr] >= 0, total[0], T.float32(1.0)
                        )

    return decode_attention


def _decode_attention(kernel: DecodeAttention, target: CpuTarget, choose: Chooser) -> tirx.PrimFunc:
    """A task is one chunk of keys of one head of one row."""
    key_chunk = choose("key_chunk", (128, 256, 512, 1024), 256)
    key_block = choose("key_block", (8, 16, 32), 16)
    lanes = largest_power(CacheRows(kernel).run, target.lanes)
    prefetch = bool(choose("prefetch", (0, 1), 1))
    tiles = DecodeTiles(key_chunk, key_block, lanes, prefetch)
    schedule = s_tir.Schedule(decode_attention(kernel, tiles), enable_check=False)
    task = schedule.fuse(*schedule.get_loops(schedule.get_sblock("chunk")))
    schedule.parallel(task)
    if prefetch:
        schedule.annotate(task, "pragma_import_llvm", PREFETCH_LLVM)
    merge_loops = schedule.get_loops(schedule.get_sblock("merge"))
    if not is_one_row(kernel):
        schedule.parallel(schedule.fuse(*merge_loops))
    schedule.unroll(schedule.get_loops(schedule.get_sblock("key"))[-1])
    products = schedule.get_sblock("products")
    plane, dim, lane = schedule.get_loops(products)
    schedule.vectorize(lane)
    schedule.unroll(dim)
    schedule.unroll(plane)
    init = schedule.decompose_reduction(products, plane)
    schedule.vectorize(schedule.get_loops(init)[-1])
    for name in ("init_maxima", "mask", "maxima", "init_totals", "probabilities", "totals"):
        schedule.vectorize(schedule.get_loops(schedule.get_sblock(name))[-1])
    schedule.unroll(schedule.get_loops(schedule.get_sblock("accumulate"))[-2])
    for name in ("init_output", "accumulate", "keep_output", "merge_init", "merge_outputs", "store"):
        vectorize(schedule, schedule.get_sblock(name), target.lanes)
    return schedule.mod["main"]


TEMPLATE = Template("cpu.decode_attention", 2, ("decode_attention",), _decode_attention)
