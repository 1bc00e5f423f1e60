"""Causal attention over the KV cache, for prompts (prefill) and for one token a row (decode).

Neither stores a T x T matrix. Prefill is FlashAttention-2's loop (Dao, 2023, arXiv:2307.08691): a tile of queries
walks over blocks of keys with a running maximum and sum, and stops at the diagonal. Everything in the tile is
transposed, so that queries lie along the vector: scores are (keys, queries), the output is (D, queries), and maximum,
sum and rescaling are element by element, with no reduction across a vector. Decode is Flash-Decoding (Dao et al.,
2023): the keys of a row are split into chunks that are independent work, and their results are merged.

Keys and values are read from the cache, (S, 2, H, P, D), in their storage dtype; scores, softmax and sums are float32.
What lies in the cache beyond a sequence's length may be anything: masked scores are replaced before the exponential,
and values beyond the length are never read into a sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.activation import exp
from tvm_attn.kernels.base import Case, row_groups
from tvm_attn.storage import numpy_dtype

# Below every score that float32 can reach in practice, and far enough from its limit that differences stay finite.
MASKED = -1.0e30


@dataclass(frozen=True)
class PrefillAttention:
    """Causal attention of all rows of several sequences, packed one after the other.

    Parameters of the function: q (g, R, E) float32; cache (S, 2, H, P, D) dtype; sequences (b, 4) int32, one row a
    sequence: slot, first row of the flattened (g * R) rows, number of rows, position of the first row; o (g, R, E)
    float32. Row i of a sequence attends to the positions 0 .. first position + i of its slot, which must be written.
    Rows that belong to no sequence are left as they are.
    """

    family: ClassVar[str] = "prefill_attention"

    heads: int
    head_dim: int
    context: int
    rows: int
    dtype: str
    scale: float
    query_tile: int = 32
    """Queries of a tile; they lie along the vector."""
    key_block: int = 64
    """Keys between two updates of the running maximum."""
    key_tile: int = 8
    """Keys whose scores are in registers together, a divisor of `key_block`."""
    dim_tile: int = 8
    """Output dimensions that are in registers together, a divisor of D."""

    def prim_func(self) -> tirx.PrimFunc:
        """See `Kernel.prim_func`; block "tile", with the steps of the algorithm as blocks inside."""
        heads, head_dim, context, rows, dtype = self.heads, self.head_dim, self.context, self.rows, self.dtype
        width, scale = heads * head_dim, self.scale
        query_tile, key_block, key_tile, dim_tile = self.query_tile, self.key_block, self.key_tile, self.dim_tile

        @T.prim_func(s_tir=True)
        def prefill_attention(
            q_handle: T.handle, cache_handle: T.handle, sequences_handle: T.handle, o_handle: T.handle
        ):
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
                    keys = T.sblock_alloc_buffer((key_block, head_dim), "float32", scope="local")
                    scores = T.sblock_alloc_buffer((key_block, query_tile), "float32", scope="local")
                    output = T.sblock_alloc_buffer((head_dim, query_tile), "float32", scope="local")
                    maximum = T.sblock_alloc_buffer((query_tile,), "float32", scope="local")
                    previous = T.sblock_alloc_buffer((query_tile,), "float32", scope="local")
                    total = T.sblock_alloc_buffer((query_tile,), "float32", scope="local")
                    slot: T.let[T.int32] = sequences[vb, 0]
                    first_row: T.let[T.int32] = sequences[vb, 1]
                    length: T.let[T.int32] = sequences[vb, 2]
                    # Position of the tile's first query, and one past the last position that its last query sees.
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
                            with T.sblock("key_block"):
                                vk = T.axis.opaque((visible + key_block - 1) // key_block, block)
                                for j, d in T.grid(key_block, head_dim):
                                    with T.sblock("load_keys"):
                                        vj, vd = T.axis.remap("SS", [j, d])
                                        # The last block of the last positions would read past the slot.
                                        keys[vj, vd] = T.Cast(
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
                                                tile_scores[vj, vi] = (
                                                    tile_scores[vj, vi] + keys[vjt * key_tile + vj, vd] * query[vd, vi]
                                                )
                                        for js, i in T.grid(key_tile, query_tile):
                                            with T.sblock("keep_scores"):
                                                vj, vi = T.axis.remap("SS", [js, i])
                                                scores[vjt * key_tile + vj, vi] = tile_scores[vj, vi]
                                if vk * key_block + key_block - 1 > first:
                                    for j, i in T.grid(key_block, query_tile):
                                        with T.sblock("mask"):
                                            vj, vi = T.axis.remap("SS", [j, i])
                                            scores[vj, vi] = T.Select(
                                                vk * key_block + vj <= first + vi, scores[vj, vi], T.float32(MASKED)
                                            )
                                for i in range(query_tile):
                                    with T.sblock("keep_maximum"):
                                        vi = T.axis.spatial(query_tile, i)
                                        previous[vi] = maximum[vi]
                                for j, i in T.grid(key_block, query_tile):
                                    with T.sblock("maximum"):
                                        vj, vi = T.axis.remap("RS", [j, i])
                                        maximum[vi] = T.max(maximum[vi], scores[vj, vi])
                                for i in range(query_tile):
                                    with T.sblock("correction"):
                                        vi = T.axis.spatial(query_tile, i)
                                        previous[vi] = exp(previous[vi] - maximum[vi])
                                for i in range(query_tile):
                                    with T.sblock("rescale_sum"):
                                        vi = T.axis.spatial(query_tile, i)
                                        total[vi] = total[vi] * previous[vi]
                                for j, i in T.grid(key_block, query_tile):
                                    with T.sblock("probabilities"):
                                        vj, vi = T.axis.remap("SS", [j, i])
                                        scores[vj, vi] = exp(scores[vj, vi] - maximum[vi])
                                for j, i in T.grid(key_block, query_tile):
                                    with T.sblock("sum"):
                                        vj, vi = T.axis.remap("RS", [j, i])
                                        total[vi] = total[vi] + scores[vj, vi]
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
                                                acc[vd, vi] = acc[vd, vi] + scores[vj, vi] * T.Cast(
                                                    "float32",
                                                    cache[slot, 1, vh, vk * key_block + vj, vdt * dim_tile + vd],
                                                )
                                        for ds, i in T.grid(dim_tile, query_tile):
                                            with T.sblock("keep_output"):
                                                vd, vi = T.axis.remap("SS", [ds, i])
                                                output[vdt * dim_tile + vd, vi] = acc[vd, vi]
                        for i, d in T.grid(T.min(query_tile, length - vt * query_tile), head_dim):
                            with T.sblock("store"):
                                vi = T.axis.spatial(query_tile, i)
                                vd = T.axis.spatial(head_dim, d)
                                row: T.let[T.int32] = first_row + vt * query_tile + vi
                                o[row // rows, row % rows, vh * head_dim + vd] = output[vd, vi] / total[vi]

        return prefill_attention

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for dtype in ("float32", "float16", "bfloat16"):
            for name, context, sequences in (
                ("ragged batch", 128, ((2, 7, 0), (0, 1, 0), (1, 65, 0))),
                ("full context", 128, ((0, 128, 0),)),
                ("cached prefix", 100, ((1, 30, 70), (0, 33, 1))),
            ):
                kernel = PrefillAttention(2, 64, context, 8, dtype, 0.125)
                yield _prefill_case(kernel, name, sequences)
            kernel = PrefillAttention(1, 64, 96, 8, dtype, 0.125)
            yield _prefill_case(kernel, "magnitude 256", ((0, 96, 0),), magnitude=256.0)
        yield _prefill_case(PrefillAttention(3, 20, 45, 8, "float32", 0.3, dim_tile=4), "odd head_dim", ((0, 45, 0),))
        yield _prefill_case(PrefillAttention(12, 64, 1024, 8, "float32", 0.125), "124M", ((0, 1023, 0), (1, 5, 1019)))


@dataclass(frozen=True)
class DecodeAttention:
    """Attention of one query a row over its slot, up to and including its own position.

    Parameters of the function: q (g, R, E) float32, cache (S, 2, H, P, D) dtype, slots (g, R) int32,
    positions (g, R) int32, o (g, R, E) float32. A row whose position is -1 gets zeros.
    """

    family: ClassVar[str] = "decode_attention"

    heads: int
    head_dim: int
    context: int
    rows: int
    dtype: str
    scale: float
    groups: int | None = None
    key_chunk: int = 256
    """Keys of one piece of work."""
    key_block: int = 16
    """Keys between two updates of the running maximum."""
    lanes: int = 16
    """Partial sums of a dot product kept side by side, a divisor of D."""

    def prim_func(self) -> tirx.PrimFunc:
        """See `Kernel.prim_func`; blocks "chunk" and "merge"."""
        heads, head_dim, context, rows, dtype = self.heads, self.head_dim, self.context, self.rows, self.dtype
        width, scale, g = heads * head_dim, self.scale, row_groups(self.groups)
        key_chunk, key_block, lanes = self.key_chunk, self.key_block, self.lanes
        chunks = -(-context // key_chunk)

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
            cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, head_dim), dtype)
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
                        cache[0:cache_slots, 0:2, vh, 0:context, 0:head_dim],
                        slots[vg, vr],
                        positions[vg, vr],
                    )
                    T.writes(outputs[vg, vr, vh, vk, 0:head_dim], maxima[vg, vr, vh, vk], totals[vg, vr, vh, vk])
                    partial = T.sblock_alloc_buffer((key_block, lanes), "float32", scope="local")
                    scores = T.sblock_alloc_buffer((key_block,), "float32", scope="local")
                    output = T.sblock_alloc_buffer((head_dim,), "float32", scope="local")
                    # Running maximum, its value before the block, running sum.
                    maximum = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    previous = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    slot: T.let[T.int32] = slots[vg, vr]
                    end: T.let[T.int32] = T.min(positions[vg, vr] + 1, vk * key_chunk + key_chunk)
                    maximum[0] = T.float32(MASKED)
                    total[0] = T.float32(0.0)
                    for d in range(head_dim):
                        with T.sblock("init_output"):
                            vd = T.axis.spatial(head_dim, d)
                            output[vd] = T.float32(0.0)
                    for block in range((T.max(end - vk * key_chunk, 0) + key_block - 1) // key_block):
                        with T.sblock("key_block"):
                            vb = T.axis.opaque((T.max(end - vk * key_chunk, 0) + key_block - 1) // key_block, block)
                            first = T.meta_var(vk * key_chunk + vb * key_block)
                            for j, d, lane in T.grid(key_block, head_dim // lanes, lanes):
                                with T.sblock("products"):
                                    vj, vd, vl = T.axis.remap("SRS", [j, d, lane])
                                    with T.init():
                                        partial[vj, vl] = T.float32(0.0)
                                    # The last block of the last positions would read past the slot.
                                    partial[vj, vl] = partial[vj, vl] + q[
                                        vg, vr, vh * head_dim + vd * lanes + vl
                                    ] * T.Cast(
                                        "float32",
                                        cache[slot, 0, vh, T.min(first + vj, context - 1), vd * lanes + vl],
                                    )
                            for j, lane in T.grid(key_block, lanes):
                                with T.sblock("scores"):
                                    vj, vl = T.axis.remap("SR", [j, lane])
                                    with T.init():
                                        scores[vj] = T.float32(0.0)
                                    scores[vj] = scores[vj] + partial[vj, vl]
                            for j in range(key_block):
                                with T.sblock("mask"):
                                    vj = T.axis.spatial(key_block, j)
                                    scores[vj] = T.Select(
                                        first + vj < end, scores[vj] * T.float32(scale), T.float32(MASKED)
                                    )
                            previous[0] = maximum[0]
                            for j in range(key_block):
                                with T.sblock("maximum"):
                                    vj = T.axis.reduce(key_block, j)
                                    maximum[0] = T.max(maximum[0], scores[vj])
                            previous[0] = exp(previous[0] - maximum[0])
                            total[0] = total[0] * previous[0]
                            for j in range(key_block):
                                with T.sblock("probabilities"):
                                    vj = T.axis.spatial(key_block, j)
                                    scores[vj] = exp(scores[vj] - maximum[0])
                            for j in range(key_block):
                                with T.sblock("sum"):
                                    vj = T.axis.reduce(key_block, j)
                                    total[0] = total[0] + scores[vj]
                            for d in range(head_dim):
                                with T.sblock("rescale_output"):
                                    vd = T.axis.spatial(head_dim, d)
                                    output[vd] = output[vd] * previous[0]
                            for j, d in T.grid(T.min(key_block, end - first), head_dim):
                                with T.sblock("accumulate"):
                                    vj, vd = T.axis.remap("RS", [j, d])
                                    output[vd] = output[vd] + scores[vj] * T.Cast(
                                        "float32", cache[slot, 1, vh, first + vj, vd]
                                    )
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
                    maximum[0] = T.float32(MASKED)
                    total[0] = T.float32(0.0)
                    for chunk in range(chunks):
                        with T.sblock("merge_maximum"):
                            vk = T.axis.reduce(chunks, chunk)
                            maximum[0] = T.max(maximum[0], maxima[vg, vr, vh, vk])
                    for chunk in range(chunks):
                        with T.sblock("merge_weights"):
                            vk = T.axis.spatial(chunks, chunk)
                            # An empty chunk has a sum of zero, so its weight does not matter.
                            weights[vk] = exp(maxima[vg, vr, vh, vk] - maximum[0])
                    for chunk in range(chunks):
                        with T.sblock("merge_total"):
                            vk = T.axis.reduce(chunks, chunk)
                            total[0] = total[0] + weights[vk] * totals[vg, vr, vh, vk]
                    for d in range(head_dim):
                        with T.sblock("merge_init"):
                            vd = T.axis.spatial(head_dim, d)
                            output[vd] = T.float32(0.0)
                    for chunk, d in T.grid(chunks, head_dim):
                        with T.sblock("merge_outputs"):
                            vk, vd = T.axis.remap("RS", [chunk, d])
                            output[vd] = output[vd] + weights[vk] * outputs[vg, vr, vh, vk, vd]
                    for d in range(head_dim):
                        with T.sblock("store"):
                            vd = T.axis.spatial(head_dim, d)
                            # A padding row has seen no key: 0 / 1 instead of 0 / 0.
                            o[vg, vr, vh * head_dim + vd] = output[vd] / T.Select(
                                positions[vg, vr] >= 0, total[0], T.float32(1.0)
                            )

        return decode_attention

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for dtype in ("float32", "float16", "bfloat16"):
            kernel = DecodeAttention(2, 64, 600, 8, dtype, 0.125)
            yield _decode_case(kernel, "ragged, chunk borders", (0, 1, 15, 16, 255, 256, 599, 511, 512, -1, -1, 7))
            kernel = DecodeAttention(12, 64, 1024, 1, dtype, 0.125, groups=1)
            yield _decode_case(kernel, "one row, full context", (1023,))
            yield _decode_case(kernel, "magnitude 256", (100,), magnitude=256.0)
        yield _decode_case(DecodeAttention(3, 20, 45, 8, "float32", 0.3, lanes=4), "odd head_dim", (44, 3))
        yield _decode_case(DecodeAttention(1, 64, 8, 1, "float32", 0.125, groups=1), "first token", (0,))


def _attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Softmax attention of one query in float64: q (D,), keys and values (T, D) -> (D,)."""
    scores = keys.astype(np.float64) @ q.astype(np.float64) * scale
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ values.astype(np.float64)


