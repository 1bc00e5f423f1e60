"""Linear layers: packed weights, a register tile of R x C accumulators, and a fused epilogue.

Four kernels share one function and differ in their epilogue: `Linear` (bias, activation), `ResidualLinear` (bias,
residual), `QKVLinear` (bias, split, cache write) and `Head` (none). Each takes its weight in any format of
`tvm_attn.kernels.weights`, and its input x as that format wants it:

| weights | x | products |
|---|---|---|
| float32, float16, bfloat16 | x (g, R, K) float32 | float32 multiply and add |
| bfloat16_pairs | pairs (g, R, K/2) int32, see `PackPairs` | two bfloat16 products a step, float32 sum |
| int8, int4 | words, scales and corrections, see `QuantizeRows` | four 8-bit products a step, int32 sum in a group |

Sums over groups and everything after them are float32. What these kernels will not do: pad. C divides N
(`strip_columns`), except for the head, whose output keeps the padded columns and whose readers know the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from tvm_attn.kernels.activation import EXPRESSIONS, REFERENCES
from tvm_attn.kernels.base import Case, row_groups, without_unused
from tvm_attn.kernels.quant import pair_words, quantize_rows
from tvm_attn.kernels.weights import (
    PLAIN,
    high_half,
    low_half,
    pack,
    pack_words,
    packed_types,
)
from tvm_attn.quantization import dequantize, quantize
from tvm_attn.storage import GROUP, numpy_dtype

DOT_BFLOAT16, DOT_INT8 = "tvm_attn_dot_bfloat16", "tvm_attn_dot_int8"
"""Functions that a template imports for `native` kernels: (acc, x word, w words) -> acc, over a vector of columns; the
names end in the number of columns, e.g. "_16"."""


@dataclass(frozen=True)
class _Matmul:
    """The static sizes that all linear kernels share.

    Attributes:
        in_features: K.
        out_features: N.
        rows: R, the rows of a group.
        columns: C, the columns of a weight strip.
        weights: format of the weight.
        groups: a static number of row groups, or None for a symbolic one.
        lanes: columns of one dot product step, a divisor of C; plain formats do not use it.
        native: whether the step is the hardware's instruction instead of shifts, masks and multiplications.
    """

    in_features: int
    out_features: int
    rows: int
    columns: int
    weights: str
    groups: int | None = None
    lanes: int = 1
    native: bool = False

    has_bias: ClassVar[bool] = True

    @property
    def strips(self) -> int:
        """Number of weight strips, ceil(N / C)."""
        return -(-self.out_features // self.columns)

    def _build(
        self, activation: str | None = None, residual: bool = False, cache: _Cache | None = None
    ) -> tirx.PrimFunc:
        """The function with the operands that the weight's format and the epilogue have; the others are dropped.

        Blocks "matmul" and "epilogue", in this order.
        """
        rows, columns, strips, k = self.rows, self.columns, self.strips, self.in_features
        n, g = strips * columns, row_groups(self.groups)
        plain, quantized = self.weights in PLAIN, self.weights in ("int8", "int4")
        w_types = packed_types(self.weights, k, self.out_features, columns)
        x_width = k if plain else k // 2 if self.weights == "bfloat16_pairs" else k // 4
        x_dtype, has_bias, splits = "float32" if plain else "int32", self.has_bias, cache is not None
        width = n // 3 if splits else n
        activate = EXPRESSIONS[activation] if activation else lambda value: value
        accumulate = _ACCUMULATE[self.weights](self)
        cache_slots = tirx.Var("cache_slots", "int32")
        heads, context, cache_dtype = (cache.heads, cache.context, cache.dtype) if cache else (1, 1, "float32")
        head_dim = width // heads
        cache_shape = (cache_slots, 2, heads, context, head_dim)

        def operand(used, handle, shape, dtype):
            return T.match_buffer(handle, shape, dtype) if used else None

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


@dataclass(frozen=True)
class _Cache:
    """What `QKVLinear` needs to know of the KV cache."""

    heads: int
    context: int
    dtype: str


def _accumulate_plain(kernel: _Matmul) -> Callable[..., None]:
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


def _accumulate_pairs(kernel: _Matmul) -> Callable[..., None]:
    rows, columns, strips, words = kernel.rows, kernel.columns, kernel.strips, kernel.in_features // 2
    lanes, native = kernel.lanes, kernel.native

    def step(acc, x, w):
        if native:
            return T.call_extern(f"float32x{lanes}", f"{DOT_BFLOAT16}_{lanes}", acc, x, w)
        return acc + _spread(low_half(x), lanes) * low_half(w) + _spread(high_half(x), lanes) * high_half(w)

    @T.inline
    def accumulate(x, x_scales, x_corrections, w, w_scales, acc, g):
        for group, strip, row, column, word in T.grid(g, strips, rows, columns // lanes, words):
            with T.sblock("matmul"):
                vg, vs, vr, vc, vk = T.axis.remap("SSSSR", [group, strip, row, column, word])
                first = T.meta_var(vc * lanes)
                T.reads(x[vg, vr, vk], w[vs, vk, first : first + lanes])
                T.writes(acc[vg, vs, vr, first : first + lanes])
                with T.init():
                    acc[vg, vs, vr, _lanes(first, lanes)] = _spread(T.float32(0.0), lanes)
                acc[vg, vs, vr, _lanes(first, lanes)] = step(
                    acc[vg, vs, vr, _lanes(first, lanes)], x[vg, vr, vk], w[vs, vk, _lanes(first, lanes)]
                )

    return accumulate


def _accumulate_quantized(kernel: _Matmul) -> Callable[..., None]:
    rows, columns, strips, blocks = kernel.rows, kernel.columns, kernel.strips, kernel.in_features // GROUP
    lanes, native, nibbles = kernel.lanes, kernel.native, kernel.weights == "int4"
    x_words, w_words = GROUP // 4, GROUP // 8 if nibbles else GROUP // 4
    low_nibbles = 0x0F0F0F0F

    def step(acc, x, w):
        """acc + the dot product of 4 unsigned bytes of w with 4 signed bytes of x."""
        if native:
            return T.call_extern(f"int32x{lanes}", f"{DOT_INT8}_{lanes}", acc, x, w)
        for byte in range(4):
            signed = (x << T.int32(24 - 8 * byte)) >> T.int32(24)
            acc = acc + ((w >> _spread(T.int32(8 * byte), lanes)) & _spread(T.int32(255), lanes)) * _spread(
                signed, lanes
            )
        return acc

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
                    acc[vg, vs, vr, _lanes(first, lanes)] = _spread(T.float32(0.0), lanes)
                dot = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
                dot[_lanes(0, lanes)] = _spread(T.int32(0), lanes)
                for word in T.unroll(w_words):
                    if nibbles:
                        dot[_lanes(0, lanes)] = step(
                            dot[_lanes(0, lanes)],
                            x[vg, vr, vk * x_words + word],
                            w[vs, vk * w_words + word, _lanes(first, lanes)] & _spread(T.int32(low_nibbles), lanes),
                        )
                        dot[_lanes(0, lanes)] = step(
                            dot[_lanes(0, lanes)],
                            x[vg, vr, vk * x_words + w_words + word],
                            (w[vs, vk * w_words + word, _lanes(first, lanes)] >> _spread(T.int32(4), lanes))
                            & _spread(T.int32(low_nibbles), lanes),
                        )
                    else:
                        dot[_lanes(0, lanes)] = step(
                            dot[_lanes(0, lanes)],
                            x[vg, vr, vk * x_words + word],
                            w[vs, vk * w_words + word, _lanes(first, lanes)],
                        )
                acc[vg, vs, vr, _lanes(first, lanes)] = acc[vg, vs, vr, _lanes(first, lanes)] + (
                    _to_float32(dot[_lanes(0, lanes)], lanes) * _spread(x_scales[vg, vr, vk], lanes)
                    - _spread(x_corrections[vg, vr, vk], lanes)
                ) * _to_float32(w_scales[vs, vk, _lanes(first, lanes)], lanes)

    return accumulate


def _lanes(first: tirx.Expr | int, lanes: int) -> tirx.Expr | int:
    """The indices of `lanes` neighbours; TVM has no vectors of one."""
    return T.ramp(first, 1, lanes) if lanes > 1 else first


def _spread(value: tirx.Expr, lanes: int) -> tirx.Expr:
    return T.broadcast(value, lanes) if lanes > 1 else value


def _to_float32(value: tirx.Expr, lanes: int) -> tirx.Expr:
    return T.Cast(f"float32x{lanes}" if lanes > 1 else "float32", value)


_ACCUMULATE: dict[str, Callable[[_Matmul], Callable[..., None]]] = {
    "float32": _accumulate_plain,
    "float16": _accumulate_plain,
    "bfloat16": _accumulate_plain,
    "bfloat16_pairs": _accumulate_pairs,
    "int8": _accumulate_quantized,
    "int4": _accumulate_quantized,
}


@dataclass(frozen=True)
class Linear(_Matmul):
    """y = activation(x W + b).

    Parameters of the function: x (one or three tensors), w (one or two), b (N,) float32, y (g, R, N) float32.
    """

    family: ClassVar[str] = "linear"
    activation: str | None = None

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`."""
        return self._build(activation=self.activation)

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for weights in FORMATS:
            yield _case(Linear(768, 3072, 8, 32, weights, activation="gelu_new"), 3, "124M MLP")
            yield _case(Linear(768, 96, 1, 32, weights, groups=1), 1, "one row")
        yield _case(Linear(129, 24, 8, 8, "float32", activation="tanh"), 1, "odd sizes")
        yield _case(Linear(34, 25, 8, 1, "bfloat16_pairs"), 1, "odd sizes")
        yield _case(Linear(96, 24, 8, 8, "int8"), 2, "narrow strips")
        for activation in EXPRESSIONS:
            for scale in (1.0, 100.0):
                kernel = Linear(32, 64, 8, 32, "float32", activation=activation)
                yield _case(kernel, 17, f"{activation}, magnitude {scale:g}", scale)


