"""Linear layers: packed weights, and a fused epilogue.

Four kernels that differ in their epilogue: `Linear` (bias, activation), `ResidualLinear` (bias, residual), `QKVLinear`
(bias, split, cache write) and `Head` (none). Each takes its weight in any format of `tvm_attn.kernels.weights`. The
form of the input x follows from that format and the dtype of activations:

| activations | weights | x | products |
|---|---|---|---|
| float32 | float32, float16, bfloat16 | x (g, R, K) float32 | float32 multiply and add |
| float32 | bfloat16_pairs | pairs (g, R, K/2) int32, see `PackPairs` | two bfloat16 products per step, float32 sum |
| float32 | int8, int4 | words, scales and corrections, see `QuantizeRows` | four 8-bit products, int32 sum in a group |
| float16, bfloat16 | the same dtype, int8, int4 | x (g, R, K) of that dtype | on tensor cores, float32 sum |

Sums over groups and everything after them are float32. With `epsilon`, LayerNorm comes first: x is then the float32
residual stream followed by gamma (K,) and beta (K,) float32, and LayerNorm's result has the dtype of activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tvm_attn.kernels.activation import EXPRESSIONS, REFERENCES
from tvm_attn.kernels.base import ROUNDED, TENSOR_CORE_DTYPES, Case
from tvm_attn.kernels.norm import normalize
from tvm_attn.kernels.quant import pair_words, quantize_rows
from tvm_attn.kernels.weights import PLAIN, pack, pack_words, packed_types
from tvm_attn.quantization import dequantize, quantize
from tvm_attn.storage import GROUP, numpy_dtype


@dataclass(frozen=True)
class LinearKernel:
    """What all linear kernels share.

    Attributes:
        in_features: K.
        out_features: N.
        rows: R, the rows of a group.
        columns: C, the columns of a weight strip; 1 on tensor cores, which need each output's inputs side by side.
        weights: format of the weight.
        groups: a static number of row groups, or None for a symbolic one.
        activations: dtype of x, and of y unless it is added to the residual stream.
        epsilon: epsilon of a LayerNorm that comes first; None for no LayerNorm.
        max_groups: upper bound of a symbolic number of row groups, if one is known.
    """

    in_features: int
    out_features: int
    rows: int
    columns: int
    weights: str
    groups: int | None = None
    activations: str = "float32"
    epsilon: float | None = None
    max_groups: int | None = None

    family: ClassVar[str]
    has_bias: ClassVar[bool] = True

    @property
    def strips(self) -> int:
        """Number of weight strips, ceil(N / C)."""
        return -(-self.out_features // self.columns)

    @property
    def is_quantized(self) -> bool:
        """Whether the weight has scales."""
        return self.weights in ("int8", "int4")

    @property
    def weight_types(self) -> list[tuple[tuple[int, int, int], str]]:
        """Shape and dtype of the weight's tensors: the weight, and its scales if it is quantized."""
        return packed_types(self.weights, self.in_features, self.out_features, self.columns)

    @property
    def output_dtype(self) -> str:
        """The dtype of y."""
        return "float32" if isinstance(self, ResidualLinear | Head) else self.activations


@dataclass(frozen=True)
class Linear(LinearKernel):
    """y = activation(x W + b).

    Parameters of the function: x (one or three tensors), w (one or two), b (N,) float32, y (g, R, N) activations.
    """

    family: ClassVar[str] = "linear"
    activation: str | None = None

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
        for dtypes in _tensor_core_formats():
            yield _case(Linear(64, 136, 8, 1, **dtypes, activation="gelu_new"), 3, "ragged tiles")
            yield from _one_group(Linear, 96, 72, activation="gelu_new", **dtypes)
        kernel = Linear(256, 256, 8, 1, "float16", activations="float16", activation="gelu_new")
        yield _case(kernel, 17, "several tiles of rows")
        for activation in EXPRESSIONS:
            for scale in (1.0, 100.0):
                kernel = Linear(32, 64, 8, 1, "bfloat16", activations="bfloat16", activation=activation)
                yield _case(kernel, 2, f"{activation}, magnitude {scale:g}", scale)


@dataclass(frozen=True)
class ResidualLinear(LinearKernel):
    """y = x W + b + residual.

    Parameters of the function: x (one or three tensors), w (one or two), b (N,) float32, residual (g, R, N) float32,
    y (g, R, N) float32.
    """

    family: ClassVar[str] = "residual_linear"

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for weights in FORMATS:
            yield _case(ResidualLinear(3072, 768, 8, 32, weights), 2, "124M MLP projection")
            yield _case(ResidualLinear(768, 768, 1, 32, weights, groups=1), 1, "one row")
            yield _case(ResidualLinear(768, 768, 8, 32, weights, groups=1), 1, "one group")
        yield _case(ResidualLinear(77, 33, 8, 1, "float32"), 5, "odd sizes")
        for dtypes in _tensor_core_formats():
            yield _case(ResidualLinear(192, 72, 8, 1, **dtypes), 5, "ragged tiles")
            yield from _one_group(ResidualLinear, 192, 72, **dtypes)
        kernel = ResidualLinear(3072, 48, 8, 1, "float16", activations="float16")
        yield _case(kernel, 1, "long rows, symbolic groups")
        yield _case(replace(kernel, rows=1, groups=1), 1, "long rows")


