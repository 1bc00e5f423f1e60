"""Decode attention on GPUs: Flash-Decoding (Dao et al., 2023).

A block of threads takes a chunk of the keys of one row and head, and a second kernel merges the chunks. TVM inserts
the barriers that shared memory needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.errors import ScheduleError
from tvm_attn.kernels.activation import exp
from tvm_attn.kernels.attention import MASKED
from tvm_attn.kernels.base import largest_power, row_groups
from tvm_attn.kernels.decode_attention import DecodeAttention
from tvm_attn.kernels.gpu.threads import PARTIALS
from tvm_attn.kernels.template import Chooser, Template
from tvm_attn.kernels.unscheduled.cache import CacheRows
from tvm_attn.targets import GpuTarget


@dataclass(frozen=True)
class DecodeChunks:
    """The sizes of `decode_attention`, all powers of two.

    Attributes:
        keys: keys per block, a multiple of `PARTIALS`.
        threads: threads per block, at least `PARTIALS`.
        key_threads: threads that share the dot product of a key.
        lanes: the widest vector of a load, in elements.
    """

    keys: int
    threads: int
    key_threads: int
    lanes: int

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory of a block."""
        lanes = largest_power(head_dim, self.lanes)
        return 4 * (self.keys * (self.key_threads + 2) + 2 * PARTIALS + self.threads * lanes)


