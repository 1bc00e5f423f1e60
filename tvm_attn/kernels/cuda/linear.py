"""Linear layers for tensor cores: what they compute, their references and cases.

Activations between layers are float16 or bfloat16 (`dtype`), the residual stream and all sums are float32. A weight is
the packed format of `tvm_attn.kernels.weights` with strips of one column: (N, K, 1), each output's inputs side by side,
which is the column-major operand of `mma.sync`. Quantized weights are made floats in registers; x is not quantized.

Two modules compute these layers: `tvm_attn.kernels.cuda.matmul` any number of rows, `tvm_attn.kernels.cuda.gemv` one
static group (`groups` is 1), at the speed of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tvm_attn.kernels.activation import EXPRESSIONS, REFERENCES
from tvm_attn.kernels.base import Case
from tvm_attn.kernels.matmul import qkv_case
from tvm_attn.kernels.weights import pack, pack_words, packed_types
from tvm_attn.quantization import dequantize, quantize
from tvm_attn.storage import numpy_dtype

DTYPES = ("float16", "bfloat16")
"""What tensor cores multiply with float32 sums."""


@dataclass(frozen=True)
class _Linear:
    """The static sizes that all linear layers share.

    Attributes:
        in_features: K, a multiple of 16, and of 32 where the weight is quantized.
        out_features: N.
        rows: R, the rows of a group.
        dtype: of activations: float16 or bfloat16.
        weights: format of the weight: `dtype`, int8 or int4.
        groups: 1, or None for a symbolic number of row groups.
        epsilon: where given, x is the float32 residual stream, and LayerNorm with this epsilon comes first; its result
            is rounded to `dtype`.
        most_rows: rows of a large call, which the tiles of a symbolic number of groups are chosen for.
    """

    in_features: int
    out_features: int
    rows: int
    dtype: str
    weights: str
    groups: int | None = None
    epsilon: float | None = None
    most_rows: int = 1024

    family: ClassVar[str]
    has_bias: ClassVar[bool] = True

    @property
    def weight_types(self) -> list[tuple[tuple[int, int, int], str]]:
        """Shape and dtype of the weight's tensors: the weight, and its scales where it is quantized."""
        return packed_types(self.weights, self.in_features, self.out_features, 1)


@dataclass(frozen=True)
class Linear(_Linear):
    """y = activation(x W + b).

    Parameters of the function: x (g, R, K) dtype, or x (g, R, K) float32, gamma (K,) and beta (K,) float32 where
    `epsilon` is given; w (N, K, 1) dtype, or words (N, K/4 or K/8, 1) int32 and scales (N, K/32, 1) float16; b (N,)
    float32; y (g, R, N) dtype.
    """

    family: ClassVar[str] = "cuda_linear"
    activation: str | None = None

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for dtype in DTYPES:
            for weights in (dtype, "int8", "int4"):
                yield _case(Linear(64, 136, 8, dtype, weights, activation="gelu_new"), 3, "ragged tiles")
                yield from _one_group(Linear, 96, 72, dtype, weights, activation="gelu_new")
        yield _case(Linear(256, 256, 8, "float16", "float16", activation="gelu_new"), 17, "several tiles of rows")
        for activation in EXPRESSIONS:
            for scale in (1.0, 100.0):
                kernel = Linear(32, 64, 8, "bfloat16", "bfloat16", activation=activation)
                yield _case(kernel, 2, f"{activation}, magnitude {scale:g}", scale)


@dataclass(frozen=True)
class ResidualLinear(_Linear):
    """y = x W + b + residual.

    Parameters of the function: those of `Linear` up to b; residual (g, R, N) float32, y (g, R, N) float32.
    """

    family: ClassVar[str] = "cuda_residual_linear"

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for dtype in DTYPES:
            for weights in (dtype, "int8", "int4"):
                yield _case(ResidualLinear(192, 72, 8, dtype, weights), 5, "ragged tiles")
                yield from _one_group(ResidualLinear, 192, 72, dtype, weights)
        yield _case(ResidualLinear(3072, 48, 8, "float16", "float16"), 1, "long rows, symbolic groups")
        yield _case(ResidualLinear(3072, 48, 1, "float16", "float16", 1), 1, "long rows")


