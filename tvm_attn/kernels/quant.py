"""Activations as the dot product instructions want them: bfloat16 pairs, or 8-bit integers with a scale a group.

The row order inside a word is that of the packed weights; `tvm_attn.kernels.weights` defines it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import Case, row_groups
from tvm_attn.kernels.weights import OFFSETS
from tvm_attn.storage import GROUP, numpy_dtype


def _rounded_bits(value: tirx.Expr) -> tirx.Expr:
    """The bfloat16 nearest to a float32 (ties to even), as the int32 that holds it in the high half."""
    bits = T.reinterpret("int32", value)
    return bits + T.int32(0x7FFF) + ((bits >> T.int32(16)) & T.int32(1))


def rounded_pair(low: tirx.Expr, high: tirx.Expr) -> tirx.Expr:
    """Two float32 expressions, rounded to bfloat16, in one int32 word."""
    return ((_rounded_bits(low) >> T.int32(16)) & T.int32(65535)) | (_rounded_bits(high) & T.int32(-65536))


@dataclass(frozen=True)
class PackPairs:
    """Rounds activations to bfloat16 and pairs element p with element p + K/2.

    Parameters of the function: x (g, R, K) float32, pairs (g, R, K/2) int32.
    """

    family: ClassVar[str] = "pack_pairs"

    width: int
    rows: int
    groups: int | None = None

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`; block "pack"."""
        half, rows, g = self.width // 2, self.rows, row_groups(self.groups)

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

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for width, rows, groups in ((768, 8, 3), (54, 8, 1), (768, 1, 1)):
            kernel = PackPairs(width, rows, groups if rows == 1 else None)
            x = np.random.default_rng(0).standard_normal((groups, rows, width), dtype=np.float32)
            pairs = pair_words(x)
            yield Case(kernel, f"width {width}", (x,), (pairs * 0,), (pairs.astype(np.float64),), nmse=0.0)


def pair_words(x: np.ndarray) -> np.ndarray:
    """The reference of `PackPairs`: float32 (..., K) -> int32 (..., K/2)."""
    bits = x.astype(numpy_dtype("bfloat16")).view(np.uint16).astype(np.uint32)
    half = x.shape[-1] // 2
    return (bits[..., :half] | (bits[..., half:] << 16)).view(np.int32)


@dataclass(frozen=True)
class QuantizeRows:
    """Activations as signed bytes, symmetric, with a scale for every group of G = 32: x = scale * q, q in -127..127.

    Parameters of the function: x (g, R, K) float32, words (g, R, K/4) int32 with 4 bytes each, scales (g, R, K/G)
    float32, corrections (g, R, K/G) float32: scale * offset * sum(q), what the weights' offset adds to a dot product.
    """

    family: ClassVar[str] = "quantize_rows"

    width: int
    rows: int
    weights: str
    groups: int | None = None

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`; block "group", with "largest", "reduce", "words" and "sum" inside."""
        width, rows, g = self.width, self.rows, row_groups(self.groups)
        offset, per_group = OFFSETS[self.weights], GROUP // 4

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
                            byte0 = T.meta_var(_quantized(x[vg, vr, vb * GROUP + vp], peak[0]))
                            byte1 = T.meta_var(_quantized(x[vg, vr, vb * GROUP + vp + per_group], peak[0]))
                            byte2 = T.meta_var(_quantized(x[vg, vr, vb * GROUP + vp + 2 * per_group], peak[0]))
                            byte3 = T.meta_var(_quantized(x[vg, vr, vb * GROUP + vp + 3 * per_group], peak[0]))
                            sums[vp] = byte0 + byte1 + byte2 + byte3
                            words[vg, vr, vb * per_group + vp] = (
                                (byte0 & T.int32(255))
                                | ((byte1 & T.int32(255)) << 8)
                                | ((byte2 & T.int32(255)) << 16)
                                | (byte3 << 24)
                            )
                    total[0] = 0
                    for p in range(per_group):
                        with T.sblock("sum"):
                            vp = T.axis.reduce(per_group, p)
                            total[0] = total[0] + sums[vp]
                    corrections[vg, vr, vb] = scales[vg, vr, vb] * T.Cast("float32", total[0] * offset)

        return quantize_rows

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for width, rows, groups, weights in ((768, 8, 3, "int8"), (96, 8, 1, "int4"), (768, 1, 1, "int8")):
            kernel = QuantizeRows(width, rows, weights, groups if rows == 1 else None)
            x = np.random.default_rng(0).standard_normal((groups, rows, width), dtype=np.float32)
            x[0, 0, :GROUP] = 0.0
            expected = quantize_rows(x, weights)
            outputs = (np.zeros((groups, rows, width // 4), np.int32), *(array * 0 for array in expected[1:]))
            wanted = tuple(array.astype(np.float64) for array in expected)
            yield Case(kernel, f"width {width}", (x,), outputs, wanted, nmse=1e-12)


def _quantized(value: tirx.Expr, reciprocal: tirx.Expr) -> tirx.Expr:
    return T.Cast("int32", T.floor(value * reciprocal + T.float32(0.5)))


def quantize_rows(x: np.ndarray, weights: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reference of `QuantizeRows`: words, scales and corrections of float32 (..., K)."""
    groups = x.reshape(*x.shape[:-1], -1, GROUP)
    peak = np.abs(groups).max(-1)
    reciprocal = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    scales = peak * np.float32(1 / 127)
    q = np.floor(groups * reciprocal[..., None] + np.float32(0.5)).astype(np.int32)
    places = (q & 255).astype(np.uint32).reshape(*q.shape[:-1], 4, GROUP // 4)
    words = places[..., 0, :] | places[..., 1, :] << 8 | places[..., 2, :] << 16 | places[..., 3, :] << 24
    words = np.ascontiguousarray(words).view(np.int32).reshape(*x.shape[:-1], -1)
    return words, scales, scales * (q.sum(-1) * OFFSETS[weights]).astype(np.float32)
