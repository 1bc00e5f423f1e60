"""Causal attention of prompts over the KV cache, without a T x T matrix.

FlashAttention-2's loop (Dao, 2023, arXiv:2307.08691): a tile of queries walks over blocks of keys with a running
maximum and sum, and stops at the diagonal. Everything in the tile is transposed, so that queries lie along the vector:
scores are (keys, queries), the output is (D, queries), and maximum, sum and rescaling are element by element, with no
reduction across a vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.attention import MASKED, attend, error_bound, forget, random_cache
from tvm_attn.kernels.base import Case
from tvm_attn.kernels.online_softmax import softmax_step
from tvm_attn.kernels.prefill_attention_bfloat16 import prefill_attention_bfloat16
from tvm_attn.storage import numpy_dtype

ROUNDED_PROBABILITIES = 2.0**-18
"""Bound on the normalised mean squared error where each probability is rounded to bfloat16, by 2**-9 at most."""


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
    native: bool = False
    """Bfloat16 dot products, see `tvm_attn.kernels.prefill_attention_bfloat16`; dtype is bfloat16 and D is even."""

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`; block "tile", with the steps of the algorithm as blocks inside."""
        if self.native:
            return prefill_attention_bfloat16(self)
        heads, head_dim, context, rows, dtype = self.heads, self.head_dim, self.context, self.rows, self.dtype
        width, scale = heads * head_dim, self.scale
        query_tile, key_block, key_tile, dim_tile = self.query_tile, self.key_block, self.key_tile, self.dim_tile

        converts = dtype != "float32"
        update_softmax = softmax_step(key_block, query_tile)

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
                    # Keys, then values, where they are not float32: converted once, not for every tile.
                    converted = T.sblock_alloc_buffer((key_block, head_dim), "float32", scope="local")
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
                            # The last block of the last positions would read past the slot.
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
                                update_softmax(scores, maximum, previous, total, vk * key_block, first)
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
                                                        acc[vd, vi]
                                                        + scores[vj, vi] * converted[vj, vdt * dim_tile + vd]
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


def _prefill_case(
    kernel: PrefillAttention, name: str, sequences: tuple[tuple[int, int, int], ...], magnitude: float = 1.0
) -> Case:
    """`sequences`: slot, number of rows, first position of each."""
    heads, head_dim, rows = kernel.heads, kernel.head_dim, kernel.rows
    count = sum(length for _, length, _ in sequences)
    groups = -(-count // rows)
    rng = np.random.default_rng(1)
    q = rng.standard_normal((groups * rows, heads, head_dim), dtype=np.float32) * np.float32(magnitude)
    bound = error_bound(magnitude)
    if kernel.dtype == "bfloat16":
        # Dot products take queries and probabilities in bfloat16: these queries exactly, the probabilities rounded.
        q, bound = q.astype(numpy_dtype("bfloat16")).astype(np.float32), max(bound, ROUNDED_PROBABILITIES)
    cache = random_cache((len(sequences), 2, heads, kernel.context, head_dim), kernel.dtype, magnitude)
    o = np.zeros((groups * rows, heads * head_dim), np.float32)
    expected = o.astype(np.float64)
    table, row = [], 0
    for slot, length, start in sequences:
        forget(cache, slot, start + length)
        table.append((slot, row, length, start))
        for i in range(length):
            end = start + i + 1
            for head in range(heads):
                keys, values = cache[slot, :, head, :end]
                result = attend(q[row + i, head], keys, values, kernel.scale)
                expected[row + i, head * head_dim : (head + 1) * head_dim] = result
        row += length
    shape = (groups, rows, heads * head_dim)
    inputs = (q.reshape(shape), cache, np.array(table, np.int32))
    return Case(kernel, name, inputs, (o.reshape(shape),), (expected.reshape(shape),), nmse=bound)


def random_prefill_case(kernel: PrefillAttention, length: int) -> Case:
    """A case of one prompt of `length` tokens with random operands, of the sizes that a search measures."""
    return _prefill_case(kernel, f"{length} rows", ((0, length, 0),))
