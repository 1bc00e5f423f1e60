"""Packing and quantizing activations in TensorIR."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import row_groups
from tvm_attn.kernels.quant import PackPairs, QuantizeRows
from tvm_attn.kernels.weights import OFFSETS
from tvm_attn.storage import GROUP


def _rounded_bits(value: tirx.Expr) -> tirx.Expr:
    """The bfloat16 nearest to a float32 (ties to even), in the high half of an int32."""
    bits = T.reinterpret("int32", value)
    return bits + T.int32(0x7FFF) + ((bits >> T.int32(16)) & T.int32(1))


def rounded_pair(low: tirx.Expr, high: tirx.Expr) -> tirx.Expr:
    """Two float32 expressions, rounded to bfloat16, in one int32 word."""
    return ((_rounded_bits(low) >> T.int32(16)) & T.int32(65535)) | (_rounded_bits(high) & T.int32(-65536))


def pack_pairs(kernel: PackPairs) -> tirx.PrimFunc:
    """Block "pack"."""
    half, rows, g = kernel.width // 2, kernel.rows, row_groups(kernel.groups)

    @T.prim_func(s_tir=True)
    def pack_pairs(x_handle: T.handle, pairs_handle: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_handle, (g, rows, 2 * half), "float32")
        pairs = T.match_buffer(pairs_handle, (g, rows, half), "int32")
        for group, row, column in T.grid(g, rows, half):
            with T.sblock("pack"):
                vg, vr, vc = T.axis.remap("SSS", [group, row, column])
                pairs[vg, vr, vc] = rounded_pair(x[vg, vr, vc], x[vg, vr, vc + half])

    return pack_pairs


def quantize_rows(kernel: QuantizeRows) -> tirx.PrimFunc:
    """Block "group", with "largest", "reduce", "words" and "sum" inside."""
    width, rows, g = kernel.width, kernel.rows, row_groups(kernel.groups)
    offset, per_group = OFFSETS[kernel.weights], GROUP // 4

    @T.prim_func(s_tir=True)
    def quantize_rows(
        x_handle: T.handle, words_handle: T.handle, scales_handle: T.handle, corrections_handle: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_handle, (g, rows, width), "float32")
        words = T.match_buffer(words_handle, (g, rows, width // 4), "int32")
        scales = T.match_buffer(scales_handle, (g, rows, width // GROUP), "float32")
        corrections = T.match_buffer(corrections_handle, (g, rows, width // GROUP), "float32")
        for group, row, block in T.grid(g, rows, width // GROUP):
            with T.sblock("group"):
                vg, vr, vb = T.axis.remap("SSS", [group, row, block])
                T.reads(x[vg, vr, vb * GROUP : vb * GROUP + GROUP])
                T.writes(
                    words[vg, vr, vb * per_group : vb * per_group + per_group],
                    scales[vg, vr, vb],
                    corrections[vg, vr, vb],
                )
                largest = T.sblock_alloc_buffer((per_group,), "float32", scope="local")
                sums = T.sblock_alloc_buffer((per_group,), "int32", scope="local")
                peak = T.sblock_alloc_buffer((1,), "float32", scope="local")
                total = T.sblock_alloc_buffer((1,), "int32", scope="local")
                for p in range(per_group):
                    with T.sblock("largest"):
                        vp = T.axis.spatial(per_group, p)
                        largest[vp] = T.max(
                            T.max(T.abs(x[vg, vr, vb * GROUP + vp]), T.abs(x[vg, vr, vb * GROUP + vp + per_group])),
                            T.max(
                                T.abs(x[vg, vr, vb * GROUP + vp + 2 * per_group]),
                                T.abs(x[vg, vr, vb * GROUP + vp + 3 * per_group]),
                            ),
                        )
                peak[0] = T.float32(0.0)
                for p in range(per_group):
                    with T.sblock("reduce"):
                        vp = T.axis.reduce(per_group, p)
                        peak[0] = T.max(peak[0], largest[vp])
                scales[vg, vr, vb] = peak[0] * T.float32(1.0 / 127.0)
                # The reciprocal, or zero for a group of zeros.
                peak[0] = T.Select(peak[0] > T.float32(0.0), T.float32(127.0) / peak[0], T.float32(0.0))
                for p in range(per_group):
                    with T.sblock("words"):
                        vp = T.axis.spatial(per_group, p)
                        byte0 = T.meta_var(quantized(x[vg, vr, vb * GROUP + vp], peak[0]))
                        byte1 = T.meta_var(quantized(x[vg, vr, vb * GROUP + vp + per_group], peak[0]))
                        byte2 = T.meta_var(quantized(x[vg, vr, vb * GROUP + vp + 2 * per_group], peak[0]))
                        byte3 = T.meta_var(quantized(x[vg, vr, vb * GROUP + vp + 3 * per_group], peak[0]))
                        sums[vp] = byte0 + byte1 + byte2 + byte3
                        words[vg, vr, vb * per_group + vp] = packed_bytes(byte0, byte1, byte2, byte3)
                total[0] = 0
                for p in range(per_group):
                    with T.sblock("sum"):
                        vp = T.axis.reduce(per_group, p)
                        total[0] = total[0] + sums[vp]
                corrections[vg, vr, vb] = scales[vg, vr, vb] * T.Cast("float32", total[0] * offset)

    return quantize_rows


def quantized(value: tirx.Expr, reciprocal: tirx.Expr) -> tirx.Expr:
    """The integer nearest to a float32 value divided by its scale."""
    return T.Cast("int32", T.floor(value * reciprocal + T.float32(0.5)))


def packed_bytes(byte0: tirx.Expr, byte1: tirx.Expr, byte2: tirx.Expr, byte3: tirx.Expr) -> tirx.Expr:
    """Four integers in -128..127 as an int32 word, the first one in the lowest byte."""
    low = (byte0 & T.int32(255)) | ((byte1 & T.int32(255)) << T.int32(8))
    return low | ((byte2 & T.int32(255)) << T.int32(16)) | (byte3 << T.int32(24))
