"""Pointwise operators: one result per element, with NumPy's broadcasting.

Transcendental functions of 16-bit floats are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add, mul, sub
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from tvm_attn.onnx.converter import (
    Known,
    Node,
    Operator,
    Value,
    broadcast_known,
    cast,
    constant,
    dtype_name,
    equal_sizes,
    is_size,
    known,
    shape_of,
)
from tvm_attn.storage import numpy_dtype

_NARROW = ("float16", "bfloat16")
_op = relax.op


def in_float32(node: Node, x: relax.Expr, function: Callable[[relax.Expr], relax.Expr]) -> relax.Expr:
    """`function(x)`, computed in float32 if x has 16 bits."""
    dtype = str(x.ty.dtype)
    if dtype not in _NARROW:
        return node.emit(function(x))
    return cast(node, node.emit(function(cast(node, x, "float32"))), dtype)


def broadcast(node: Node, *tensors: relax.Expr) -> list[Any]:
    """The shape to which tensors are broadcast.

    Raises:
        NeedsInputs: two symbolic sizes may differ.
    """
    shapes = [shape_of(tensor) for tensor in tensors]
    result: list[Any] = []
    for place in range(1, max(map(len, shapes), default=0) + 1):
        sizes = [shape[-place] for shape in shapes if len(shape) >= place]
        wide = [size for size in sizes if not (isinstance(size, int) and size == 1)]
        for size in wide[1:]:
            if not equal_sizes(size, wide[0]):
                raise node.needs_shapes(f"sizes {wide[0]} and {size} must be the same")
        result.insert(0, wide[0] if wide else 1)
    return result


def binary(
    node: Node, function: Callable[[relax.Expr, relax.Expr], relax.Expr], a: relax.Expr, b: relax.Expr
) -> relax.Expr:
    """`function` of two tensors that are broadcast."""
    broadcast(node, a, b)
    return node.emit(function(a, b))


def _unary(function: Callable[[relax.Expr], relax.Expr]) -> Operator:
    return lambda node: in_float32(node, node.tensor(0), function)


def _sizes(node: Node, function: Callable[[Any, Any], Any]) -> Known | None:
    """The result for known whole numbers; None if the inputs are others."""
    pairs = _whole_numbers(node)
    if pairs is None:
        return None
    flat = [function(*(_term(e) for e in pair)) for pair in zip(*(a.reshape(-1) for a in pairs), strict=True)]
    return known(flat, pairs[0].shape)


def _whole_numbers(node: Node) -> list[np.ndarray] | None:
    """The inputs as arrays of one shape if they are known int64."""
    kinds = {value.dtype if isinstance(value, Known) else None for value in node.inputs}
    return broadcast_known(*node.inputs) if kinds == {"int64"} else None


def _term(number: Any) -> Any:
    return tirx.IntImm("int64", number) if isinstance(number, int) else number


def _arithmetic(
    function: Callable[[relax.Expr, relax.Expr], relax.Expr], of_sizes: Callable[[Any, Any], Any]
) -> Operator:
    def convert(node: Node) -> Value:
        return _sizes(node, of_sizes) or binary(node, function, node.tensor(0), node.tensor(1))

    return convert


def _comparison(function: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Operator:
    return lambda node: binary(node, function, node.tensor(0), node.tensor(1))


def _equal(node: Node) -> Value:
    decided = _equal_sizes(node)
    return binary(node, _op.equal, node.tensor(0), node.tensor(1)) if decided is None else decided


def _equal_sizes(node: Node) -> Known | None:
    """Equality of known numbers: a size is never negative, which exporters ask about; None if undecided."""
    pairs = _whole_numbers(node)
    if pairs is None:
        return None
    found = []
    for a, b in zip(*(array.reshape(-1) for array in pairs), strict=True):
        number, size = (a, b) if isinstance(a, int) else (b, a)
        if isinstance(number, int) and number < 0 and not isinstance(size, int) and is_size(size):
            found.append(False)
        elif (isinstance(a, int) and isinstance(b, int)) or equal_sizes(a, b):
            found.append(equal_sizes(a, b))
        else:
            return None
    return Known(np.array(found, bool).reshape(pairs[0].shape))


def _quotient(a: Any, b: Any) -> Any:
    """Integer division, which truncates; of sizes it is the one that TVM simplifies."""
    return (tirx.floordiv if is_size(a) and is_size(b) else tirx.truncdiv)(a, b)


def _power(node: Node) -> relax.Expr:
    """Powers; small whole exponents are products, which are exact and defined for negative bases everywhere."""
    base, exponent = node.tensor(0), node.inputs[1]
    dtype = str(base.ty.dtype)
    if isinstance(exponent, Known) and exponent.array.size == 1 and exponent.array.ndim <= len(shape_of(base)):
        number = float(exponent.array.reshape(()).item())
        if number in (1.0, 2.0, 3.0):
            return node.emit(reduce(_op.multiply, [base] * int(number)))
        if number == 0.5:
            return in_float32(node, base, _op.sqrt)
    wide = "float64" if dtype.startswith(("int", "uint", "float64")) else "float32"
    a, b = cast(node, base, wide), cast(node, node.tensor(1), wide)
    result = binary(node, _op.power, a, b)
    if dtype.startswith(("int", "uint")):
        result = node.emit(_op.round(result))
    return cast(node, result, dtype)


def _where(node: Node) -> Value:
    condition, left, right = node.inputs
    numbers = broadcast_known(condition, left, right)
    if numbers is not None and node.dtype(1) == "int64" and not condition.symbolic:  # type: ignore[union-attr]
        return known(np.where(numbers[0].astype(bool), *numbers[1:]))
    tensors = [node.tensor(i) for i in range(3)]
    broadcast(node, *tensors)
    return node.emit(_op.where(*tensors))


def _cast(node: Node) -> Value:
    return _cast_to(node, dtype_name(node.attributes["to"]))


def _cast_like(node: Node) -> Value:
    return _cast_to(node, node.dtype(1))


def _cast_to(node: Node, dtype: str) -> Value:
    value = node.inputs[0]
    if isinstance(value, Known) and (dtype == "int64" or not value.symbolic):
        if value.symbolic:
            return value
        with np.errstate(all="ignore"):
            return Known(value.array.astype(numpy_dtype(dtype)))
    x = node.tensor(0)
    if dtype == "bool":
        return node.emit(_op.not_equal(x, constant(0, str(x.ty.dtype))))
    return cast(node, x, dtype)


def _variadic(
    function: Callable[[relax.Expr, relax.Expr], relax.Expr], of_sizes: Callable[[Any, Any], Any]
) -> Operator:
    def convert(node: Node) -> Value:
        if len(node.inputs) == 2 and (found := _sizes(node, of_sizes)):
            return found
        return reduce(lambda a, b: binary(node, function, a, b), [node.tensor(i) for i in range(len(node.inputs))])

    return convert


def _mean(node: Node) -> relax.Expr:
    total = _OF_TENSORS["Sum"](node)
    assert not isinstance(total, Known)
    return node.emit(_op.divide(total, constant(len(node.inputs), str(total.ty.dtype))))


def _clip(node: Node) -> relax.Expr:
    x = node.tensor(0)
    for index, function in ((1, _op.maximum), (2, _op.minimum)):
        if node.has(index):
            x = binary(node, function, x, node.tensor(index))
    return x


def _gelu(node: Node) -> relax.Expr:
    approximate = node.attributes.get("approximate", b"none")
    if approximate not in (b"none", b"tanh"):
        raise node.error("approximate must be none or tanh")
    return in_float32(node, node.tensor(0), _op.nn.gelu if approximate == b"none" else _op.nn.gelu_tanh)


def _reciprocal(x: relax.Expr) -> relax.Expr:
    return _op.divide(constant(1, str(x.ty.dtype)), x)


def _is_inf(node: Node) -> relax.Expr:
    x = cast(node, node.tensor(0), "float32") if node.dtype(0) in _NARROW else node.tensor(0)
    dtype, found = str(x.ty.dtype), []
    for name, sign in (("detect_positive", 1), ("detect_negative", -1)):
        if node.attributes.get(name, 1):
            found.append(node.emit(_op.equal(x, constant(sign * np.inf, dtype))))
    if not found:
        return node.emit(_op.zeros(x.ty.shape, "bool"))
    return reduce(lambda a, b: node.emit(_op.logical_or(a, b)), found)


def _dropout(node: Node) -> list[Any]:
    """Dropout outside training: the input itself."""
    if node.has(2) and bool(np.any(node.known(2))):
        raise node.error("training_mode is not supported")
    x = node.inputs[0]
    mask = Known(np.ones((), bool)) if not node.wants(1) else node.emit(_op.ones(node.tensor(0).ty.shape, "bool"))
    return [x, mask]


def _is_nan(node: Node) -> relax.Expr:
    x = cast(node, node.tensor(0), "float32") if node.dtype(0) in _NARROW else node.tensor(0)
    return node.compute(lambda t: te.compute(t.shape, lambda *i: tirx.isnan(t(*i)), name="is_nan"), x)


def _mod(node: Node) -> relax.Expr:
    integers = not node.dtype(0).startswith(("float", "bfloat"))
    if node.attributes.get("fmod", 0) or not integers:
        raise node.error("Mod of floats, or with fmod=1, is not supported")
    return binary(node, _op.floor_mod, node.tensor(0), node.tensor(1))


_OF_TENSORS: dict[str, Operator] = {
    "Max": _variadic(_op.maximum, tirx.max),
    "Min": _variadic(_op.minimum, tirx.min),
    "Sum": _variadic(_op.add, add),
}

OPERATORS: dict[str, Operator] = {
    **_OF_TENSORS,
    "Abs": lambda node: node.emit(_op.abs(node.tensor(0))),
    "Neg": lambda node: node.emit(_op.negative(node.tensor(0))),
    "Not": lambda node: node.emit(_op.logical_not(node.tensor(0))),
    "Relu": lambda node: node.emit(_op.nn.relu(node.tensor(0))),
    "Identity": lambda node: node.inputs[0],
    "Dropout": _dropout,
    "Ceil": _unary(_op.ceil),
    "Cos": _unary(_op.cos),
    "Erf": _unary(_op.erf),
    "Exp": _unary(_op.exp),
    "Floor": _unary(_op.floor),
    "Log": _unary(_op.log),
    "Reciprocal": _unary(_reciprocal),
    "Sigmoid": _unary(_op.sigmoid),
    "Sin": _unary(_op.sin),
    "Sqrt": _unary(_op.sqrt),
    "Tanh": _unary(_op.tanh),
    "Add": _arithmetic(_op.add, add),
    "Sub": _arithmetic(_op.subtract, sub),
    "Mul": _arithmetic(_op.multiply, mul),
    "Div": _arithmetic(_op.divide, _quotient),
    "Pow": _power,
    "Mod": _mod,
    "Equal": _equal,
    "Less": _comparison(_op.less),
    "LessOrEqual": _comparison(_op.less_equal),
    "Greater": _comparison(_op.greater),
    "GreaterOrEqual": _comparison(_op.greater_equal),
    "And": lambda node: binary(node, _op.logical_and, node.tensor(0), node.tensor(1)),
    "Or": lambda node: binary(node, _op.logical_or, node.tensor(0), node.tensor(1)),
    "Xor": lambda node: binary(node, _op.logical_xor, node.tensor(0), node.tensor(1)),
    "Mean": _mean,
    "Where": _where,
    "Clip": _clip,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Gelu": _gelu,
    "IsInf": _is_inf,
    "IsNaN": _is_nan,
}
