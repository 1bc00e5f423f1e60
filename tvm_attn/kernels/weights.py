"""How weights lie in memory: canonical in an artifact, packed for the inner loop on a device.

Every packed format is cut into strips of C columns, so that the inner loop reads C neighbours with unit stride.

| format | canonical (K, N) | packed | what a word holds | |---|---|---|---| | float32, float16, bfloat16 | the dtype
| (N/C, K, C) of the dtype | - | | bfloat16_pairs | bfloat16 | (N/C, K/2, C) int32 | rows p and p + K/2: one step of a
bfloat16 dot product | | int8 | int8, scales float16 (K/G, N) | (N/C, K/4, C) int32, scales (N/C, K/G, C) | 4 rows of
a group, as unsigned bytes | | int4 | uint8 (K/2, N), scales as above | (N/C, K/8, C) int32, scales | 8 rows of a
group, as nibbles |

G = 32 rows share a scale; quantization is symmetric, ``weight = scale * q`` with q in -127..127 or -7..7. Bytes hold
q + 128 and nibbles q + 8, because the dot product instructions multiply unsigned by signed bytes. Word p of a group has
row ``8 j + p`` in byte j; of two nibbles of a byte the low one belongs to word p, the high one to word p + 4.
Embedding tables are stored (N, K), "transposed", with their scales (N, K/G).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import Case
from tvm_attn.quantization import quantize, to_nibbles
from tvm_attn.storage import GROUP, numpy_dtype

PLAIN = ("float32", "float16", "bfloat16")
OFFSETS = {"int8": 128, "int4": 8}
"""What is added to a quantized weight to make it unsigned."""
_ROWS_PER_WORD = {"bfloat16_pairs": 2, "int8": 4, "int4": 8}


def strip_columns(out_features: int, preferred: int) -> int:
    """The widest strip of at most `preferred` (a power of two) columns that divides `out_features`."""
    columns = preferred
    while out_features % columns:
        columns //= 2
    return columns


def packed_types(weights: str, k: int, n: int, columns: int) -> list[tuple[tuple[int, int, int], str]]:
    """Shape and dtype of each tensor of a packed (K, N) weight."""
    strips = -(-n // columns)
    if weights in PLAIN:
        return [((strips, k, columns), weights)]
    words = ((strips, k // _ROWS_PER_WORD[weights], columns), "int32")
    return [words] if weights == "bfloat16_pairs" else [words, ((strips, k // GROUP, columns), "float16")]


def low_half(word: tirx.Expr) -> tirx.Expr:
    """The bfloat16 in the low half of an int32 word, as float32."""
    return T.reinterpret("float32", word << T.int32(16))


def high_half(word: tirx.Expr) -> tirx.Expr:
    """The bfloat16 in the high half of an int32 word, as float32."""
    return T.reinterpret("float32", word & T.int32(-65536))


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
        # No T.Select: TVM simplifies `row % half` by the condition inside each of its branches, and then reads both.
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


# ---- references ----


def pack(weight: np.ndarray, columns: int) -> np.ndarray:
    """The reference of `PackPlain`: (K, N) -> (ceil(N/C), K, C), zeros past N."""
    k, n = weight.shape
    strips = -(-n // columns)
    padded = np.zeros((k, strips * columns), weight.dtype)
    padded[:, :n] = weight
    return np.ascontiguousarray(padded.reshape(k, strips, columns).transpose(1, 0, 2))


def pack_words(weight: np.ndarray, weights: str, columns: int) -> np.ndarray:
    """The reference of `PackWords`: bfloat16 (K, N), or int8 values (K, N), as packed int32 words."""
    strips = pack(weight, columns)
    count, k, _ = strips.shape
    if weights == "bfloat16_pairs":
        bits = strips.view(np.uint16).astype(np.uint32)
        return (bits[:, : k // 2] | (bits[:, k // 2 :] << 16)).view(np.int32)
    unsigned = (strips.astype(np.int32) + OFFSETS[weights]).astype(np.uint32)
    places = unsigned.reshape(count, k // GROUP, 4, 8, columns)  # group, byte, word
    words = places[:, :, 0] | places[:, :, 1] << 8 | places[:, :, 2] << 16 | places[:, :, 3] << 24
    if weights == "int4":
        words = words[:, :, :4] | (words[:, :, 4:] << 4)
    return np.ascontiguousarray(words).reshape(count, -1, columns).view(np.int32)


# ---- kernels, which run once, when an artifact is loaded ----


@dataclass(frozen=True)
class PackPlain:
    """(K, N) -> (ceil(N/C), K, C), zeros past N.

    Parameters of the function: weight (K, N) dtype, or (N, K) where `transposed`, packed (ceil(N/C), K, C) dtype.
    """

    family: ClassVar[str] = "pack_plain"

    in_features: int
    out_features: int
    columns: int
    dtype: str
    transposed: bool = False

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`; block "pack"."""
        columns, k, n, dtype = self.columns, self.in_features, self.out_features, self.dtype
        transposed, strips = self.transposed, -(-self.out_features // self.columns)
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

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        rng = np.random.default_rng(0)
        for dtype in PLAIN:
            for transposed, n in ((False, 96), (True, 96), (True, 1021)):
                kernel = PackPlain(48, n, 32, dtype, transposed)
                weight = rng.standard_normal((48, n), dtype=np.float32).astype(numpy_dtype(dtype))
                packed = pack(weight, 32)
                given = np.ascontiguousarray(weight.T) if transposed else weight
                name = f"{n} columns" + (", transposed" if transposed else "")
                yield Case(kernel, name, (given,), (packed * 0,), (packed.astype(np.float64),), nmse=0.0)


@dataclass(frozen=True)
class PackWords:
    """Canonical bfloat16, int8 or int4 weights as packed int32 words; zeros past N.

    Parameters of the function: weight (K, N) bfloat16, (K, N) int8 or (K/2, N) uint8, or its transpose where
    `transposed`; packed as `packed_types` says.
    """

    family: ClassVar[str] = "pack_words"

    in_features: int
    out_features: int
    columns: int
    weights: str
    transposed: bool = False

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`; block "pack"."""
        columns, k, n, weights, transposed = (
            self.columns,
            self.in_features,
            self.out_features,
            self.weights,
            self.transposed,
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

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        rng = np.random.default_rng(0)
        for weights in ("bfloat16_pairs", "int8", "int4"):
            for transposed, n in ((False, 96), (True, 1021)):
                kernel = PackWords(64, n, 32, weights, transposed)
                weight = rng.standard_normal((64, n), dtype=np.float32)
                if weights == "bfloat16_pairs":
                    canonical = stored = weight.astype(numpy_dtype("bfloat16"))
                else:
                    canonical, _ = quantize(weight, weights)
                    stored = to_nibbles(canonical) if weights == "int4" else canonical
                packed = pack_words(canonical, weights, 32)
                given = np.ascontiguousarray(stored.T) if transposed else stored
                name = f"{weights}, {n} columns" + (", transposed" if transposed else "")
                yield Case(kernel, name, (given,), (packed * 0,), (packed.astype(np.float64),), nmse=0.0)


def random_case(kernel: PackPlain | PackWords) -> Case:
    """A case with a random weight, of the sizes that a search measures."""
    weight = np.random.default_rng(0).standard_normal((kernel.in_features, kernel.out_features), dtype=np.float32)
    if isinstance(kernel, PackPlain):
        stored = weight.astype(numpy_dtype(kernel.dtype))
        packed = pack(stored, kernel.columns)
    elif kernel.weights == "bfloat16_pairs":
        stored = weight.astype(numpy_dtype("bfloat16"))
        packed = pack_words(stored, kernel.weights, kernel.columns)
    else:
        values, _ = quantize(weight, kernel.weights)
        stored = to_nibbles(values) if kernel.weights == "int4" else values
        packed = pack_words(values, kernel.weights, kernel.columns)
    given = np.ascontiguousarray(stored.T) if kernel.transposed else stored
    return Case(kernel, "whole weight", (given,), (packed * 0,), (packed.astype(np.float64),), nmse=0.0)