@dataclass(frozen=True)
class ResidualLinear(_Matmul):
    """y = x W + b + residual.

    Parameters of the function: x (one or three tensors), w (one or two), b (N,) float32, residual (g, R, N) float32,
    y (g, R, N) float32.
    """

    family: ClassVar[str] = "residual_linear"

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`."""
        return self._build(residual=True)

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for weights in FORMATS:
            yield _case(ResidualLinear(3072, 768, 8, 32, weights), 2, "124M MLP projection")
            yield _case(ResidualLinear(768, 768, 1, 32, weights, groups=1), 1, "one row")
            yield _case(ResidualLinear(768, 768, 8, 32, weights, groups=1), 1, "one group")
        yield _case(ResidualLinear(77, 33, 8, 1, "float32"), 5, "odd sizes")


@dataclass(frozen=True)
class Head(_Matmul):
    """logits = x W, without bias; columns past the vocabulary hold what padding gives, zero in plain formats.

    Parameters of the function: x (one or three tensors), w (one or two), logits (g, R, ceil(V/C) * C) float32.
    """

    family: ClassVar[str] = "head"
    has_bias: ClassVar[bool] = False

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`."""
        return self._build()

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for weights in FORMATS:
            yield _case(Head(128, 1021, 8, 32, weights), 2, "odd vocabulary")
            yield _case(Head(128, 1021, 1, 32, weights, groups=1), 1, "odd vocabulary, one row")


@dataclass(frozen=True)
class QKVLinear(_Matmul):
    """The fused projection of queries, keys and values: q = (x W + b)[:E]; keys and values go into the KV cache.

    N = 3 E = 3 H D. Row (g, R) writes its key and value at `positions` of slot `slots`; a row whose position is -1 is
    padding and writes none.

    Parameters of the function: x (one or three tensors), w (one or two), b (N,) float32, slots (g, R) int32,
    positions (g, R) int32, cache (S, 2, H, P, D) cache_dtype, updated in place, q (g, R, E) float32.
    """

    family: ClassVar[str] = "qkv_linear"
    heads: int = 1
    context: int = 1
    """P, the positions of a cache slot."""
    cache_dtype: str = "float32"

    def prim_func(self) -> tirx.PrimFunc:
        """See `PortableKernel.prim_func`."""
        return self._build(cache=_Cache(self.heads, self.context, self.cache_dtype))

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for weights in FORMATS:
            for cache_dtype in PLAIN:
                if weights in PLAIN and weights != cache_dtype:
                    continue
                sizes: dict[str, Any] = {"heads": 2, "context": 16, "cache_dtype": cache_dtype}
                yield _case(QKVLinear(128, 384, 8, 32, weights, **sizes), 3, "ragged rows and padding")
                yield _case(QKVLinear(128, 384, 1, 32, weights, groups=1, **sizes), 1, "one row")
                yield _case(QKVLinear(128, 384, 8, 32, weights, groups=1, **sizes), 1, "one group")
        yield _case(QKVLinear(60, 180, 8, 4, "float32", heads=3, context=5), 2, "head_dim 20")


FORMATS = ("float32", "float16", "bfloat16", "bfloat16_pairs", "int8", "int4")
"""Every weight format, for the cases."""


def _inputs(kernel: _Matmul, x: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """x as the kernel takes it, and the values that this stands for, float64 (rows, K)."""
    k = kernel.in_features
    if kernel.weights in PLAIN:
        return (x,), x.reshape(-1, k).astype(np.float64)
    if kernel.weights == "bfloat16_pairs":
        return (pair_words(x),), x.astype(numpy_dtype("bfloat16")).reshape(-1, k).astype(np.float64)
    words, scales, corrections = quantize_rows(x, kernel.weights)
    bytes_ = words.view(np.int8).reshape(-1, k // GROUP, GROUP // 4, 4).transpose(0, 1, 3, 2).reshape(-1, k)
    values = bytes_.astype(np.float64) * np.repeat(scales.reshape(-1, k // GROUP), GROUP, -1)
    return (words, scales, corrections), values


def _weight(kernel: _Matmul, weight: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """A float32 weight (K, N) packed, and the values that this stands for, float64."""
    if kernel.weights in PLAIN:
        stored = weight.astype(numpy_dtype(kernel.weights))
        return (pack(stored, kernel.columns),), stored.astype(np.float64)
    if kernel.weights == "bfloat16_pairs":
        stored = weight.astype(numpy_dtype("bfloat16"))
        return (pack_words(stored, kernel.weights, kernel.columns),), stored.astype(np.float64)
    values, scales = quantize(weight, kernel.weights)
    packed = (pack_words(values, kernel.weights, kernel.columns), pack(scales, kernel.columns))
    return packed, dequantize(values, scales).astype(np.float64)


def _case(kernel: Linear | ResidualLinear | Head | QKVLinear, groups: int, name: str, scale: float = 1.0) -> Case:
    """A case with random operands; the expected result is float64 on the values that the formats can hold."""
    rng = np.random.default_rng(0)
    k, n, rows = kernel.in_features, kernel.out_features, groups * kernel.rows
    given_x = rng.standard_normal((groups, kernel.rows, k), dtype=np.float32) * np.float32(scale)
    x, x_values = _inputs(kernel, given_x)
    packed, w_values = _weight(kernel, rng.standard_normal((k, n), dtype=np.float32) / np.float32(np.sqrt(k)))
    product = x_values @ w_values
    if isinstance(kernel, Head):
        shape = (groups, kernel.rows, kernel.strips * kernel.columns)
        expected = np.pad(product, ((0, 0), (0, shape[2] - n))).reshape(shape)
        return Case(kernel, name, (*x, *packed), (np.zeros(shape, np.float32),), (expected,))
    bias = rng.standard_normal(n, dtype=np.float32)
    product += bias
    if isinstance(kernel, QKVLinear):
        # The cache is rounded to its dtype: half a unit in the last place of 24, 11 or 8 bits.
        nmse = {"float32": 1e-12, "float16": 2.0**-22, "bfloat16": 2.0**-16}[kernel.cache_dtype]
        return qkv_case(kernel, (kernel.cache_dtype, "float32"), name, (*x, *packed, bias), product, nmse)
    shape = (groups, kernel.rows, n)
    inputs = (*x, *packed, bias)
    if isinstance(kernel, ResidualLinear):
        residual = rng.standard_normal(shape, dtype=np.float32)
        inputs, product = (*inputs, residual), product + residual.reshape(rows, n)
    elif isinstance(kernel, Linear) and kernel.activation:
        with np.errstate(over="ignore"):
            product = REFERENCES[kernel.activation](product)
    return Case(kernel, name, inputs, (np.zeros(shape, np.float32),), (product.reshape(shape),))


def qkv_case(
    kernel: Any, dtypes: tuple[str, str], name: str, inputs: tuple[np.ndarray, ...], product: np.ndarray, nmse: float
) -> Case:
    """A case of a `QKVLinear`, this one or that of `kernels.cuda`.

    Args:
        kernel: with `rows`, `out_features`, `heads` and `context`.
        dtypes: of the cache, and of q.
        name, nmse: of the case.
        inputs: the operands up to the bias.
        product: x W + b, float64 (rows, N).
    """
    rng = np.random.default_rng(2)
    rows, width, cache_slots = len(product), kernel.out_features // 3, 3
    head_dim = width // kernel.heads
    # Every row its own (slot, position); the last row is padding where there is more than one.
    count = min(max(rows - 1, 1), cache_slots * kernel.context)
    slots = np.zeros(rows, np.int32)
    positions = np.full(rows, -1, np.int32)
    places = rng.permutation(cache_slots * kernel.context)[:count]
    slots[:count], positions[:count] = np.divmod(places, kernel.context)
    cache = rng.standard_normal((cache_slots, 2, kernel.heads, kernel.context, head_dim), dtype=np.float32)
    cache = cache.astype(numpy_dtype(dtypes[0]))
    expected = cache.astype(np.float64)
    for row in range(count):
        expected[slots[row], :, :, positions[row]] = product[row, width:].reshape(2, kernel.heads, head_dim)
    shape = (rows // kernel.rows, kernel.rows)
    q = np.zeros((*shape, width), numpy_dtype(dtypes[1]))
    operands = (*inputs, slots.reshape(shape), positions.reshape(shape), cache)
    outputs = (expected, product[:, :width].reshape(*shape, width))
    return Case(kernel, name, operands, (q,), outputs, (len(operands) - 1,), nmse)


def random_case(kernel: Linear | ResidualLinear | Head | QKVLinear, groups: int) -> Case:
    """A case of `groups` row groups with random operands, of the sizes that a search measures."""
    return _case(kernel, groups, f"{groups * kernel.rows} rows")
