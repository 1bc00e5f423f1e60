"""Token and position embedding, and the choice of the rows that need logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import Case, row_groups
from tvm_attn.kernels.matmul import pack
from tvm_attn.runtime.dtypes import numpy_dtype


@dataclass(frozen=True)
class Embedding:
    """x = wte[token_ids] + wpe[positions]; padding rows (position -1) read position 0.

    The token table is the packed weight of the tied head, (ceil(V/C), E, C), so that it is in memory once.

    Parameters of the function: token_ids (g, R) int32, positions (g, R) int32, wte (ceil(V/C), E, C) dtype,
    wpe (P, E) dtype, x (g, R, E) float32.
    """

    family: ClassVar[str] = "embedding"

    vocabulary: int
    context: int
    width: int
    rows: int
    columns: int
    dtype: str
    groups: int | None = None

    def prim_func(self) -> tirx.PrimFunc:
        """See `Kernel.prim_func`; block "embed"."""
        rows, columns, width, context = self.rows, self.columns, self.width, self.context
        dtype, g, strips = self.dtype, row_groups(self.groups), -(-self.vocabulary // self.columns)

        @T.prim_func(s_tir=True)
        def embedding(
            token_ids_handle: T.handle,
            positions_handle: T.handle,
            wte: T.Buffer((strips, width, columns), dtype),
            wpe: T.Buffer((context, width), dtype),
            x_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            token_ids = T.match_buffer(token_ids_handle, (g, rows), "int32")
            positions = T.match_buffer(positions_handle, (g, rows), "int32")
            x = T.match_buffer(x_handle, (g, rows, width), "float32")
            for group, row, column in T.grid(g, rows, width):
                with T.sblock("embed"):
                    vg, vr, vc = T.axis.remap("SSS", [group, row, column])
                    T.reads(token_ids[vg, vr], positions[vg, vr], wte[0:strips, vc, 0:columns], wpe[0:context, vc])
                    T.writes(x[vg, vr, vc])
                    x[vg, vr, vc] = T.Cast(
                        "float32", wte[token_ids[vg, vr] // columns, vc, token_ids[vg, vr] % columns]
                    ) + T.Cast("float32", wpe[T.max(positions[vg, vr], 0), vc])

        return embedding

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        rng = np.random.default_rng(0)
        for kernel, groups, name in (
            (Embedding(1021, 64, 128, 8, 32, "float32"), 3, "odd vocabulary"),
            (Embedding(1021, 64, 128, 8, 32, "float16"), 3, "odd vocabulary"),
            (Embedding(1021, 64, 128, 8, 32, "bfloat16"), 3, "odd vocabulary"),
            (Embedding(1021, 64, 77, 1, 32, "float32", groups=1), 1, "one row, odd width"),
        ):
            dtype = numpy_dtype(kernel.dtype)
            wte = rng.standard_normal((kernel.vocabulary, kernel.width), dtype=np.float32).astype(dtype)
            wpe = rng.standard_normal((kernel.context, kernel.width), dtype=np.float32).astype(dtype)
            shape = (groups, kernel.rows)
            token_ids = rng.integers(0, kernel.vocabulary, shape, dtype=np.int32)
            token_ids.flat[0] = kernel.vocabulary - 1
            positions = rng.integers(0, kernel.context, shape, dtype=np.int32)
            if positions.size > 1:
                positions.flat[-1] = -1
            expected = wte.astype(np.float64)[token_ids] + wpe.astype(np.float64)[np.maximum(positions, 0)]
            inputs = (token_ids, positions, pack(np.ascontiguousarray(wte.T), kernel.columns), wpe)
            yield Case(kernel, name, inputs, (np.zeros((*shape, kernel.width), np.float32),), (expected,))


@dataclass(frozen=True)
class GatherRows:
    """y = x[indices]: the rows whose logits are wanted, e.g. the last one of each prompt.

    Parameters of the function: x (g, R, E) float32, indices (q, R) int32 into the g * R rows, y (q, R, E) float32.
    """

    family: ClassVar[str] = "gather_rows"

    width: int
    rows: int

    def prim_func(self) -> tirx.PrimFunc:
        """See `Kernel.prim_func`; block "gather"."""
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
