"""Reading and writing rows of the KV cache in TensorIR, in any of its dtypes."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import largest_power, row_groups
from tvm_attn.kernels.cache_write import SMALLEST, CacheWrite
from tvm_attn.kernels.unscheduled.quant import packed_bytes, quantized
from tvm_attn.storage import CACHE_WORD, cache_row


class CacheRows:
    """How loops read a row of the cache: a head's key or value at one position.

    The D values are `planes` runs of `run` dimensions: one, or the four bytes of the words of an int8 cache.

    Attributes:
        width, dtype: elements of a row, and their dtype.
        planes, run: see above.
    """

    def __init__(self, kernel: Any) -> None:
        self.width, self.dtype = cache_row(kernel.dtype, kernel.head_dim)
        self._packed = kernel.dtype == "int8"
        self.planes = CACHE_WORD if self._packed else 1
        self.run = kernel.head_dim // self.planes

    def lanes(self, most: int) -> int:
        """The widest vector of neighbouring dimensions to load at once, a power of two up to `most`.

        Rows of an int8 cache have an odd number of words, so their vectors would not be aligned.
        """
        return 1 if self._packed else largest_power(self.run, most)

    def value(self, element: tirx.Expr, plane: Any) -> tirx.Expr:
        """A value in float32, without the row's scale: that of a plane in the row's element at a place of the run."""
        if not self._packed:
            return T.Cast("float32", element)
        return T.Cast("float32", (element << (T.int32(24) - T.int32(8) * plane)) >> T.int32(24))

    def at(self, cache: Any, row: tuple[Any, ...], dim: Any) -> tirx.Expr:
        """As `value`, of one dimension; `row` is (slot, 0 for the key or 1 for the value, head, position)."""
        slot, kind, head, position = row
        if not self._packed:
            return T.Cast("float32", cache[slot, kind, head, position, dim])
        word = cache[slot, kind, head, position, T.truncmod(dim, self.run)]
        return self.value(word, T.truncdiv(dim, self.run))

    def scaled(self, value: tirx.Expr, cache: Any, *row: Any) -> tirx.Expr:
        """A float32 value times the scale of a row, given as in `at`, if rows have one."""
        if not self._packed:
            return value
        slot, kind, head, position = row
        bits = cache[slot, kind, head, position, self.run]
        return value * T.reinterpret("float32", bits)


def cache_write(kernel: CacheWrite) -> tirx.PrimFunc:
    """Blocks "queries" and "row", with "largest", "reduce" and "words" inside the latter."""
    heads, head_dim, context, rows, g = (
        kernel.heads,
        kernel.head_dim,
        kernel.context,
        kernel.rows,
        row_groups(kernel.groups),
    )
    width, run = heads * head_dim, head_dim // CACHE_WORD

    @T.prim_func(s_tir=True)
    def cache_write(
        qkv_handle: T.handle,
        slots_handle: T.handle,
        positions_handle: T.handle,
        cache_handle: T.handle,
        q_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        cache_slots = T.int32()
        qkv = T.match_buffer(qkv_handle, (g, rows, 3 * width), "float32")
        slots = T.match_buffer(slots_handle, (g, rows), "int32")
        positions = T.match_buffer(positions_handle, (g, rows), "int32")
        cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, run + 1), "int32")
        q = T.match_buffer(q_handle, (g, rows, width), "float32")
        for group, row, column in T.grid(g, rows, width):
            with T.sblock("queries"):
                vg, vr, vc = T.axis.remap("SSS", [group, row, column])
                q[vg, vr, vc] = qkv[vg, vr, vc]
        for group, row, kind_head in T.grid(g, rows, 2 * heads):
            with T.sblock("row"):
                vg, vr, vh = T.axis.remap("SSS", [group, row, kind_head])
                T.reads(
                    qkv[vg, vr, width + vh * head_dim : width + vh * head_dim + head_dim],
                    slots[vg, vr],
                    positions[vg, vr],
                )
                T.writes(cache[0:cache_slots, 0:2, 0:heads, 0:context, 0 : run + 1])
                largest = T.sblock_alloc_buffer((run,), "float32", scope="local")
                peak = T.sblock_alloc_buffer((1,), "float32", scope="local")
                first: T.let[T.int32] = width + vh * head_dim
                if positions[vg, vr] >= 0:
                    for i in range(run):
                        with T.sblock("largest"):
                            vi = T.axis.spatial(run, i)
                            largest[vi] = T.max(
                                T.max(T.abs(qkv[vg, vr, first + vi]), T.abs(qkv[vg, vr, first + run + vi])),
                                T.max(
                                    T.abs(qkv[vg, vr, first + 2 * run + vi]), T.abs(qkv[vg, vr, first + 3 * run + vi])
                                ),
                            )
                    peak[0] = T.float32(0.0)
                    for i in range(run):
                        with T.sblock("reduce"):
                            vi = T.axis.reduce(run, i)
                            peak[0] = T.max(peak[0], largest[vi])
                    cache[slots[vg, vr], vh // heads, vh % heads, positions[vg, vr], run] = T.reinterpret(
                        "int32", peak[0] * T.float32(1.0 / 127.0)
                    )
                    peak[0] = T.Select(peak[0] > T.float32(SMALLEST), T.float32(127.0) / peak[0], T.float32(0.0))
                    for i in range(run):
                        with T.sblock("words"):
                            vi = T.axis.spatial(run, i)
                            cache[slots[vg, vr], vh // heads, vh % heads, positions[vg, vr], vi] = packed_bytes(
                                quantized(qkv[vg, vr, first + vi], peak[0]),
                                quantized(qkv[vg, vr, first + run + vi], peak[0]),
                                quantized(qkv[vg, vr, first + 2 * run + vi], peak[0]),
                                quantized(qkv[vg, vr, first + 3 * run + vi], peak[0]),
                            )

    return cache_write