def decode_attention(kernel: DecodeAttention, chunks: DecodeChunks) -> tirx.PrimFunc:
    """The function of `DecodeAttention`: one block of threads for each chunk of keys, head and row; then the merge."""
    heads, head_dim, context, rows = kernel.heads, kernel.head_dim, kernel.context, kernel.rows
    stored = CacheRows(kernel)
    width, scale, g = heads * head_dim, kernel.scale, row_groups(kernel.groups)
    keys, threads, key_threads = chunks.keys, chunks.threads, chunks.key_threads
    lanes = stored.lanes(chunks.lanes)
    vectors = head_dim // lanes
    pass_keys, key_vectors, stride = threads // key_threads, -(-vectors // key_threads), key_threads + 1
    # Some threads split the output's vectors, the others the keys.
    across = min(threads, 1 << (vectors - 1).bit_length())
    splits, thread_vectors = threads // across, -(-vectors // across)
    count = -(-context // keys)
    merge_threads = min(threads, 1 << (head_dim - 1).bit_length())

    def visible_keys(end, chunk):
        """Keys of the chunk that the row sees."""
        return T.max(T.min(end - chunk * keys, keys), 0)

    @T.prim_func(s_tir=True, check_well_formed=False)
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
        outputs = T.sblock_alloc_buffer((g, rows, heads, count, head_dim), "float32")
        maxima = T.sblock_alloc_buffer((g, rows, heads, count), "float32")
        totals = T.sblock_alloc_buffer((g, rows, heads, count), "float32")
        for group_row in T.thread_binding(g * rows, thread="blockIdx.z"):
            for head in T.thread_binding(heads, thread="blockIdx.y"):
                for chunk in T.thread_binding(count, thread="blockIdx.x"):
                    for thread in T.thread_binding(threads, thread="threadIdx.x"):
                        with T.sblock("chunk"):
                            vg = T.axis.spatial(g, group_row // rows)
                            vr = T.axis.spatial(rows, group_row % rows)
                            vh, vk, t = T.axis.remap("SSS", [head, chunk, thread])
                            T.reads(
                                q[vg, vr, vh * head_dim : vh * head_dim + head_dim],
                                cache[0:cache_slots, 0:2, vh, 0:context, 0 : stored.width],
                                slots[vg, vr],
                                positions[vg, vr],
                            )
                            T.writes(
                                outputs[vg, vr, vh, vk, 0:head_dim], maxima[vg, vr, vh, vk], totals[vg, vr, vh, vk]
                            )
                            # Rows are one element longer than needed, so that neighbouring threads read different
                            # banks.
                            partial = T.sblock_alloc_buffer((keys * stride,), "float32", scope="shared")
                            scores = T.sblock_alloc_buffer((keys,), "float32", scope="shared")
                            maximum_part = T.sblock_alloc_buffer((PARTIALS,), "float32", scope="shared")
                            total_part = T.sblock_alloc_buffer((PARTIALS,), "float32", scope="shared")
                            output_part = T.sblock_alloc_buffer((splits, across * lanes), "float32", scope="shared")
                            products = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                            output = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                            value = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            maximum = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            slot: T.let[T.int32] = slots[vg, vr]
                            seen: T.let[T.int32] = visible_keys(positions[vg, vr] + 1, vk)
                            lane_x: T.let[T.int32] = t % key_threads
                            key_y: T.let[T.int32] = t // key_threads
                            for step in range((seen + pass_keys - 1) // pass_keys):
                                key: T.let[T.int32] = step * pass_keys + key_y
                                place: T.let[T.int32] = vk * keys + T.min(key, seen - 1)
                                for lane in T.vectorized(lanes):
                                    products[lane] = T.float32(0.0)
                                for d in T.unroll(key_vectors):
                                    if lane_x + d * key_threads < vectors:
                                        for lane in T.vectorized(lanes):
                                            products[lane] = products[lane] + q[
                                                vg, vr, vh * head_dim + (lane_x + d * key_threads) * lanes + lane
                                            ] * stored.at(
                                                cache,
                                                (slot, 0, vh, place),
                                                (lane_x + d * key_threads) * lanes + lane,
                                            )
                                value[0] = T.float32(0.0)
                                for lane in T.unroll(lanes):
                                    value[0] = value[0] + products[lane]
                                if key < keys:
                                    partial[key * stride + lane_x] = stored.scaled(value[0], cache, slot, 0, vh, place)
                            for step in range(-(-keys // threads)):
                                if step * threads + t < keys:
                                    value[0] = T.float32(0.0)
                                    for lane in T.unroll(key_threads):
                                        value[0] = value[0] + partial[(step * threads + t) * stride + lane]
                                    scores[step * threads + t] = T.Select(
                                        step * threads + t < seen, value[0] * T.float32(scale), T.float32(MASKED)
                                    )
                            if t < PARTIALS:
                                value[0] = T.float32(MASKED)
                                for j in range(keys // PARTIALS):
                                    value[0] = T.max(value[0], scores[j * PARTIALS + t])
                                maximum_part[t] = value[0]
                            maximum[0] = T.float32(MASKED)
                            for j in range(PARTIALS):
                                maximum[0] = T.max(maximum[0], maximum_part[j])
                            for step in range(-(-keys // threads)):
                                if step * threads + t < keys:
                                    value[0] = T.Select(
                                        step * threads + t < seen,
                                        exp(scores[step * threads + t] - maximum[0]),
                                        T.float32(0.0),
                                    )
                                    scores[step * threads + t] = value[0]
                            if t < PARTIALS:
                                value[0] = T.float32(0.0)
                                for j in range(keys // PARTIALS):
                                    value[0] = value[0] + scores[j * PARTIALS + t]
                                total_part[t] = value[0]
                            for c in range(thread_vectors):
                                vector: T.let[T.int32] = T.min(c * across + t % across, vectors - 1)
                                for lane in T.vectorized(lanes):
                                    output[lane] = T.float32(0.0)
                                for step in range((seen + splits - 1) // splits):
                                    key: T.let[T.int32] = T.min(step * splits + t // across, seen - 1)
                                    # A thread past the last key repeats it with a weight of zero.
                                    weight: T.let[T.float32] = stored.scaled(
                                        T.Select(step * splits + t // across < seen, scores[key], T.float32(0.0)),
                                        cache,
                                        slot,
                                        1,
                                        vh,
                                        vk * keys + key,
                                    )
                                    for lane in T.vectorized(lanes):
                                        output[lane] = output[lane] + weight * stored.at(
                                            cache, (slot, 1, vh, vk * keys + key), vector * lanes + lane
                                        )
                                for lane in T.vectorized(lanes):
                                    output_part[t // across, t % across * lanes + lane] = output[lane]
                                for step in range(-(-across * lanes // threads)):
                                    column: T.let[T.int32] = step * threads + t
                                    if column < across * lanes and c * across * lanes + column < head_dim:
                                        value[0] = T.float32(0.0)
                                        for j in range(splits):
                                            value[0] = value[0] + output_part[j, column]
                                        outputs[vg, vr, vh, vk, c * across * lanes + column] = value[0]
                            if t == 0:
                                value[0] = T.float32(0.0)
                                for j in range(PARTIALS):
                                    value[0] = value[0] + total_part[j]
                                maxima[vg, vr, vh, vk] = maximum[0]
                                totals[vg, vr, vh, vk] = value[0]
        for group_row in T.thread_binding(g * rows, thread="blockIdx.y"):
            for head in T.thread_binding(heads, thread="blockIdx.x"):
                for thread in T.thread_binding(merge_threads, thread="threadIdx.x"):
                    with T.sblock("merge"):
                        vg = T.axis.spatial(g, group_row // rows)
                        vr = T.axis.spatial(rows, group_row % rows)
                        vh, t = T.axis.remap("SS", [head, thread])
                        T.reads(
                            positions[vg, vr],
                            outputs[vg, vr, vh, 0:count, 0:head_dim],
                            maxima[vg, vr, vh, 0:count],
                            totals[vg, vr, vh, 0:count],
                        )
                        T.writes(o[vg, vr, vh * head_dim : vh * head_dim + head_dim])
                        maximum = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        weight = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        output = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        used: T.let[T.int32] = T.max(positions[vg, vr], 0) // keys + 1
                        maximum[0] = T.float32(MASKED)
                        for k in range(used):
                            maximum[0] = T.max(maximum[0], maxima[vg, vr, vh, k])
                        for step in range(-(-head_dim // merge_threads)):
                            if step * merge_threads + t < head_dim:
                                total[0] = T.float32(0.0)
                                output[0] = T.float32(0.0)
                                for k in range(used):
                                    weight[0] = exp(maxima[vg, vr, vh, k] - maximum[0])
                                    total[0] = total[0] + weight[0] * totals[vg, vr, vh, k]
                                    output[0] = output[0] + weight[0] * outputs[vg, vr, vh, k, step * merge_threads + t]
                                # A padding row sees no key: compute 0 / 1 instead of 0 / 0.
                                o[vg, vr, vh * head_dim + step * merge_threads + t] = output[0] / T.Select(
                                    positions[vg, vr] >= 0, total[0], T.float32(1.0)
                                )

    return decode_attention


def _decode_attention(kernel: DecodeAttention, target: GpuTarget, choose: Chooser) -> tirx.PrimFunc:
    threads = choose("threads", (32, 64, 128, 256), min(128, target.max_threads))
    keys = choose("key_chunk", (32, 64, 128, 256), 128)
    key_threads = choose("key_threads", (1, 2, 4, 8, 16), 8)
    chunks = DecodeChunks(keys, threads, key_threads, target.vector_bytes // 4)
    if chunks.shared_bytes(kernel.head_dim) > target.shared_bytes:
        raise ScheduleError(f"chunks of {keys} keys do not fit {target.shared_bytes} bytes of shared memory")
    return decode_attention(kernel, chunks)


TEMPLATE = Template("gpu.decode_attention", 1, ("decode_attention",), _decode_attention)