@dataclass(frozen=True)
class Head(LinearKernel):
    """logits = x W, without bias; columns past the vocabulary come from padded weights: zero in plain formats.

    Parameters of the function: x (one or three tensors), w (one or two), logits (g, R, ceil(V/C) * C) float32.
    """

    family: ClassVar[str] = "head"
    has_bias: ClassVar[bool] = False

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        for weights in FORMATS:
            yield _case(Head(128, 1021, 8, 32, weights), 2, "odd vocabulary")
            yield _case(Head(128, 1021, 1, 32, weights, groups=1), 1, "odd vocabulary, one row")
        for dtypes in _tensor_core_formats():
            yield _case(Head(64, 1021, 8, 1, **dtypes), 2, "odd vocabulary")
            yield from _one_group(Head, 64, 1021, **dtypes)
        yield _case(Head(96, 70, 8, 1, "int4", activations="bfloat16"), 3, "odd number of groups of 32")


@dataclass(frozen=True)
class QKVLinear(LinearKernel):
    """The fused projection of queries, keys and values: q = (x W + b)[:E]; keys and values go into the KV cache.

    N = 3 E = 3 H D. Each row writes its key and value at its position in its slot; a row whose position is -1 is
    padding and writes nothing.

    Parameters of the function: x (one or three tensors), w (one or two), b (N,) float32, slots (g, R) int32,
    positions (g, R) int32, cache (S, 2, H, P, D) cache_dtype, updated in place, q (g, R, E) activations.
    """

    family: ClassVar[str] = "qkv_linear"
    heads: int = 1
    context: int = 1
    """P, the positions of a cache slot."""
    cache_dtype: str = "float32"

    @staticmethod
    def cases() -> Iterator[Case]:
        """See `Kernel.cases`."""
        sizes: dict[str, Any] = {"heads": 2, "context": 16}
        for weights in FORMATS:
            for cache_dtype in PLAIN:
                if weights in PLAIN and weights != cache_dtype:
                    continue
                sizes["cache_dtype"] = cache_dtype
                yield _case(QKVLinear(128, 384, 8, 32, weights, **sizes), 3, "ragged rows and padding")
                yield _case(QKVLinear(128, 384, 1, 32, weights, groups=1, **sizes), 1, "one row")
                yield _case(QKVLinear(128, 384, 8, 32, weights, groups=1, **sizes), 1, "one group")
        yield _case(QKVLinear(60, 180, 8, 4, "float32", heads=3, context=5), 2, "head_dim 20")
        for dtypes in _tensor_core_formats():
            sizes["cache_dtype"] = dtypes["activations"]
            yield _case(QKVLinear(64, 192, 8, 1, **dtypes, **sizes), 3, "ragged rows and padding")
            yield from _one_group(QKVLinear, 64, 192, **dtypes, **sizes)
        sizes = {"heads": 3, "context": 9, "cache_dtype": "float16"}
        yield _case(QKVLinear(144, 432, 8, 1, "float16", activations="float16", **sizes), 9, "head_dim 48")


FORMATS = ("float32", "float16", "bfloat16", "bfloat16_pairs", "int8", "int4")
"""Every weight format, for the cases."""


def _tensor_core_formats() -> Iterator[dict[str, Any]]:
    """The dtypes of the linear layers that tensor cores compute."""
    for dtype in TENSOR_CORE_DTYPES:
        for weights in (dtype, "int8", "int4"):
            yield {"weights": weights, "activations": dtype}


def _one_group(kind: type[LinearKernel], k: int, n: int, **more: Any) -> Iterator[Case]:
    """Cases of one static group on tensor cores: one row and eight, with and without a LayerNorm first."""
    for rows in (1, 8):
        for epsilon in (None, 1e-5):
            kernel = kind(k, n, rows, 1, groups=1, epsilon=epsilon, **more)
            yield _case(kernel, 1, f"{rows} rows" + (", LayerNorm" if epsilon else ""))


