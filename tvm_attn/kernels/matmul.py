"""Linear layers: packed weights, a register tile of R x C accumulators, and a fused epilogue.

Weights are packed into strips of C columns, (N/C, K, C), so that the inner loop reads them with unit stride;
`PackLinear` makes that layout from the canonical one when an artifact is loaded. The product accumulates in float32
whatever the storage dtype.

Four kernels differ in their epilogue only and share a schedule template: `Linear` (bias, activation),
`ResidualLinear` (bias, residual), `QKVLinear` (bias, split, cache write) and `Head` (none). What they will not do:
pad. C divides N (`strip_columns`), except for the head, whose output keeps the padded columns (zeros) and whose
readers know the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.activation import EXPRESSIONS, REFERENCES
from tvm_attn.kernels.base import Case, row_groups
from tvm_attn.runtime.dtypes import numpy_dtype


def strip_columns(out_features: int, preferred: int) -> int:
    """The widest strip of at most `preferred` (a power of two) columns that divides `out_features`."""
    columns = preferred
    while out_features % columns:
        columns //= 2
    return columns


def pack(weight: np.ndarray, columns: int) -> np.ndarray:
    """The reference of `PackLinear`: (K, N) -> (ceil(N/C), K, C), zeros past N."""
    k, n = weight.shape
    strips = -(-n // columns)
    padded = np.zeros((k, strips * columns), weight.dtype)
    padded[:, :n] = weight
    return np.ascontiguousarray(padded.reshape(k, strips, columns).transpose(1, 0, 2))


@T.inline
def _accumulate(x, w, acc, groups, strips, rows, columns, features):
    """acc (g, N/C, R, C) = x (g, R, K) times w (N/C, K, C), the block that templates look for as "matmul"."""
    for group, strip, row, column, k in T.grid(groups, strips, rows, columns, features):
        with T.sblock("matmul"):
            vg, vs, vr, vc, vk = T.axis.remap("SSSSR", [group, strip, row, column, k])
            with T.init():
                acc[vg, vs, vr, vc] = T.float32(0.0)
            acc[vg, vs, vr, vc] = acc[vg, vs, vr, vc] + x[vg, vr, vk] * T.Cast("float32", w[vs, vk, vc])


@dataclass(frozen=True)
class _Matmul:
    """The static sizes that all linear kernels share.

    Attributes:
        in_features: K.
        out_features: N.
        rows: R, the rows of a group.
        columns: C, the columns of a weight strip.
        dtype: storage dtype of the weights.
        groups: a static number of row groups, or None for a symbolic one.
    """

    in_features: int
    out_features: int
    rows: int
    columns: int
    dtype: str
    groups: int | None = None

    @property
    def strips(self) -> int:
        """Number of weight strips, ceil(N / C)."""
        return -(-self.out_features // self.columns)


@dataclass(frozen=True)
class Linear(_Matmul):
    """y = activation(x W + b).

    Parameters of the function: x (g, R, K) float32, w (N/C, K, C) dtype, b (N,) float32, y (g, R, N) float32.
    """

    family: ClassVar[str] = "linear"
    activation: str | None = None

    def prim_func(self) -> tirx.PrimFunc:
        """See `Kernel.prim_func`; blocks "matmul" and "epilogue"."""
        rows, columns, strips, k, n = self.rows, self.columns, self.strips, self.in_features, self.out_features
        dtype, g = self.dtype, row_groups(self.groups)
        activation = EXPRESSIONS[self.activation] if self.activation else lambda value: value

        @T.prim_func(s_tir=True)
        def linear(
            x_handle: T.handle,
            w: T.Buffer((strips, k, columns), dtype),
            b: T.Buffer((n,), "float32"),
            y_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_handle, (g, rows, k), "float32")
            y = T.match_buffer(y_handle, (g, rows, n), "float32")
            acc = T.sblock_alloc_buffer((g, strips, rows, columns), "float32")
            _accumulate(x, w, acc, g, strips, rows, columns, k)
            for group, strip, row, column in T.grid(g, strips, rows, columns):
                with T.sblock("epilogue"):
                    vg, vs, vr, vc = T.axis.remap("SSSS", [group, strip, row, column])
                    y[vg, vr, vs * columns + vc] = activation(acc[vg, vs, vr, vc] + b[vs * columns + vc])

        return linear

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for dtype in ("float32", "float16", "bfloat16"):
            yield _linear_case(Linear(768, 3072, 8, 32, dtype, activation="gelu_new"), 3, "124M MLP")
            yield _linear_case(Linear(768, 96, 1, 32, dtype, groups=1), 1, "one row")
        yield _linear_case(Linear(129, 24, 8, 8, "float32", activation="tanh"), 1, "odd sizes")
        for activation in EXPRESSIONS:
            for scale in (1.0, 100.0):
                kernel = Linear(32, 64, 8, 32, "float32", activation=activation)
                yield _linear_case(kernel, 17, f"{activation}, magnitude {scale:g}", scale)


@dataclass(frozen=True)
class ResidualLinear(_Matmul):
    """y = x W + b + residual.

    Parameters of the function: x (g, R, K) float32, w (N/C, K, C) dtype, b (N,) float32, residual (g, R, N) float32,
    y (g, R, N) float32.
    """

    family: ClassVar[str] = "residual_linear"

    def prim_func(self) -> tirx.PrimFunc:
        """See `Kernel.prim_func`; blocks "matmul" and "epilogue"."""
        rows, columns, strips, k, n = self.rows, self.columns, self.strips, self.in_features, self.out_features
        dtype, g = self.dtype, row_groups(self.groups)

        @T.prim_func(s_tir=True)
        def residual_linear(
            x_handle: T.handle,
            w: T.Buffer((strips, k, columns), dtype),
            b: T.Buffer((n,), "float32"),
            residual_handle: T.handle,
            y_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_handle, (g, rows, k), "float32")
            residual = T.match_buffer(residual_handle, (g, rows, n), "float32")
            y = T.match_buffer(y_handle, (g, rows, n), "float32")
            acc = T.sblock_alloc_buffer((g, strips, rows, columns), "float32")
            _accumulate(x, w, acc, g, strips, rows, columns, k)
            for group, strip, row, column in T.grid(g, strips, rows, columns):
                with T.sblock("epilogue"):
                    vg, vs, vr, vc = T.axis.remap("SSSS", [group, strip, row, column])
                    y[vg, vr, vs * columns + vc] = (
                        acc[vg, vs, vr, vc] + b[vs * columns + vc] + residual[vg, vr, vs * columns + vc]
                    )

        return residual_linear

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for dtype in ("float32", "float16", "bfloat16"):
            yield _linear_case(ResidualLinear(3072, 768, 8, 32, dtype), 2, "124M MLP projection")
            yield _linear_case(ResidualLinear(768, 768, 1, 32, dtype, groups=1), 1, "one row")
        yield _linear_case(ResidualLinear(77, 33, 8, 1, "float32"), 5, "odd sizes")


@dataclass(frozen=True)
class Head(_Matmul):
    """logits = x W, without bias; columns past the vocabulary are zero.

    Parameters of the function: x (g, R, K) float32, w (ceil(V/C), K, C) dtype, logits (g, R, ceil(V/C) * C) float32.
    """

    family: ClassVar[str] = "head"

    def prim_func(self) -> tirx.PrimFunc:
        """See `Kernel.prim_func`; blocks "matmul" and "epilogue"."""
        rows, columns, strips, k = self.rows, self.columns, self.strips, self.in_features
        dtype, g = self.dtype, row_groups(self.groups)

        @T.prim_func(s_tir=True)
        def head(x_handle: T.handle, w: T.Buffer((strips, k, columns), dtype), logits_handle: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_handle, (g, rows, k), "float32")
            logits = T.match_buffer(logits_handle, (g, rows, strips * columns), "float32")
            acc = T.sblock_alloc_buffer((g, strips, rows, columns), "float32")
            _accumulate(x, w, acc, g, strips, rows, columns, k)
            for group, strip, row, column in T.grid(g, strips, rows, columns):
                with T.sblock("epilogue"):
                    vg, vs, vr, vc = T.axis.remap("SSSS", [group, strip, row, column])
                    logits[vg, vr, vs * columns + vc] = acc[vg, vs, vr, vc]

        return head

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for dtype in ("float32", "float16", "bfloat16"):
            yield _linear_case(Head(128, 1021, 8, 32, dtype), 2, "odd vocabulary")
            yield _linear_case(Head(128, 1021, 1, 32, dtype, groups=1), 1, "odd vocabulary, one row")


@dataclass(frozen=True)
class QKVLinear(_Matmul):
    """The fused projection of queries, keys and values: q = (x W + b)[:E]; keys and values go into the KV cache.

    N = 3 E = 3 H D. Row (g, R) writes its key and value at `positions` of slot `slots`; a row whose position is -1 is
    padding and writes none.

    Parameters of the function: x (g, R, K) float32, w (N/C, K, C) dtype, b (N,) float32, slots (g, R) int32,
    positions (g, R) int32, cache (S, 2, H, P, D) dtype, updated in place, q (g, R, E) float32.
    """

    family: ClassVar[str] = "qkv_linear"
    heads: int = 1
    context: int = 1
    """P, the positions of a cache slot."""

    def prim_func(self) -> tirx.PrimFunc:
        """See `Kernel.prim_func`; blocks "matmul" and "epilogue"."""
        rows, columns, strips, k, n = self.rows, self.columns, self.strips, self.in_features, self.out_features
        dtype, heads, context, g = self.dtype, self.heads, self.context, row_groups(self.groups)
        width = n // 3
        head_dim = width // heads

        @T.prim_func(s_tir=True)
        def qkv_linear(
            x_handle: T.handle,
            w: T.Buffer((strips, k, columns), dtype),
            b: T.Buffer((n,), "float32"),
            slots_handle: T.handle,
            positions_handle: T.handle,
            cache_handle: T.handle,
            q_handle: T.handle,
        ):
            T.func_attr({"tirx.noalias": True})
            cache_slots = T.int32()
            x = T.match_buffer(x_handle, (g, rows, k), "float32")
            slots = T.match_buffer(slots_handle, (g, rows), "int32")
            positions = T.match_buffer(positions_handle, (g, rows), "int32")
            cache = T.match_buffer(cache_handle, (cache_slots, 2, heads, context, head_dim), dtype)
            q = T.match_buffer(q_handle, (g, rows, width), "float32")
            acc = T.sblock_alloc_buffer((g, strips, rows, columns), "float32")
            _accumulate(x, w, acc, g, strips, rows, columns, k)
            for group, strip, row, column in T.grid(g, strips, rows, columns):
                with T.sblock("epilogue"):
                    vg, vs, vr, vc = T.axis.remap("SSSS", [group, strip, row, column])
                    T.reads(acc[vg, vs, vr, vc], b[vs * columns + vc], slots[vg, vr], positions[vg, vr])
                    T.writes(q[vg, vr, 0:width], cache[0:cache_slots, 0:2, 0:heads, 0:context, 0:head_dim])
                    if vs * columns + vc < width:
                        q[vg, vr, vs * columns + vc] = acc[vg, vs, vr, vc] + b[vs * columns + vc]
                    else:
                        if positions[vg, vr] >= 0:
                            cache[
                                slots[vg, vr],
                                (vs * columns + vc) // width - 1,
                                (vs * columns + vc) % width // head_dim,
                                positions[vg, vr],
                                (vs * columns + vc) % head_dim,
                            ] = T.Cast(dtype, acc[vg, vs, vr, vc] + b[vs * columns + vc])

        return qkv_linear

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for dtype in ("float32", "float16", "bfloat16"):
            yield _qkv_case(QKVLinear(128, 384, 8, 32, dtype, heads=2, context=16), 3, "ragged rows and padding")
            yield _qkv_case(QKVLinear(128, 384, 1, 32, dtype, groups=1, heads=2, context=16), 1, "one row")
        yield _qkv_case(QKVLinear(60, 180, 8, 4, "float32", heads=3, context=5), 2, "head_dim 20")


@dataclass(frozen=True)
class PackLinear:
    """Canonical weight to packed strips: (K, N) -> (ceil(N/C), K, C), zeros past N.

    Parameters of the function: weight (K, N) dtype, or (N, K) where `transposed` (embedding tables are stored so),
    packed (ceil(N/C), K, C) dtype. It runs once, when an artifact is loaded.
    """

    family: ClassVar[str] = "pack_linear"

    in_features: int
    out_features: int
    columns: int
    dtype: str
    transposed: bool = False

    def prim_func(self) -> tirx.PrimFunc:
        """See `Kernel.prim_func`; block "pack"."""
        columns, k, n, dtype = self.columns, self.in_features, self.out_features, self.dtype
        transposed, strips = self.transposed, -(-self.out_features // self.columns)
        shape = (n, k) if transposed else (k, n)

        def element(weight, row, column):
            # Clamped, so that the load past N that the select discards stays inside the tensor.
            index = T.min(column, n - 1)
            value = weight[index, row] if transposed else weight[row, index]
            return value if n % columns == 0 else T.Select(column < n, value, T.Cast(dtype, T.float32(0.0)))

        @T.prim_func(s_tir=True)
        def pack_linear(weight: T.Buffer(shape, dtype), packed: T.Buffer((strips, k, columns), dtype)):
            T.func_attr({"tirx.noalias": True})
            for strip, row, column in T.grid(strips, k, columns):
                with T.sblock("pack"):
                    vs, vk, vc = T.axis.remap("SSS", [strip, row, column])
                    packed[vs, vk, vc] = element(weight, vk, vs * columns + vc)

        return pack_linear

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        rng = np.random.default_rng(0)
        for dtype in ("float32", "float16", "bfloat16"):
            for transposed, n in ((False, 96), (True, 96), (True, 1021)):
                kernel = PackLinear(48, n, 32, dtype, transposed)
                weight = rng.standard_normal((48, n), dtype=np.float32).astype(numpy_dtype(dtype))
                packed = pack(weight, 32)
                given = np.ascontiguousarray(weight.T) if transposed else weight
                name = f"{n} columns" + (", transposed" if transposed else "")
                yield Case(kernel, name, (given,), (packed,), (packed.astype(np.float64),), nmse=0.0)


def _operands(kernel: _Matmul, groups: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, the packed weight, the bias, and x W + b in float64 (rows flattened)."""
    rng = np.random.default_rng(0)
    k, n = kernel.in_features, kernel.out_features
    x = rng.standard_normal((groups, kernel.rows, k), dtype=np.float32) * np.float32(scale)
    weight = (rng.standard_normal((k, n), dtype=np.float32) / np.sqrt(k)).astype(numpy_dtype(kernel.dtype))
    bias = rng.standard_normal(n, dtype=np.float32)
    product = x.reshape(-1, k).astype(np.float64) @ weight.astype(np.float64) + bias
    return x, pack(weight, kernel.columns), bias, product


