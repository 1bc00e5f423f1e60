"""Packed weights in TensorIR: reading their elements, and the kernels that pack them."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.weights import OFFSETS, PLAIN, PackPlain, PackWords, packed_types
from tvm_attn.storage import GROUP


def spread(value: tirx.Expr, lanes: int) -> tirx.Expr:
    """A vector that repeats a value; TVM has no vectors of one element."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def vector_type(dtype: str, lanes: int) -> str:
    """TVM's name of a vector type."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def low_half(word: tirx.Expr, lanes: int = 1) -> tirx.Expr:
    """The bfloat16 in the low half of an int32 word, or of each word of a vector, as float32."""
    return T.reinterpret(vector_type("float32", lanes), word << spread(T.int32(16), lanes))


def high_half(word: tirx.Expr, lanes: int = 1) -> tirx.Expr:
    """The bfloat16 in the high half of an int32 word, or of each word of a vector, as float32."""
    return T.reinterpret(vector_type("float32", lanes), word & spread(T.int32(-65536), lanes))


def element(
    weights: str,
    packed: list[tirx.Buffer],
    features: int,
    strip: tirx.Expr,
    row: tirx.Expr,
    column: tirx.Expr,
) -> tirx.Expr:
    """One element of a packed weight with K = `features`, as float32."""
    words = packed[0]
    if weights in PLAIN:
        return T.Cast("float32", words[strip, row, column])
    if weights == "bfloat16_pairs":
        half = features // 2
        word = words[strip, row % half, column]
        # Not T.Select: TVM simplifies `row % half` with the condition inside each branch, and then reads both.
        return high_half(word << (T.int32(16) - row // half * T.int32(16)))
    group, place = row // GROUP, row % GROUP
    byte, word_index = place // 8, place % 8
    if weights == "int8":
        word, shift, mask = words[strip, group * 8 + word_index, column], byte * 8, 255
    else:
        word = words[strip, group * 4 + word_index % 4, column]
        shift, mask = byte * 8 + word_index // 4 * 4, 15
    value = ((word >> shift) & T.int32(mask)) - T.int32(OFFSETS[weights])
    return T.Cast("float32", value) * T.Cast("float32", packed[1][strip, group, column])


def pack_plain(kernel: PackPlain) -> tirx.PrimFunc:
    """Block "pack"."""
    columns, k, n, dtype = kernel.columns, kernel.in_features, kernel.out_features, kernel.dtype
    transposed, strips = kernel.transposed, -(-kernel.out_features // kernel.columns)
    shape = (n, k) if transposed else (k, n)

    def value(weight, row, column):
        inside = weight[column, row] if transposed else weight[row, column]
        return inside if n % columns == 0 else T.if_then_else(column < n, inside, T.Cast(dtype, T.float32(0.0)))

    @T.prim_func(s_tir=True)
    def pack_plain(weight: T.Buffer(shape, dtype), packed: T.Buffer((strips, k, columns), dtype)):
        T.func_attr({"tirx.noalias": True})
        for strip, row, column in T.grid(strips, k, columns):
            with T.sblock("pack"):
                vs, vk, vc = T.axis.remap("SSS", [strip, row, column])
                packed[vs, vk, vc] = value(weight, vk, vs * columns + vc)

    return pack_plain


def pack_words(kernel: PackWords) -> tirx.PrimFunc:
    """Block "pack"."""
    columns, k, n, weights, transposed = (
        kernel.columns,
        kernel.in_features,
        kernel.out_features,
        kernel.weights,
        kernel.transposed,
    )
    (packed_shape, _), *_ = packed_types(weights, k, n, columns)
    strips, words, _ = packed_shape
    stored_rows = k // 2 if weights == "int4" else k
    shape = (n, stored_rows) if transposed else (stored_rows, n)
    dtype = {"bfloat16_pairs": "bfloat16", "int8": "int8", "int4": "uint8"}[weights]

    def bits(weight, row, column):
        """The unsigned value of one row, int32; the neutral value past N."""
        if weights == "bfloat16_pairs":
            stored = weight[column, row] if transposed else weight[row, column]
            value, neutral = T.Cast("int32", T.reinterpret("uint16", stored)), 0
        elif weights == "int8":
            stored = weight[column, row] if transposed else weight[row, column]
            value, neutral = T.Cast("int32", stored) + T.int32(128), 128
        else:
            stored = weight[column, row // 2] if transposed else weight[row // 2, column]
            value, neutral = (T.Cast("int32", stored) >> (row % 2 * 4)) & T.int32(15), 8
        return value if n % columns == 0 else T.if_then_else(column < n, value, T.int32(neutral))

    def word(weight, index, column):
        if weights == "bfloat16_pairs":
            return bits(weight, index, column) | (bits(weight, index + k // 2, column) << 16)
        per_group = 8 if weights == "int8" else 4
        group, place = index // per_group, index % per_group
        value = T.int32(0)
        for byte in range(4):
            value = value | (bits(weight, group * GROUP + byte * 8 + place, column) << (8 * byte))
            if weights == "int4":
                value = value | (bits(weight, group * GROUP + byte * 8 + place + 4, column) << (8 * byte + 4))
        return value

    @T.prim_func(s_tir=True)
    def pack_words(weight: T.Buffer(shape, dtype), packed: T.Buffer(packed_shape, "int32")):
        T.func_attr({"tirx.noalias": True})
        for strip, row, column in T.grid(strips, words, columns):
            with T.sblock("pack"):
                vs, vk, vc = T.axis.remap("SSS", [strip, row, column])
                packed[vs, vk, vc] = word(weight, vk, vs * columns + vc)

    return pack_words