@dataclass(frozen=True)
class QKVLinear(_Linear):
    """The fused projection of queries, keys and values: q = (x W + b)[:E]; keys and values go into the KV cache.

    N = 3 E = 3 H D. Row (g, R) writes its key and value at `positions` of slot `slots`; a row whose position is -1 is
    padding and writes none.

    Parameters of the function: those of `Linear` up to b; slots (g, R) int32, positions (g, R) int32, cache
    (S, 2, H, P, D) dtype, updated in place, q (g, R, E) dtype.
    """

    family: ClassVar[str] = "cuda_qkv_linear"
    heads: int = 1
    context: int = 1
    """P, the positions of a cache slot."""

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for dtype in DTYPES:
            for weights in (dtype, "int8", "int4"):
                sizes = {"heads": 2, "context": 16}
                yield _case(QKVLinear(64, 192, 8, dtype, weights, **sizes), 3, "ragged rows and padding")
                yield from _one_group(QKVLinear, 64, 192, dtype, weights, **sizes)
        yield _case(QKVLinear(144, 432, 8, "float16", "float16", heads=3, context=9), 9, "head_dim 48")


@dataclass(frozen=True)
class Head(_Linear):
    """logits = x W, without bias.

    Parameters of the function: those of `Linear` before b; logits (g, R, N) float32.
    """

    family: ClassVar[str] = "cuda_head"
    has_bias: ClassVar[bool] = False

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for dtype in DTYPES:
            for weights in (dtype, "int8", "int4"):
                yield _case(Head(64, 1021, 8, dtype, weights), 2, "odd vocabulary")
                yield from _one_group(Head, 64, 1021, dtype, weights)
        yield _case(Head(96, 70, 8, "bfloat16", "int4"), 3, "odd number of groups of 32")


def _one_group(kind: type[_Linear], k: int, n: int, dtype: str, weights: str, **more: Any) -> Iterator[Case]:
    """Cases of one static group: of one row and of eight, LayerNorm before it or not."""
    for rows in (1, 8):
        for epsilon in (None, 1e-5):
            kernel = kind(k, n, rows, dtype, weights, 1, epsilon, **more)
            yield _case(kernel, 1, f"{rows} rows" + (", LayerNorm" if epsilon else ""))


def _input(kernel: _Linear, x: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """x and the parameters of LayerNorm as the kernel takes them, and what enters the product, float64 (rows, K)."""
    k = kernel.in_features
    if kernel.epsilon is None:
        stored = x.astype(numpy_dtype(kernel.dtype))
        return (stored,), stored.reshape(-1, k).astype(np.float64)
    gamma, beta = np.random.default_rng(3).standard_normal((2, k), dtype=np.float32)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    normal = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + kernel.epsilon) * gamma + beta
    return (x, gamma, beta), normal.reshape(-1, k)


def _weight(kernel: _Linear, weight: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """A float32 weight (K, N) packed, and the values that this stands for, float64."""
    if kernel.weights == kernel.dtype:
        stored = weight.astype(numpy_dtype(kernel.dtype))
        return (pack(stored, 1),), stored.astype(np.float64)
    values, scales = quantize(weight, kernel.weights)
    return (pack_words(values, kernel.weights, 1), pack(scales, 1)), dequantize(values, scales).astype(np.float64)


def _bound(kernel: _Linear) -> float:
    """NMSE: where nothing is rounded to `dtype`, that of float32 sums, whose order is the hardware's."""
    plain = kernel.weights == kernel.dtype and kernel.epsilon is None
    if plain and isinstance(kernel, ResidualLinear | Head):
        return 1e-10
    # Half a unit in the last place of 11 or 8 bits, squared.
    return {"float16": 2.0**-22, "bfloat16": 2.0**-16}[kernel.dtype]


def _case(kernel: Any, groups: int, name: str, scale: float = 1.0) -> Case:
    """A case with random operands; the expected result is float64 on the values that the formats can hold."""
    rng = np.random.default_rng(0)
    k, n, rows = kernel.in_features, kernel.out_features, groups * kernel.rows
    x, x_values = _input(kernel, rng.standard_normal((groups, kernel.rows, k), dtype=np.float32) * np.float32(scale))
    packed, w_values = _weight(kernel, rng.standard_normal((k, n), dtype=np.float32) / np.float32(np.sqrt(k)))
    product, inputs = x_values @ w_values, (*x, *packed)
    shape, nmse = (groups, kernel.rows, n), _bound(kernel)
    if kernel.has_bias:
        bias = rng.standard_normal(n, dtype=np.float32)
        product, inputs = product + bias, (*inputs, bias)
    if isinstance(kernel, QKVLinear):
        return qkv_case(kernel, (kernel.dtype, kernel.dtype), name, inputs, product, nmse)
    dtype = kernel.dtype if isinstance(kernel, Linear) else "float32"
    if isinstance(kernel, ResidualLinear):
        residual = rng.standard_normal(shape, dtype=np.float32)
        inputs, product = (*inputs, residual), product + residual.reshape(rows, n)
    elif isinstance(kernel, Linear) and kernel.activation:
        with np.errstate(over="ignore"):
            product = REFERENCES[kernel.activation](product)
    return Case(kernel, name, inputs, (np.zeros(shape, numpy_dtype(dtype)),), (product.reshape(shape),), nmse=nmse)
