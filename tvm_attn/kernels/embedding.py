"""Token and position embedding, and the choice of the rows that need logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import Case, row_groups, without_unused
from tvm_attn.kernels.weights import PLAIN, element, pack, pack_words, packed_types
from tvm_attn.quantization import dequantize, quantize
from tvm_attn.storage import numpy_dtype


@dataclass(frozen=True)
class Embedding:
    """x = wte[token_ids] + wpe[positions]; padding rows (position -1) read position 0.

    The token table is the packed weight of the tied head, with K = E and N = V, so that it is in memory once.

    Parameters of the function: token_ids (g, R) int32, positions (g, R) int32, wte (one or two tensors, see
    `tvm_attn.kernels.weights`), wpe (P, E) dtype, x (g, R, E) float32.
    """

    family: ClassVar[str] = "embedding"

    vocabulary: int
    context: int
    width: int
    rows: int
    columns: int
    weights: str
    dtype: str
    """Of wpe."""
    groups: int | None = None

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`; block "embed"."""
        rows, columns, width, context = self.rows, self.columns, self.width, self.context
        dtype, weights, g = self.dtype, self.weights, row_groups(self.groups)
        types = packed_types(weights, width, self.vocabulary, columns)

        scaled = len(types) == 2

        def token(wte, scales, token_id, column):
            return element(weights, [wte, scales], width, token_id // columns, column, token_id % columns)

        @T.prim_func(s_tir=True)
        def embedding(
            token_ids_handle: T.handle,
            positions_handle: T.handle,
            wte: T.Buffer(types[0][0], types[0][1]),
            scales_handle: T.handle,
            wpe: T.Buffer((context, width), dtype),
            x_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            token_ids = T.match_buffer(token_ids_handle, (g, rows), "int32")
            positions = T.match_buffer(positions_handle, (g, rows), "int32")
            scales = T.meta_var(T.match_buffer(scales_handle, types[1][0], types[1][1]) if scaled else None)
            x = T.match_buffer(x_handle, (g, rows, width), "float32")
            for group, row, column in T.grid(g, rows, width):
                with T.sblock("embed"):
                    vg, vr, vc = T.axis.remap("SSS", [group, row, column])
                    x[vg, vr, vc] = token(wte, scales, token_ids[vg, vr], vc) + T.Cast(
                        "float32", wpe[T.max(positions[vg, vr], 0), vc]
                    )

        return without_unused(embedding)

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for weights, dtype in (*zip(PLAIN, PLAIN, strict=True), ("bfloat16_pairs", "bfloat16"), ("int8", "float32")):
            yield _embedding_case(Embedding(1021, 64, 128, 8, 32, weights, dtype), 3, "odd vocabulary")
        yield _embedding_case(Embedding(1021, 64, 128, 8, 32, "int4", "float16"), 3, "odd vocabulary")
        yield _embedding_case(Embedding(1021, 64, 77, 1, 32, "float32", "float32", groups=1), 1, "one row, odd width")


def _embedding_case(kernel: Embedding, groups: int, name: str) -> Case:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((kernel.width, kernel.vocabulary), dtype=np.float32)
    if kernel.weights in PLAIN:
        values = table.astype(numpy_dtype(kernel.weights))
        packed: tuple[np.ndarray, ...] = (pack(values, kernel.columns),)
    elif kernel.weights == "bfloat16_pairs":
        values = table.astype(numpy_dtype("bfloat16"))
        packed = (pack_words(values, kernel.weights, kernel.columns),)
    else:
        quantized, scales = quantize(table, kernel.weights)
        values = dequantize(quantized, scales)
        packed = (pack_words(quantized, kernel.weights, kernel.columns), pack(scales, kernel.columns))
    wpe = rng.standard_normal((kernel.context, kernel.width), dtype=np.float32).astype(numpy_dtype(kernel.dtype))
    shape = (groups, kernel.rows)
    token_ids = rng.integers(0, kernel.vocabulary, shape, dtype=np.int32)
    token_ids.flat[0] = kernel.vocabulary - 1
    positions = rng.integers(0, kernel.context, shape, dtype=np.int32)
    if positions.size > 1:
        positions.flat[-1] = -1
    expected = values.astype(np.float64).T[token_ids] + wpe.astype(np.float64)[np.maximum(positions, 0)]
    output = np.zeros((*shape, kernel.width), np.float32)
    return Case(kernel, name, (token_ids, positions, *packed, wpe), (output,), (expected,))


@dataclass(frozen=True)
class GatherRows:
    """y = x[indices]: the rows whose logits are wanted, e.g. the last one of each prompt.

    Parameters of the function: x (g, R, E) float32, indices (q, R) int32 into the g * R rows, y (q, R, E) float32.
    """

    family: ClassVar[str] = "gather_rows"

    width: int
    rows: int

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`; block "gather"."""
        rows, width = self.rows, self.width

        @T.prim_func(s_tir=True)
        def gather_rows(x_handle: T.handle, indices_handle: T.handle, y_handle: T.handle):
            T.func_attr({"tirx.noalias": True})
            g = T.int32()
            q = T.int32()
            x = T.match_buffer(x_handle, (g, rows, width), "float32")
            indices = T.match_buffer(indices_handle, (q, rows), "int32")
            y = T.match_buffer(y_handle, (q, rows, width), "float32")
            for group, row, column in T.grid(q, rows, width):
                with T.sblock("gather"):
                    vg, vr, vc = T.axis.remap("SSS", [group, row, column])
                    T.reads(indices[vg, vr], x[0:g, 0:rows, vc])
                    T.writes(y[vg, vr, vc])
                    y[vg, vr, vc] = x[indices[vg, vr] // rows, indices[vg, vr] % rows, vc]

        return gather_rows

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        rng = np.random.default_rng(0)
        for width, groups, wanted in ((96, 5, 2), (77, 1, 1)):
            kernel = GatherRows(width, 8)
            x = rng.standard_normal((groups, 8, width), dtype=np.float32)
            indices = rng.integers(0, groups * 8, (wanted, 8), dtype=np.int32)
            expected = x.reshape(-1, width)[indices].astype(np.float64)
            y = np.zeros((wanted, 8, width), np.float32)
            yield Case(kernel, f"width {width}", (x, indices), (y,), (expected,), nmse=0.0)
