"""Embedding and row gather in TensorIR."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import row_groups, without_unused
from tvm_attn.kernels.embedding import Embedding, GatherRows
from tvm_attn.kernels.unscheduled.weights import element
from tvm_attn.kernels.weights import packed_types


def embedding(kernel: Embedding) -> tirx.PrimFunc:
    """Block "embed"."""
    rows, columns, width, context = kernel.rows, kernel.columns, kernel.width, kernel.context
    dtype, weights, g = kernel.dtype, kernel.weights, row_groups(kernel.groups)
    types = packed_types(weights, width, kernel.vocabulary, columns)

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
                # A row without a token, whose logits were not numbers, has id -1.
                x[vg, vr, vc] = token(wte, scales, T.max(token_ids[vg, vr], 0), vc) + T.Cast(
                    "float32", wpe[T.max(positions[vg, vr], 0), vc]
                )

    return without_unused(embedding)


def gather_rows(kernel: GatherRows) -> tirx.PrimFunc:
    """Block "gather"."""
    rows, width = kernel.rows, kernel.width

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
