"""Linear layers in TensorIR: a register tile of R x C accumulators over packed weights, and a fused epilogue.

Sums over groups and everything after them are float32. These functions do not pad: C divides N, except for the head,
whose output keeps the padded columns and whose readers know the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.activation import EXPRESSIONS
from tvm_attn.kernels.base import operand, row_groups, without_unused
from tvm_attn.kernels.linear import Linear, LinearKernel, QKVLinear, ResidualLinear
from tvm_attn.kernels.unscheduled.weights import high_half, low_half, spread, vector_type
from tvm_attn.kernels.weights import PLAIN, packed_types
from tvm_attn.storage import GROUP


def linear(kernel: LinearKernel, lanes: int = 1, dot: str | None = None, signed: bool = False) -> tirx.PrimFunc:
    """A linear layer with float32 activations: blocks "matmul" and "epilogue", in this order.

    The function has only the operands that the weight's format and the epilogue need.

    Args:
        kernel: one of the linear kernels, without LayerNorm.
        lanes: columns that one step over words computes, a divisor of C; plain formats do not use it.
        dot: name of a function (acc, x word, w words) -> acc over `lanes` columns that the template imports, for one
            step over words; None for shifts, masks and multiplications.
        signed: whether that function takes the bytes of w as signed too.
    """
    rows, columns, strips, k = kernel.rows, kernel.columns, kernel.strips, kernel.in_features
    n, g = strips * columns, row_groups(kernel.groups)
    plain, quantized = kernel.weights in PLAIN, kernel.weights in ("int8", "int4")
    w_types = packed_types(kernel.weights, k, kernel.out_features, columns)
    x_width = k if plain else k // 2 if kernel.weights == "bfloat16_pairs" else k // 4
    activation = kernel.activation if isinstance(kernel, Linear) else None
    x_dtype, has_bias, residual = "float32" if plain else "int32", kernel.has_bias, isinstance(kernel, ResidualLinear)
    splits = isinstance(kernel, QKVLinear)
    width = n // 3 if splits else n
    activate = EXPRESSIONS[activation] if activation else lambda value: value
    accumulate = _ACCUMULATE[kernel.weights](kernel, lanes, dot, signed)
    cache_slots = tirx.Var("cache_slots", "int32")
    heads, context, cache_dtype = (1, 1, "float32")
    if isinstance(kernel, QKVLinear):
        heads, context, cache_dtype = kernel.heads, kernel.context, kernel.cache_dtype
    head_dim = width // heads
    cache_shape = (cache_slots, 2, heads, context, head_dim)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def matmul(
        x_handle: T.handle,
        x_scales_handle: T.handle,
        x_corrections_handle: T.handle,
        w_handle: T.handle,
        w_scales_handle: T.handle,
        bias_handle: T.handle,
        residual_handle: T.handle,
        slots_handle: T.handle,
        positions_handle: T.handle,
        cache_handle: T.handle,
        y_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_handle, (g, rows, x_width), x_dtype)
        x_scales = T.meta_var(operand(quantized, x_scales_handle, (g, rows, k // GROUP), "float32"))
        x_corrections = T.meta_var(operand(quantized, x_corrections_handle, (g, rows, k // GROUP), "float32"))
        w = T.match_buffer(w_handle, w_types[0][0], w_types[0][1])
        w_scales = T.meta_var(operand(quantized, w_scales_handle, w_types[-1][0], "float16"))
        bias = T.meta_var(operand(has_bias, bias_handle, (n,), "float32"))
        residual_in = T.meta_var(operand(residual, residual_handle, (g, rows, n), "float32"))
        slots = T.meta_var(operand(splits, slots_handle, (g, rows), "int32"))
        positions = T.meta_var(operand(splits, positions_handle, (g, rows), "int32"))
        kv = T.meta_var(operand(splits, cache_handle, cache_shape, cache_dtype))
        y = T.match_buffer(y_handle, (g, rows, width), "float32")
        acc = T.sblock_alloc_buffer((g, strips, rows, columns), "float32")
        accumulate(x, x_scales, x_corrections, w, w_scales, acc, g)
        for group, strip, row, column in T.grid(g, strips, rows, columns):
            with T.sblock("epilogue"):
                vg, vs, vr, vc = T.axis.remap("SSSS", [group, strip, row, column])
                at = T.meta_var(vs * columns + vc)
                total = T.meta_var(acc[vg, vs, vr, vc] + bias[at] if has_bias else acc[vg, vs, vr, vc])
                if splits:
                    T.reads(acc[vg, vs, vr, vc], bias[at], slots[vg, vr], positions[vg, vr])
                    T.writes(y[vg, vr, 0:width], kv[0:cache_slots, 0:2, 0:heads, 0:context, 0:head_dim])
                    if at < width:
                        y[vg, vr, at] = total
                    else:
                        if positions[vg, vr] >= 0:
                            kv[
                                slots[vg, vr],
                                at // width - 1,
                                at % width // head_dim,
                                positions[vg, vr],
                                at % head_dim,
                            ] = T.Cast(cache_dtype, total)
                else:
                    y[vg, vr, at] = activate(total) + residual_in[vg, vr, at] if residual else activate(total)

    return without_unused(matmul)


def _accumulate_plain(kernel: LinearKernel, lanes: int, dot: str | None, signed: bool) -> Callable[..., None]:
    rows, columns, strips, k = kernel.rows, kernel.columns, kernel.strips, kernel.in_features

    @T.inline
    def accumulate(x, x_scales, x_corrections, w, w_scales, acc, g):
        for group, strip, row, column, feature in T.grid(g, strips, rows, columns, k):
            with T.sblock("matmul"):
                vg, vs, vr, vc, vk = T.axis.remap("SSSSR", [group, strip, row, column, feature])
                with T.init():
                    acc[vg, vs, vr, vc] = T.float32(0.0)
                acc[vg, vs, vr, vc] = acc[vg, vs, vr, vc] + x[vg, vr, vk] * T.Cast("float32", w[vs, vk, vc])

    return accumulate


def _accumulate_pairs(kernel: LinearKernel, lanes: int, dot: str | None, signed: bool) -> Callable[..., None]:
    rows, columns, strips, words = kernel.rows, kernel.columns, kernel.strips, kernel.in_features // 2

    def step(acc, x, w):
        if dot:
            return T.call_extern(f"float32x{lanes}", dot, acc, x, w)
        return acc + spread(low_half(x), lanes) * low_half(w, lanes) + spread(high_half(x), lanes) * high_half(w, lanes)

    @T.inline
    def accumulate(x, x_scales, x_corrections, w, w_scales, acc, g):
        for group, strip, row, column, word in T.grid(g, strips, rows, columns // lanes, words):
            with T.sblock("matmul"):
                vg, vs, vr, vc, vk = T.axis.remap("SSSSR", [group, strip, row, column, word])
                first = T.meta_var(vc * lanes)
                T.reads(x[vg, vr, vk], w[vs, vk, first : first + lanes])
                T.writes(acc[vg, vs, vr, first : first + lanes])
                with T.init():
                    acc[vg, vs, vr, _lanes(first, lanes)] = spread(T.float32(0.0), lanes)
                acc[vg, vs, vr, _lanes(first, lanes)] = step(
                    acc[vg, vs, vr, _lanes(first, lanes)], x[vg, vr, vk], w[vs, vk, _lanes(first, lanes)]
                )

    return accumulate


def _accumulate_quantized(kernel: LinearKernel, lanes: int, dot: str | None, signed: bool) -> Callable[..., None]:
    rows, columns, strips, blocks = kernel.rows, kernel.columns, kernel.strips, kernel.in_features // GROUP
    nibbles = kernel.weights == "int4"
    x_words, w_words = GROUP // 4, GROUP // 8 if nibbles else GROUP // 4
    low_nibbles = 0x0F0F0F0F
    # Bytes q + 128 become q, which needs no correction. Nibbles q + 8 are the same signed and unsigned.
    centred = signed and not nibbles

    def step(acc, x, w):
        """acc + the dot product of 4 unsigned bytes of w with 4 signed bytes of x."""
        if centred:
            w = w ^ spread(T.int32(-0x7F7F7F80), lanes)
        if dot:
            return T.call_extern(f"int32x{lanes}", dot, acc, x, w)
        for byte in range(4):
            signed = (x << T.int32(24 - 8 * byte)) >> T.int32(24)
            acc = acc + ((w >> spread(T.int32(8 * byte), lanes)) & spread(T.int32(255), lanes)) * spread(signed, lanes)
        return acc

    def corrected(total, correction):
        return total if centred else total - spread(correction, lanes)

    @T.inline
    def accumulate(x, x_scales, x_corrections, w, w_scales, acc, g):
        for group, strip, row, column, block in T.grid(g, strips, rows, columns // lanes, blocks):
            with T.sblock("matmul"):
                vg, vs, vr, vc, vk = T.axis.remap("SSSSR", [group, strip, row, column, block])
                first = T.meta_var(vc * lanes)
                T.reads(
                    x[vg, vr, vk * x_words : vk * x_words + x_words],
                    x_scales[vg, vr, vk],
                    x_corrections[vg, vr, vk],
                    w[vs, vk * w_words : vk * w_words + w_words, first : first + lanes],
                    w_scales[vs, vk, first : first + lanes],
                )
                T.writes(acc[vg, vs, vr, first : first + lanes])
                with T.init():
                    acc[vg, vs, vr, _lanes(first, lanes)] = spread(T.float32(0.0), lanes)
                dot = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
                dot[_lanes(0, lanes)] = spread(T.int32(0), lanes)
                for word in T.unroll(w_words):
                    if nibbles:
                        dot[_lanes(0, lanes)] = step(
                            dot[_lanes(0, lanes)],
                            x[vg, vr, vk * x_words + word],
                            w[vs, vk * w_words + word, _lanes(first, lanes)] & spread(T.int32(low_nibbles), lanes),
                        )
                        dot[_lanes(0, lanes)] = step(
                            dot[_lanes(0, lanes)],
                            x[vg, vr, vk * x_words + w_words + word],
                            (w[vs, vk * w_words + word, _lanes(first, lanes)] >> spread(T.int32(4), lanes))
                            & spread(T.int32(low_nibbles), lanes),
                        )
                    else:
                        dot[_lanes(0, lanes)] = step(
                            dot[_lanes(0, lanes)],
                            x[vg, vr, vk * x_words + word],
                            w[vs, vk * w_words + word, _lanes(first, lanes)],
                        )
                acc[vg, vs, vr, _lanes(first, lanes)] = acc[vg, vs, vr, _lanes(first, lanes)] + (
                    corrected(
                        _to_float32(dot[_lanes(0, lanes)], lanes) * spread(x_scales[vg, vr, vk], lanes),
                        x_corrections[vg, vr, vk],
                    )
                ) * _to_float32(w_scales[vs, vk, _lanes(first, lanes)], lanes)

    return accumulate


def _lanes(first: tirx.Expr | int, lanes: int) -> tirx.Expr | int:
    """The indices of `lanes` neighbours; TVM has no vectors of one element."""
    return T.ramp(first, 1, lanes) if lanes > 1 else first


def _to_float32(value: tirx.Expr, lanes: int) -> tirx.Expr:
    return T.Cast(vector_type("float32", lanes), value)


_ACCUMULATE: dict[str, Callable[[LinearKernel, int, str | None, bool], Callable[..., None]]] = {
    "float32": _accumulate_plain,
    "float16": _accumulate_plain,
    "bfloat16": _accumulate_plain,
    "bfloat16_pairs": _accumulate_pairs,
    "int8": _accumulate_quantized,
    "int4": _accumulate_quantized,
}