def _inputs(kernel: LinearKernel, x: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """x in the kernel's form, and the values that enter the product, float64 (rows, K)."""
    k = kernel.in_features
    if kernel.epsilon is not None:
        gamma, beta = np.random.default_rng(3).standard_normal((2, k), dtype=np.float32)
        return (x, gamma, beta), normalize(x, gamma, beta, kernel.epsilon).reshape(-1, k)
    if kernel.activations != "float32" or kernel.weights in PLAIN:
        stored = x.astype(numpy_dtype(kernel.activations))
        return (stored,), stored.reshape(-1, k).astype(np.float64)
    if kernel.weights == "bfloat16_pairs":
        return (pair_words(x),), x.astype(numpy_dtype("bfloat16")).reshape(-1, k).astype(np.float64)
    words, scales, corrections = quantize_rows(x, kernel.weights)
    bytes_ = words.view(np.int8).reshape(-1, k // GROUP, GROUP // 4, 4).transpose(0, 1, 3, 2).reshape(-1, k)
    values = bytes_.astype(np.float64) * np.repeat(scales.reshape(-1, k // GROUP), GROUP, -1)
    return (words, scales, corrections), values


def _weight(kernel: LinearKernel, weight: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """A float32 weight (K, N) packed, and the values that the packed weight represents, float64."""
    if kernel.weights in PLAIN:
        stored = weight.astype(numpy_dtype(kernel.weights))
        return (pack(stored, kernel.columns),), stored.astype(np.float64)
    if kernel.weights == "bfloat16_pairs":
        stored = weight.astype(numpy_dtype("bfloat16"))
        return (pack_words(stored, kernel.weights, kernel.columns),), stored.astype(np.float64)
    values, scales = quantize(weight, kernel.weights)
    packed = (pack_words(values, kernel.weights, kernel.columns), pack(scales, kernel.columns))
    return packed, dequantize(values, scales).astype(np.float64)


def _bound(kernel: LinearKernel) -> float:
    """Bound on the NMSE: that of rounding, or of float32 sums if nothing is rounded."""
    if isinstance(kernel, QKVLinear):
        return max(1e-12, ROUNDED[kernel.cache_dtype])
    if kernel.activations == "float32":
        return 1e-12
    if kernel.output_dtype == "float32" and not kernel.is_quantized and kernel.epsilon is None:
        return 1e-10  # the hardware chooses the order of sums
    return ROUNDED[kernel.activations]


def _case(kernel: Any, groups: int, name: str, scale: float = 1.0) -> Case:
    """A case with random operands; the expected result is float64 on the values as the formats hold them."""
    rng = np.random.default_rng(0)
    k, n, rows = kernel.in_features, kernel.out_features, groups * kernel.rows
    given_x = rng.standard_normal((groups, kernel.rows, k), dtype=np.float32) * np.float32(scale)
    x, x_values = _inputs(kernel, given_x)
    packed, w_values = _weight(kernel, rng.standard_normal((k, n), dtype=np.float32) / np.float32(np.sqrt(k)))
    product, inputs = x_values @ w_values, (*x, *packed)
    if kernel.has_bias:
        bias = rng.standard_normal(n, dtype=np.float32)
        product, inputs = product + bias, (*inputs, bias)
    if isinstance(kernel, QKVLinear):
        return _qkv_case(kernel, name, inputs, product)
    shape = (groups, kernel.rows, kernel.strips * kernel.columns)
    if isinstance(kernel, ResidualLinear):
        residual = rng.standard_normal(shape, dtype=np.float32)
        inputs, product = (*inputs, residual), product + residual.reshape(rows, n)
    elif isinstance(kernel, Linear) and kernel.activation:
        with np.errstate(over="ignore"):
            product = REFERENCES[kernel.activation](product)
    expected = np.pad(product, ((0, 0), (0, shape[2] - n))).reshape(shape)
    y = np.zeros(shape, numpy_dtype(kernel.output_dtype))
    return Case(kernel, name, inputs, (y,), (expected,), nmse=_bound(kernel))


def _qkv_case(kernel: QKVLinear, name: str, inputs: tuple[np.ndarray, ...], product: np.ndarray) -> Case:
    """A case from `inputs`, the operands up to the bias, and `product`, x W + b in float64 (rows, N)."""
    rng = np.random.default_rng(2)
    rows, width, cache_slots = len(product), kernel.out_features // 3, 3
    head_dim = width // kernel.heads
    # Every row has its own (slot, position); if there are several, the last one is padding.
    count = min(max(rows - 1, 1), cache_slots * kernel.context)
    slots = np.zeros(rows, np.int32)
    positions = np.full(rows, -1, np.int32)
    places = rng.permutation(cache_slots * kernel.context)[:count]
    slots[:count], positions[:count] = np.divmod(places, kernel.context)
    cache = rng.standard_normal((cache_slots, 2, kernel.heads, kernel.context, head_dim), dtype=np.float32)
    cache = cache.astype(numpy_dtype(kernel.cache_dtype))
    expected = cache.astype(np.float64)
    for row in range(count):
        expected[slots[row], :, :, positions[row]] = product[row, width:].reshape(2, kernel.heads, head_dim)
    shape = (rows // kernel.rows, kernel.rows)
    q = np.zeros((*shape, width), numpy_dtype(kernel.activations))
    operands = (*inputs, slots.reshape(shape), positions.reshape(shape), cache)
    outputs = (expected, product[:, :width].reshape(*shape, width))
    return Case(kernel, name, operands, (q,), outputs, (len(operands) - 1,), _bound(kernel))


def random_case(kernel: LinearKernel, groups: int) -> Case:
    """A case of `groups` row groups with random operands, of the sizes that a search measures."""
    return _case(kernel, groups, f"{groups * kernel.rows} rows")
