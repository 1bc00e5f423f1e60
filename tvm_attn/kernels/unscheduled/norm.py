"""LayerNorm in TensorIR: two passes over a row, the second from cache."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import row_groups
from tvm_attn.kernels.norm import LayerNorm


def layer_norm(kernel: LayerNorm) -> tirx.PrimFunc:
    """Blocks "sum", "squares" and "normalize"."""
    width, rows, g = kernel.width, kernel.rows, row_groups(kernel.groups)
    epsilon, scale = kernel.epsilon, 1.0 / kernel.width

    @T.prim_func(s_tir=True)
    def layer_norm(
        x_handle: T.handle,
        gamma: T.Buffer((width,), "float32"),
        beta: T.Buffer((width,), "float32"),
        y_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_handle, (g, rows, width), "float32")
        y = T.match_buffer(y_handle, (g, rows, width), "float32")
        total = T.sblock_alloc_buffer((g, rows), "float32")
        squares = T.sblock_alloc_buffer((g, rows), "float32")
        for group, row, column in T.grid(g, rows, width):
            with T.sblock("sum"):
                vg, vr, vc = T.axis.remap("SSR", [group, row, column])
                with T.init():
                    total[vg, vr] = T.float32(0.0)
                total[vg, vr] = total[vg, vr] + x[vg, vr, vc]
        for group, row, column in T.grid(g, rows, width):
            with T.sblock("squares"):
                vg, vr, vc = T.axis.remap("SSR", [group, row, column])
                with T.init():
                    squares[vg, vr] = T.float32(0.0)
                squares[vg, vr] = squares[vg, vr] + (x[vg, vr, vc] - total[vg, vr] * T.float32(scale)) * (
                    x[vg, vr, vc] - total[vg, vr] * T.float32(scale)
                )
        for group, row, column in T.grid(g, rows, width):
            with T.sblock("normalize"):
                vg, vr, vc = T.axis.remap("SSS", [group, row, column])
                y[vg, vr, vc] = (x[vg, vr, vc] - total[vg, vr] * T.float32(scale)) * (
                    T.float32(1.0) / T.sqrt(squares[vg, vr] * T.float32(scale) + T.float32(epsilon))
                ) * gamma[vc] + beta[vc]

    return layer_norm
