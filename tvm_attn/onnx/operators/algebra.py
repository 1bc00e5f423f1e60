"""Matrix products, normalisation and softmax. Sums of 16-bit floats are formed in float32."""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from tvm_attn.onnx.converter import Known, Node, Operator, array_constant, cast, constant, equal_sizes, shape_of
from tvm_attn.onnx.operators.pointwise import binary

_op = relax.op
_NARROW = ("float16", "bfloat16")


def matmul(node: Node, a: relax.Expr, b: relax.Expr) -> relax.Expr:
    """NumPy's matrix product of two tensors of one dtype."""
    left, right = shape_of(a), shape_of(b)
    if not left or not right:
        raise node.error("a scalar has no matrix product")
    if not equal_sizes(left[-1], right[-2] if len(right) > 1 else right[0]):
        raise node.needs_shapes(f"matrices of shapes {left} and {right} cannot be shown to fit")
    dtype = str(a.ty.dtype)
    if dtype not in _NARROW:
        return node.emit(_op.matmul(a, b))
    return cast(node, node.emit(_op.matmul(a, b, out_dtype="float32")), dtype)


def _gemm(node: Node) -> relax.Expr:
    a, b = (_oriented(node, i, node.attributes.get(name, 0)) for i, name in enumerate(("transA", "transB")))
    result = _times(node, matmul(node, a, b), node.attributes.get("alpha", 1.0))
    if node.has(2):
        result = binary(node, _op.add, result, _times(node, node.tensor(2), node.attributes.get("beta", 1.0)))
    return result


def _oriented(node: Node, index: int, transposed: int) -> relax.Expr:
    """A matrix, or its transpose; that of a constant is a constant."""
    value = node.inputs[index]
    if transposed and isinstance(value, Known):
        return node.emit(array_constant(value.array.T))
    return node.emit(_op.permute_dims(node.tensor(index))) if transposed else node.tensor(index)


def _times(node: Node, x: relax.Expr, factor: float) -> relax.Expr:
    return x if factor == 1.0 else node.emit(_op.multiply(x, constant(factor, str(x.ty.dtype))))


def _layer_norm(node: Node) -> list[relax.Expr]:
    """Layer normalisation (Ba et al., arXiv:1607.06450): Y, and Mean and InvStdDev in the stash dtype."""
    x, dtype = _stashed(node)
    rank = len(shape_of(x))
    axes = list(range(node.axis(rank, -1), rank))
    epsilon = constant(node.attributes.get("epsilon", 1e-5), str(x.ty.dtype))
    mean = node.emit(_op.mean(x, axes, keepdims=True))
    centred = node.emit(_op.subtract(x, mean))
    variance = node.emit(_op.mean(node.emit(_op.multiply(centred, centred)), axes, keepdims=True))
    inverse = node.emit(_op.rsqrt(node.emit(_op.add(variance, epsilon))))
    y = cast(node, node.emit(_op.multiply(centred, inverse)), dtype)
    y = binary(node, _op.multiply, y, node.tensor(1))
    if node.has(2):
        y = binary(node, _op.add, y, node.tensor(2))
    return [y, mean, inverse]


def _rms_norm(node: Node) -> relax.Expr:
    """Root mean square normalisation (Zhang and Sennrich, arXiv:1910.07467)."""
    x, dtype = _stashed(node)
    rank = len(shape_of(x))
    axes = list(range(node.axis(rank, -1), rank))
    epsilon = constant(node.attributes.get("epsilon", 1e-5), str(x.ty.dtype))
    square = node.emit(_op.mean(node.emit(_op.multiply(x, x)), axes, keepdims=True))
    inverse = node.emit(_op.rsqrt(node.emit(_op.add(square, epsilon))))
    return binary(node, _op.multiply, cast(node, node.emit(_op.multiply(x, inverse)), dtype), node.tensor(1))


def _stashed(node: Node) -> tuple[relax.Expr, str]:
    """The input in the dtype of the statistics, and its own dtype."""
    x = node.tensor(0)
    dtype = str(x.ty.dtype)
    if node.attributes.get("stash_type", 1) != 1:
        raise node.error("stash_type must be 1, which is float32")
    return cast(node, x, "float32"), dtype


def softmax(node: Node, x: relax.Expr, axis: int) -> relax.Expr:
    """The softmax along an axis, in at least float32."""
    dtype = str(x.ty.dtype)
    return cast(node, node.emit(_op.nn.softmax(cast(node, x, "float32") if dtype in _NARROW else x, axis)), dtype)


def _softmax(node: Node) -> relax.Expr:
    return softmax(node, node.tensor(0), node.axis(len(node.shape(0)), -1))


def _log_softmax(node: Node) -> relax.Expr:
    x = node.tensor(0)
    dtype = str(x.ty.dtype)
    wide = cast(node, x, "float32") if dtype in _NARROW else x
    return cast(node, node.emit(_op.nn.log_softmax(wide, node.axis(len(shape_of(x)), -1))), dtype)


def _cumulative_sum(node: Node) -> relax.Expr:
    """Each element is a sum of its own, which is short in the masks of attention and needs no scan."""
    x = node.tensor(0)
    axis = node.normal(node.numbers(1)[0], len(shape_of(x)))
    exclusive, reverse = (bool(node.attributes.get(name, 0)) for name in ("exclusive", "reverse"))

    def sums(t: Any) -> Any:
        j = te.reduce_axis((0, t.shape[axis]), "j")

        def element(*index: Any) -> Any:
            near, far = (index[axis], j) if reverse else (j, index[axis])
            term = t(*(j if a == axis else i for a, i in enumerate(index)))
            return te.sum(tirx.if_then_else(near < far if exclusive else near <= far, term, tirx.const(0, t.dtype)), j)

        return te.compute(t.shape, element, name="cumsum")

    return node.compute(sums, x)


OPERATORS: dict[str, Operator] = {
    "MatMul": lambda node: matmul(node, node.tensor(0), node.tensor(1)),
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "CumSum": _cumulative_sum,
}