def _linear_case(kernel: Linear | ResidualLinear | Head, groups: int, name: str, scale: float = 1.0) -> Case:
    x, packed, bias, product = _operands(kernel, groups, scale)
    shape = (groups, kernel.rows, kernel.strips * kernel.columns)
    y = np.zeros(shape, np.float32)
    inputs: tuple[np.ndarray, ...] = (x, packed, bias)
    if isinstance(kernel, ResidualLinear):
        residual = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
        inputs, product = (*inputs, residual), product + residual.reshape(product.shape)
    elif isinstance(kernel, Head):
        product = np.pad(product - bias, ((0, 0), (0, shape[2] - kernel.out_features)))
        inputs = (x, packed)
    elif kernel.activation:
        with np.errstate(over="ignore"):
            product = REFERENCES[kernel.activation](product)
    return Case(kernel, name, inputs, (y,), (product.reshape(shape),))


def _qkv_case(kernel: QKVLinear, groups: int, name: str) -> Case:
    x, packed, bias, product = _operands(kernel, groups, 1.0)
    rng = np.random.default_rng(2)
    width, cache_slots = kernel.out_features // 3, 3
    head_dim = width // kernel.heads
    rows = groups * kernel.rows
    # Every row its own (slot, position); the last row is padding where there is more than one.
    count = min(max(rows - 1, 1), cache_slots * kernel.context)
    slots = np.zeros(rows, np.int32)
    positions = np.full(rows, -1, np.int32)
    places = rng.permutation(cache_slots * kernel.context)[:count]
    slots[:count], positions[:count] = np.divmod(places, kernel.context)
    cache = rng.standard_normal((cache_slots, 2, kernel.heads, kernel.context, head_dim), dtype=np.float32)
    cache = cache.astype(numpy_dtype(kernel.dtype))
    expected = cache.astype(np.float64)
    for row in range(count):
        keys_values = product[row, width:].reshape(2, kernel.heads, head_dim)
        expected[slots[row], :, :, positions[row]] = keys_values
    shape = (groups, kernel.rows)
    q = np.zeros((*shape, width), np.float32)
    inputs = (x, packed, bias, slots.reshape(shape), positions.reshape(shape), cache)
    # The cache is rounded to its storage dtype: half a unit in the last place of 8, 11 or 24 bits.
    nmse = {"float32": 1e-12, "float16": 2.0**-22, "bfloat16": 2.0**-16}[kernel.dtype]
    return Case(kernel, name, inputs, (q,), (expected, product[:, :width].reshape(*shape, width)), (5,), nmse)
