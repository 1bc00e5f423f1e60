"""LayerNorm (Ba et al., 2016, arXiv:1607.06450) over the last dimension, in float32.

Two passes over a row that is in cache: the variance is the mean of squared distances from the mean, which does not
cancel as E[x^2] - E[x]^2 does. The residual sum before it is the epilogue of `ResidualLinear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.base import Case, row_groups


@dataclass(frozen=True)
class LayerNorm:
    """y = (x - mean) / sqrt(variance + epsilon) * gamma + beta.

    Parameters of the function: x (g, R, E) float32, gamma (E,) float32, beta (E,) float32, y (g, R, E) float32.
    """

    family: ClassVar[str] = "layer_norm"

    width: int
    epsilon: float
    rows: int
    groups: int | None = None

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`; blocks "sum", "squares" and "normalize"."""
        width, rows, g = self.width, self.rows, row_groups(self.groups)
        epsilon, scale = self.epsilon, 1.0 / self.width

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

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for kernel, groups, name, offset, scale in (
            (LayerNorm(768, 1e-5, 8), 3, "124M", 0.0, 1.0),
            (LayerNorm(768, 1e-5, 1, groups=1), 1, "one row", 0.0, 1.0),
            (LayerNorm(768, 1e-5, 8, groups=1), 1, "one group", 0.0, 1.0),
            (LayerNorm(1600, 1e-5, 8), 2, "1.5B", 0.0, 1.0),
            (LayerNorm(37, 1e-6, 8), 2, "odd width", 0.0, 1.0),
            (LayerNorm(64, 1e-5, 8), 1, "large values", 0.0, 1e4),
            (LayerNorm(64, 1e-5, 8), 1, "mean far from zero", 100.0, 1.0),
            (LayerNorm(64, 1e-5, 8), 1, "constant rows", 3.0, 0.0),
        ):
            rng = np.random.default_rng(0)
            shape = (groups, kernel.rows, kernel.width)
            x = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale) + np.float32(offset)
            gamma, beta = rng.standard_normal((2, kernel.width), dtype=np.float32)
            wide = x.astype(np.float64)
            centred = wide - wide.mean(-1, keepdims=True)
            expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + kernel.epsilon) * gamma + beta
            # The mean itself is rounded to float32, which moves every element by up to offset * 2**-24.
            nmse = max(1e-12, (offset * 2.0**-24) ** 2)
            yield Case(kernel, name, (x, gamma, beta), (np.zeros(shape, np.float32),), (expected,), nmse=nmse)
