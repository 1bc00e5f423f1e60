"""Rules for ONNX's own operators: what they do with terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import erf, prod
from typing import Any

import ml_dtypes
import numpy as np

from tvm_attn.onnx import require_onnx
from tvm_attn.onnx.constants import MAX_ELEMENTS, Unsupported, dequantized, evaluate
from tvm_attn.onnx.reader import Node
from tvm_attn.onnx.terms import Array, Const, Linear, Part, Table, Term, scalar, widened
from tvm_attn.onnx.trace import Trace, Value, array, rule, term

_erf = np.vectorize(erf, otypes=[np.float64])


@rule("Identity", "Dropout", "CastLike")
def _same(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    return inputs[0]


@rule("Cast")
def _cast(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    value = inputs[0]
    dtype = np.dtype(require_onnx().helper.tensor_dtype_to_np_dtype(node.attributes["to"]))
    if isinstance(value, Const):
        # Weights keep the precision in which they are stored.
        kept = value.array.dtype in (np.float32, np.float64) and dtype in (np.float16, ml_dtypes.bfloat16)
        return value if kept else trace.constants(node, inputs)
    if dtype.kind in "iub":
        raise Unsupported("it turns hidden states into integers")
    return value


@rule("Shape")
def _shape(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    return Const(
        np.array(term(inputs[0]).shape[node.attributes.get("start", 0) : node.attributes.get("end")], np.int64)
    )


@rule("Size")
def _size(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    return Const(np.array(prod(term(inputs[0]).shape), np.int64))


@rule("IsNaN", "IsInf")
def _guard(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    return Const(np.zeros(term(inputs[0]).shape, bool))


@rule(
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Split", "Tile", "GatherElements", "GatherND"
)
def _layout(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    source = term(inputs[0])
    rest = [None if value is None else array(value) for value in inputs[1:]]
    places = np.arange(prod(source.shape)).reshape(source.shape)
    moved = evaluate(node, [places, *rest], trace.opset)
    return [trace.space.view(source, _Moved(index)) for index in moved]


@dataclass(frozen=True)
class _Moved:
    """Gives an arrangement that was computed before."""

    index: Array

    def __call__(self, places: Array) -> Array:
        return self.index


@rule("Concat", "ScatterND", "ScatterElements", "TensorScatter")
def _join(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    places = {"Concat": range(len(inputs)), "TensorScatter": (0, 1)}.get(node.op, (0, 2))
    values = [value for index in places if (value := inputs[index]) is not None]

    def join(arrays: list[Array]) -> Array:
        given: list[Array | None] = [None if i in places else array(v) if v else None for i, v in enumerate(inputs)]
        for index, entry in zip(places, arrays, strict=True):
            given[index] = entry
        return evaluate(node, given, trace.opset)[0]

    return trace.space.joined(values, join)


@rule("Gather", "Slice")
def _gather(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    data = inputs[0]
    if isinstance(data, Term):
        return _layout(trace, node, inputs)
    index = inputs[1] if len(inputs) > 1 else None
    axis = node.attributes.get("axis", 0)
    if (
        node.op == "Gather"
        and isinstance(data, Const)
        and isinstance(index, Const)
        and data.array.ndim == 2
        and not axis
    ):
        return embed(trace, data, index, node) or trace.constants(node, inputs)
    found = trace.constants(node, inputs)
    if node.op == "Slice" and isinstance(data, Const) and data.array.ndim == 2 and data.array.dtype.kind not in "iub":
        rows = evaluate(node, [np.arange(data.array.size).reshape(data.shape), *map(array, inputs[1:])], trace.opset)[0]
        if rows.size and rows.shape[1] == data.shape[1] and (rows[:, 0] % data.shape[1] == 0).all():
            return embed(trace, data, Const(rows[:, 0] // data.shape[1]), node) or found
    return found


def embed(trace: Trace, data: Const, index: Const, node: Node | str) -> Term | None:
    """Rows of a matrix for each token or position; None if they are neither."""
    weight, numbers = data.array, index.array
    if data.marks is not None or (weight.dtype.kind in "iub" and weight.dtype.itemsize > 1) or weight.dtype == bool:
        return None
    if prod(numbers.shape) * weight.shape[1] > MAX_ELEMENTS:
        return None
    numbers = np.where(numbers < 0, numbers + len(weight), numbers)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(weight):
        raise Unsupported(f"it takes row {numbers.max()} of a table of {len(weight)}")
    width = weight.shape[1]
    if index.marks is not None:
        count = trace.batch * trace.length
        table = trace.space.add(Table(str(node), (count, width), weight, index.source))
        return trace.space.rows(table, index.marks, width)
    positions = np.arange(trace.past_length, trace.past_length + trace.length)
    flat = numbers.reshape(-1)
    if flat.size % trace.length or not flat.size or (flat.reshape(-1, trace.length) != positions).any():
        return None
    table = trace.space.add(Table(str(node), weight.shape, weight, rows=True))
    return trace.space.rows(table, numbers, width)


@rule("Add", "Sum")
def _add(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    total = inputs[0]
    for value in inputs[1:]:
        total = add(trace, total, value, node)
    return total


def add(trace: Trace, a: Value | None, b: Value | None, node: Node) -> Value:
    """a + b."""
    if isinstance(a, Term) and isinstance(b, Term):
        return trace.space.sum(a, b, str(node))
    if isinstance(a, Term):
        return trace.space.plus(a, array(b))
    if isinstance(b, Term):
        return trace.space.plus(b, array(a))
    return Const(array(a) + array(b))


@rule("Sub")
def _subtract(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    minus = Const(np.array(-1, np.float32))
    b = inputs[1]
    negative = Const(-array(b)) if isinstance(b, Const) else trace.space.times(term(b), minus.array)
    return add(trace, inputs[0], negative, node)


@rule("Neg")
def _negative(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    return trace.space.times(term(inputs[0]), np.array(-1, np.float32))


@rule("Mul")
def _times(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    a, b = inputs
    if isinstance(a, Term) and isinstance(b, Term):
        return trace.space.product(a, b, str(node))
    value, factor = (a, b) if isinstance(a, Term) else (b, a)
    return scaled(trace, term(value), array(factor))


def scaled(trace: Trace, value: Term, factor: Array) -> Term:
    """A term times a constant; the scales of quantized weights become part of them."""
    linear = trace.space.of(value.parts[0]) if value.plain else None
    if isinstance(linear, Linear) and linear.weight.dtype.kind in "iu":
        weight = dequantized(linear.weight, widened(factor).reshape(-1), None)
        return trace.linear(linear.x, weight, linear.node) if value.shape[:-1] == linear.x.shape[:-1] else value
    return trace.space.times(value, factor)


@rule("Div")
def _divide(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    a, b = inputs
    if isinstance(a, Term) and isinstance(b, Term):
        return trace.space.product(a, b, str(node), divide=True)
    if isinstance(a, Term):
        with np.errstate(all="ignore"):
            return trace.space.times(a, 1 / array(b).astype(np.float64))
    numerator = scalar(array(a), 0)
    if numerator is None:
        raise Unsupported("it divides several numbers by hidden states")
    return trace.space.apply(term(b), lambda z: numerator / z, str(node))


@rule("Pow")
def _power(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    exponent = scalar(array(inputs[1]), 1)
    if exponent is None:
        raise Unsupported("it has several exponents")
    return trace.space.apply(term(inputs[0]), lambda z: np.power(z, exponent), str(node))


def tanh_gelu(z: Array) -> Array:
    """GELU by tanh (arXiv:1606.08415)."""
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def erf_gelu(z: Array) -> Array:
    """GELU (arXiv:1606.08415)."""
    return 0.5 * z * (1 + _erf(z / np.sqrt(2)))


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "Abs": np.abs,
    "Erf": _erf,
    "Exp": np.exp,
    "Log": np.log,
    "Reciprocal": lambda z: 1 / z,
    "Relu": lambda z: np.maximum(z, 0),
    "Sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "Softplus": lambda z: np.logaddexp(z, 0),
    "Sqrt": np.sqrt,
    "Tanh": np.tanh,
}


@rule(*FUNCTIONS)
def _function(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    return trace.space.apply(term(inputs[0]), FUNCTIONS[node.op], str(node))


@rule("Gelu", "com.microsoft::Gelu", "com.microsoft::FastGelu", "com.microsoft::BiasGelu", "com.microsoft::QuickGelu")
def _gelu(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    x = term(inputs[0])
    if len(inputs) > 1 and inputs[1] is not None:
        x = trace.space.plus(x, array(inputs[1]))
    tanh = node.op.endswith("FastGelu") or node.attributes.get("approximate") == "tanh"
    alpha = node.attributes.get("alpha", 1.702)
    if node.op.endswith("QuickGelu"):
        return trace.space.apply(x, lambda z: z / (1 + np.exp(-alpha * z)), str(node))
    return trace.space.apply(x, tanh_gelu if tanh else erf_gelu, str(node))


@rule("HardSwish", "Mish", "Elu", "LeakyRelu", "Selu", "Celu", "PRelu", "Swish")
def _other_activation(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    if node.op == "Swish":
        alpha = node.attributes.get("alpha", 1.0)
        return trace.space.apply(term(inputs[0]), lambda z: z / (1 + np.exp(-alpha * z)), str(node))
    raise Unsupported("GPT-2 has no such activation; supported are gelu_new, gelu, relu, silu, tanh")


@rule("Max")
def _maximum(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    constants = [array(value) for value in inputs if not isinstance(value, Term)]
    terms = [value for value in inputs if isinstance(value, Term)]
    least = scalar(constants[0], 0) if len(constants) == 1 and len(terms) == 1 else None
    if least is None:
        raise Unsupported("it compares hidden states")
    if least < -1e30:  # a guard against infinities
        return terms[0]
    return trace.space.apply(terms[0], lambda z: np.maximum(z, least), str(node))


@rule("Clip")
def _clip(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    bounds = [scalar(array(value), 0) for value in inputs[1:] if value is not None]
    bounds += [node.attributes[name] for name in ("min", "max") if name in node.attributes]
    if any(bound is None or abs(bound) < 1e4 for bound in bounds):
        raise Unsupported("it clips hidden states")
    return inputs[0]


@rule("Where")
def _where(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    condition, a, b = array(inputs[0]), inputs[1], inputs[2]
    for chosen, other in ((a, b), (b, a)):
        uniform = condition.all() if chosen is a else not condition.any()
        if uniform and isinstance(chosen, Term):
            shape = np.broadcast_shapes(condition.shape, chosen.shape, other.shape if other is not None else ())
            return chosen if chosen.shape == shape else trace.spread(chosen, shape)
    value, number = (a, b) if isinstance(a, Term) else (b, a)
    keep = condition if isinstance(a, Term) else ~condition
    value, fill = term(value), array(number)
    shape = np.broadcast_shapes(condition.shape, value.shape, fill.shape)
    value = trace.spread(value, shape)
    parts = tuple(
        Part(part.ids, np.where(keep, np.float32(1) if part.scale is None else part.scale, np.float32(0)))
        for part in value.parts
    )
    return Term(shape, parts, np.where(keep, np.float32(0) if value.shift is None else value.shift, widened(fill)))


def _swapped(array: Array) -> Array:
    return np.swapaxes(array, -1, -2)


@rule("MatMul", "com.microsoft::FusedMatMul", "MatMulInteger")
def _matmul(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    a, b = inputs[0], inputs[1]
    if node.attributes.get("transBatchA") or node.attributes.get("transBatchB"):
        raise Unsupported("it transposes its batch")
    if node.attributes.get("transA"):
        a = trace.space.view(term(a), _swapped)
    if node.attributes.get("transB"):
        b = trace.space.view(b, _swapped) if isinstance(b, Term) else Const(_swapped(array(b)))
    if isinstance(b, Term):
        result = trace.multiply(term(a), b, str(node))
    else:
        weight = array(b)
        if node.op == "MatMulInteger":
            weight = weight.astype(np.int32)
            if len(inputs) > 3 and inputs[3] is not None:
                weight = weight - array(inputs[3]).astype(np.int32)
        result = trace.linear(term(a), weight, str(node))
    return trace.space.times(result, np.array(node.attributes.get("alpha", 1.0), np.float32))


@rule("Gemm", "com.microsoft::GemmFastGelu", "com.microsoft::FusedGemm")
def _gemm(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    get = node.attributes.get
    bias = inputs[2] if len(inputs) > 2 else None
    if node.op == "com.microsoft::GemmFastGelu":
        x = trace.linear(term(inputs[0]), array(inputs[1]), str(node), None if bias is None else array(bias))
        return trace.space.apply(x, tanh_gelu, str(node))
    if get("transA") or get("alpha", 1.0) != 1 or get("activation"):
        raise Unsupported("it transposes, scales or activates, which GPT-2's matrix products do not")
    weight = array(inputs[1])
    weight = weight.T if get("transB") else weight
    result = trace.linear(term(inputs[0]), weight, str(node))
    if bias is None or get("beta", 1.0) == 0:
        return result
    if isinstance(bias, Term):
        return trace.space.sum(result, bias, str(node))
    return trace.space.plus(result, array(bias) * np.float32(get("beta", 1.0)))


@rule("Softmax")
def _softmax(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    x = term(inputs[0])
    axis = node.attributes.get("axis", -1 if trace.opset >= 13 else 1)
    if axis not in (-1, len(x.shape) - 1):
        raise Unsupported(f"its axis is {axis}, not the last one")
    return trace.softmax(x, str(node))


@rule("ReduceMean")
def _mean(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    x = term(inputs[0])
    axes = tuple(array(inputs[1])) if len(inputs) > 1 else node.attributes.get("axes", ())
    if axes not in ((-1,), (len(x.shape) - 1,)) or not node.attributes.get("keepdims", 1):
        raise Unsupported("it averages over other axes than the last one")
    return trace.space.mean(x, str(node))


@rule("LayerNormalization")
def _layer_norm(trace: Trace, node: Node, inputs: list[Value | None]) -> Any:
    x = term(inputs[0])
    if node.attributes.get("axis", -1) not in (-1, len(x.shape) - 1):
        raise Unsupported("it normalizes over more than the last axis")
    return layer_norm(trace, x, inputs[1], inputs[2] if len(inputs) > 2 else None, node)


def layer_norm(trace: Trace, x: Term, weight: Value | None, bias: Value | None, node: Node) -> Term:
    """LayerNorm over the last axis."""
    result = trace.space.normalize(x, node.attributes.get("epsilon", 1e-5), str(node))
    result = trace.space.times(result, array(weight))
    return result if bias is None else trace.space.plus(result, array(bias))