def _cache(kernel: PrefillAttention | DecodeAttention, slots: int, magnitude: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    shape = (slots, 2, kernel.heads, kernel.context, kernel.head_dim)
    cache = rng.standard_normal(shape, dtype=np.float32) * np.float32(magnitude)
    return cache.astype(numpy_dtype(kernel.dtype))


def _forget(cache: np.ndarray, slot: int, length: int) -> None:
    """Fills what lies beyond a sequence's length with NaN: it must not matter."""
    cache[slot, :, :, length:] = np.nan


def _prefill_case(
    kernel: PrefillAttention, name: str, sequences: tuple[tuple[int, int, int], ...], magnitude: float = 1.0
) -> Case:
    """`sequences`: slot, number of rows, first position of each."""
    heads, head_dim, rows = kernel.heads, kernel.head_dim, kernel.rows
    count = sum(length for _, length, _ in sequences)
    groups = -(-count // rows)
    rng = np.random.default_rng(1)
    q = rng.standard_normal((groups * rows, heads, head_dim), dtype=np.float32) * np.float32(magnitude)
    cache = _cache(kernel, len(sequences), magnitude)
    o = np.zeros((groups * rows, heads * head_dim), np.float32)
    expected = o.astype(np.float64)
    table, row = [], 0
    for slot, length, start in sequences:
        _forget(cache, slot, start + length)
        table.append((slot, row, length, start))
        for i in range(length):
            end = start + i + 1
            for head in range(heads):
                keys, values = cache[slot, :, head, :end]
                result = _attend(q[row + i, head], keys, values, kernel.scale)
                expected[row + i, head * head_dim : (head + 1) * head_dim] = result
        row += length
    shape = (groups, rows, heads * head_dim)
    inputs = (q.reshape(shape), cache, np.array(table, np.int32))
    # At magnitude 256 a score is of order 1e5, and float32 resolves it to about 1e-2.
    nmse = 1e-11 if magnitude == 1.0 else 1e-5
    return Case(kernel, name, inputs, (o.reshape(shape),), (expected.reshape(shape),), nmse=nmse)


def _decode_case(kernel: DecodeAttention, name: str, positions: tuple[int, ...], magnitude: float = 1.0) -> Case:
    heads, head_dim, rows = kernel.heads, kernel.head_dim, kernel.rows
    groups = -(-len(positions) // rows)
    rng = np.random.default_rng(1)
    q = rng.standard_normal((groups * rows, heads, head_dim), dtype=np.float32) * np.float32(magnitude)
    cache = _cache(kernel, len(positions), magnitude)
    slots = np.zeros(groups * rows, np.int32)
    ends = np.full(groups * rows, -1, np.int32)
    # Slots in another order than rows.
    slots[: len(positions)] = np.arange(len(positions))[::-1]
    ends[: len(positions)] = positions
    expected = np.zeros((groups * rows, heads * head_dim))
    for row, (slot, end) in enumerate(zip(slots, ends, strict=True)):
        if end < 0:
            continue
        _forget(cache, int(slot), end + 1)
        for head in range(heads):
            keys, values = cache[slot, :, head, : end + 1]
            result = _attend(q[row, head], keys, values, kernel.scale)
            expected[row, head * head_dim : (head + 1) * head_dim] = result
    shape = (groups, rows, heads * head_dim)
    inputs = (
        q.reshape(shape),
        cache,
        slots.reshape(groups, rows),
        ends.reshape(groups, rows),
    )
    nmse = 1e-11 if magnitude == 1.0 else 1e-5
    output = np.zeros(shape, np.float32)
    return Case(kernel, name, inputs, (output,), (expected.reshape(shape),), nmse=nmse)


def random_prefill_case(kernel: PrefillAttention, length: int) -> Case:
    """A case of one prompt of `length` tokens with random operands, of the sizes that a search measures."""
    return _prefill_case(kernel, f"{length} rows", ((0, length, 0),))


def random_decode_case(kernel: DecodeAttention, positions: tuple[int, ...]) -> Case:
    """A case of one row a position with random operands, of the sizes that a search measures."""
    return _decode_case(kernel, f"{len(positions)} rows", positions)
