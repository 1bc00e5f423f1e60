"""ONNX's operators on NumPy arrays, as far as exporters use them to compute shapes, positions and masks.

The definitions: https://onnx.ai/onnx/operators. What an operator allocates is bounded before it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from tvm_attn.errors import OnnxError
from tvm_attn.onnx import require_onnx
from tvm_attn.onnx.reader import Node, Tensor

MAX_ELEMENTS = 1 << 27
"""Most elements of a computed tensor."""
Array = np.ndarray
Inputs = Sequence[Array | None]


class Unsupported(Exception):
    """The operator, or this use of it, is not known here; the message says what."""


def evaluate(node: Node, inputs: Inputs, opset: int) -> list[Array]:
    """The outputs of a node whose inputs are constants.

    Args:
        node: an operator of ONNX's own domain.
        inputs: its inputs; None for an optional one that is absent.
        opset: the version of the operator.

    Raises:
        Unsupported: the operator is unknown, or its inputs do not fit it.
    """
    function = OPERATORS.get(node.op)
    if function is None:
        raise Unsupported("the operator is not supported here")
    try:
        with np.errstate(all="ignore"):
            found = function(_Call(node.attributes, inputs, opset, len(node.outputs)))
    except OnnxError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise Unsupported(f"its inputs do not fit it ({' '.join(str(error).split())[:120]})") from None
    return [np.asarray(array) for array in (found if isinstance(found, list) else [found])]


class _Call:
    """Arguments of one operator."""

    def __init__(self, attributes: Mapping[str, Any], inputs: Inputs, opset: int, outputs: int) -> None:
        self.attributes, self.inputs, self.opset, self.outputs = attributes, inputs, opset, outputs

    def __getitem__(self, index: int) -> Array:
        array = self.get(index)
        if array is None:
            raise ValueError(f"input {index} is absent")
        return array

    def get(self, index: int) -> Array | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def ints(self, index: int, name: str) -> tuple[int, ...] | None:
        """A list of integers: an input in newer opsets, an attribute in older ones."""
        array = self.get(index)
        if array is not None:
            return tuple(int(number) for number in array.reshape(-1))
        return self.attributes.get(name)

    def attribute(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)


def bounded(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape, if a tensor of it may be allocated."""
    if any(size < 0 for size in shape) or prod(shape) > MAX_ELEMENTS:
        raise ValueError(f"a tensor of shape {tuple(shape)[:6]} is too large")
    return tuple(int(size) for size in shape)


def _elementwise(function: Callable[..., Any]) -> Callable[[_Call], Array]:
    def apply(call: _Call) -> Array:
        arrays = [call[index] for index in range(len(call.inputs))]
        bounded(np.broadcast_shapes(*(array.shape for array in arrays)))
        result: Array = function(*arrays)
        return result

    return apply


def _folded(function: Callable[[Array, Array], Array]) -> Callable[[_Call], Array]:
    def fold(*arrays: Array) -> Array:
        result = arrays[0]
        for array in arrays[1:]:
            result = function(result, array)
        return result

    return _elementwise(fold)


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu":  # towards zero, as in C
        if not np.all(b):
            raise ValueError("division by zero")
        quotient = np.abs(a) // np.abs(b)
        return (quotient * (np.sign(a) * np.sign(b))).astype(a.dtype)
    return a / b


def _mod(call: _Call) -> Array:
    a, b = call[0], call[1]
    if a.dtype.kind in "iu" and not np.all(b):
        raise ValueError("division by zero")
    return np.fmod(a, b) if call.attribute("fmod", 0) else np.mod(a, b)


def _power(a: Array, b: Array) -> Array:
    return np.power(a.astype(np.float64), b.astype(np.float64)).astype(a.dtype)


def _cast(call: _Call) -> Array:
    helper = require_onnx().helper
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(call.attribute("to")))
    return call[0].astype(dtype)


def _constant(call: _Call) -> Array:
    for name, value in call.attributes.items():
        if isinstance(value, Tensor):
            return value.array()
        dtype = np.float32 if name.startswith("value_float") else np.int64
        if name.startswith(("value_float", "value_int")):
            return np.array(value, dtype)
    raise ValueError("it has no numbers")


def _constant_of_shape(call: _Call) -> Array:
    value = call.attribute("value")
    fill = value.array().reshape(()) if isinstance(value, Tensor) else np.float32(0)
    return np.full(bounded([int(size) for size in call[0]]), fill)


def _range(call: _Call) -> Array:
    start, limit, delta = (call[index].reshape(()) for index in range(3))
    count = max(int(np.ceil((float(limit) - float(start)) / float(delta))), 0)
    return (start + np.arange(bounded([count])[0]) * delta).astype(start.dtype)


def _shape(call: _Call) -> Array:
    return np.array(call[0].shape[call.attribute("start", 0) : call.attribute("end")], np.int64)


def new_shape(shape: Sequence[int], wanted: Sequence[int], allow_zero: bool = False) -> tuple[int, ...]:
    """The shape that Reshape gives: 0 keeps a size, -1 is what remains."""
    sizes = [shape[axis] if size == 0 and not allow_zero else int(size) for axis, size in enumerate(wanted)]
    if -1 in sizes:
        known = prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = prod(shape) // known if known else 0
    if prod(sizes) != prod(shape):
        raise ValueError(f"{tuple(shape)} cannot become {tuple(sizes)}")
    return tuple(sizes)


def _reshape(call: _Call) -> Array:
    return call[0].reshape(new_shape(call[0].shape, call.ints(1, "shape") or (), bool(call.attribute("allowzero"))))


def _flatten(call: _Call) -> Array:
    axis, shape = call.attribute("axis", 1), call[0].shape
    axis += len(shape) if axis < 0 else 0
    return call[0].reshape(prod(shape[:axis]), prod(shape[axis:]))


def _squeeze(call: _Call) -> Array:
    return np.squeeze(call[0], call.ints(1, "axes"))


def _unsqueeze(call: _Call) -> Array:
    return np.expand_dims(call[0], call.ints(1, "axes") or ())


def _transpose(call: _Call) -> Array:
    return np.transpose(call[0], call.attribute("perm"))


def _expand(call: _Call) -> Array:
    shape = np.broadcast_shapes(call[0].shape, bounded(call.ints(1, "shape") or ()))
    return np.broadcast_to(call[0], bounded(shape))


def _tile(call: _Call) -> Array:
    repeats = call.ints(1, "repeats") or ()
    bounded([size * count for size, count in zip(call[0].shape, repeats, strict=True)])
    return np.tile(call[0], repeats)


def _slice(call: _Call) -> Array:
    starts, ends = call.ints(1, "starts") or (), call.ints(2, "ends") or ()
    axes = call.ints(3, "axes") or tuple(range(len(starts)))
    steps = call.ints(4, "steps") or (1,) * len(starts)
    index: list[Any] = [slice(None)] * call[0].ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = call[0].shape[axis]
        before = step < 0 and end < -size  # before the first element
        index[axis] = slice(start, None if before else end, step)
    return call[0][tuple(index)]


def _split(call: _Call) -> list[Array]:
    axis, sizes = call.attribute("axis", 0), call.ints(1, "split")
    if sizes is None:
        count = call.attribute("num_outputs", call.outputs)
        part = -(-call[0].shape[axis] // count)
        sizes = tuple(min(part, call[0].shape[axis] - part * index) for index in range(count))
    if sum(sizes) != call[0].shape[axis] or min(sizes) < 0:
        raise ValueError(f"{call[0].shape} cannot be split into {sizes}")
    return list(np.split(call[0], np.cumsum(sizes)[:-1], axis))


def _concat(call: _Call) -> Array:
    arrays = [call[index] for index in range(len(call.inputs))]
    axis = call.attribute("axis", 1)
    bounded([sum(array.shape[axis] for array in arrays) if i == axis else n for i, n in enumerate(arrays[0].shape)])
    full = [array for array in arrays if array.size]  # an empty past may lack the other sizes
    return np.concatenate(full or arrays[:1], axis)


def _gather(call: _Call) -> Array:
    data, indices, axis = call[0], call[1], call.attribute("axis", 0)
    bounded([*data.shape[:axis], *indices.shape, *data.shape[axis:][1:]])
    return np.take(data, indices.astype(np.int64), axis)


def _gather_nd(call: _Call) -> Array:
    data, indices, batch = call[0], call[1].astype(np.int64), call.attribute("batch_dims", 0)
    depth = indices.shape[-1]
    bounded([*indices.shape[:-1], *data.shape[batch + depth :]])
    lead: Sequence[Array] = np.indices(indices.shape[:batch], sparse=True) if batch else ()
    shape = indices.shape[:-1]
    grid = [axis.reshape(axis.shape + (1,) * (len(shape) - batch)) for axis in lead]
    return data[tuple(grid) + tuple(indices[..., i] for i in range(depth))]


def _gather_elements(call: _Call) -> Array:
    return np.take_along_axis(call[0], call[1].astype(np.int64), call.attribute("axis", 0))


def _scatter_nd(call: _Call) -> Array:
    result, indices = call[0].copy(), call[1].astype(np.int64)
    if call.attribute("reduction", "none") != "none":
        raise ValueError("a reduction")
    result[tuple(np.moveaxis(indices, -1, 0))] = call[2]
    return result


def _scatter_elements(call: _Call) -> Array:
    result = call[0].copy()
    if call.attribute("reduction", "none") != "none":
        raise ValueError("a reduction")
    np.put_along_axis(result, call[1].astype(np.int64), call[2], call.attribute("axis", 0))
    return result


def _tensor_scatter(call: _Call) -> Array:
    result, update, axis = call[0].copy(), call[1], call.attribute("axis", -2) % call[0].ndim
    starts = call.get(2)
    for row in range(len(result)):
        start = 0 if starts is None else int(starts.reshape(-1)[row])
        places = np.arange(start, start + update.shape[axis])
        if call.attribute("mode", "linear") == "circular":
            places %= result.shape[axis]
        np.moveaxis(result[row], axis - 1, 0)[places] = np.moveaxis(update[row], axis - 1, 0)
    return result


def _cumsum(call: _Call) -> Array:
    data, axis = call[0], int(call[1].reshape(()))
    data = np.flip(data, axis) if call.attribute("reverse", 0) else data
    result = np.cumsum(data, axis, dtype=data.dtype)
    result = result - data if call.attribute("exclusive", 0) else result
    return np.flip(result, axis) if call.attribute("reverse", 0) else result


def _trilu(call: _Call) -> Array:
    diagonal = call.get(1)
    k = 0 if diagonal is None else int(diagonal.reshape(()))
    return np.triu(call[0], k) if call.attribute("upper", 1) else np.tril(call[0], k)


def _reduce(function: Callable[..., Any]) -> Callable[[_Call], Array]:
    def apply(call: _Call) -> Array:
        axes = call.ints(1, "axes") or None
        if axes is None and call.attribute("noop_with_empty_axes", 0):
            return call[0]
        result: Array = function(call[0], axis=axes, keepdims=bool(call.attribute("keepdims", 1)))
        return result.astype(call[0].dtype)

    return apply


def _extreme_index(function: Callable[..., Any]) -> Callable[[_Call], Array]:
    def apply(call: _Call) -> Array:
        axis = call.attribute("axis", 0)
        return np.asarray(function(call[0], axis=axis, keepdims=bool(call.attribute("keepdims", 1))), np.int64)

    return apply


def _clip(call: _Call) -> Array:
    low, high = (call.get(1), call.get(2)) if call.opset >= 11 else (None, None)
    low = call.attribute("min") if low is None else low
    high = call.attribute("max") if high is None else high
    return call[0] if low is None and high is None else np.clip(call[0], low, high).astype(call[0].dtype)


def _one_hot(call: _Call) -> Array:
    indices, depth, values = call[0].astype(np.int64), int(call[1].reshape(())), call[2]
    bounded([*indices.shape, depth])
    if call.attribute("axis", -1) != -1:
        raise ValueError("another axis than the last")
    return np.where(
        np.arange(depth) == np.where(indices < 0, indices + depth, indices)[..., None], values[1], values[0]
    )


def _pad(call: _Call) -> Array:
    pads = call.ints(1, "pads") or ()
    if call.attribute("mode", "constant") != "constant" or call.get(3) is not None:
        raise ValueError("another padding than constant numbers on all axes")
    value = call.get(2)
    half = len(pads) // 2
    widths = list(zip(pads[:half], pads[half:], strict=True))
    bounded([size + sum(width) for size, width in zip(call[0].shape, widths, strict=True)])
    return np.pad(call[0], widths, constant_values=0 if value is None else value.reshape(()).item())


def _dequantize(call: _Call) -> Array:
    data, scale, zero = call[0], call[1], call.get(2)
    return dequantized(data, scale, zero, call.attribute("axis", 1), call.attribute("block_size", 0))


def dequantized(data: Array, scale: Array, zero: Array | None, axis: int = 1, block: int = 0) -> Array:
    """(data - zero) * scale, with a scale for all, for each index of an axis, or for each block of an axis."""

    def spread(array: Array) -> Array:
        if array.size == 1:
            return array.reshape(())
        if block:
            return np.repeat(array, block, axis).take(range(data.shape[axis]), axis)
        shape = [1] * data.ndim
        shape[axis] = array.size
        return array.reshape(shape)

    values = data.astype(np.float32)
    if zero is not None:
        values = values - spread(zero).astype(np.float32)
    result: Array = values * spread(scale)
    return result


def _softmax(call: _Call) -> Array:
    shifted = call[0] - call[0].max(axis=call.attribute("axis", -1), keepdims=True)
    exponents = np.exp(shifted)
    return exponents / exponents.sum(axis=call.attribute("axis", -1), keepdims=True)


def _isinf(call: _Call) -> Array:
    positive, negative = call.attribute("detect_positive", 1), call.attribute("detect_negative", 1)
    return np.isinf(call[0]) & ((call[0] > 0) & bool(positive) | (call[0] < 0) & bool(negative))


OPERATORS: dict[str, Callable[[_Call], Array | list[Array]]] = {
    "Abs": _elementwise(np.abs),
    "Add": _elementwise(np.add),
    "And": _elementwise(np.logical_and),
    "ArgMax": _extreme_index(np.argmax),
    "ArgMin": _extreme_index(np.argmin),
    "Cast": _cast,
    "CastLike": lambda call: call[0].astype(call[1].dtype),
    "Ceil": _elementwise(np.ceil),
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Cos": _elementwise(np.cos),
    "CumSum": _cumsum,
    "DequantizeLinear": _dequantize,
    "Div": _elementwise(_divide),
    "Dropout": lambda call: call[0],
    "Equal": _elementwise(np.equal),
    "Exp": _elementwise(np.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _elementwise(np.floor),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Greater": _elementwise(np.greater),
    "GreaterOrEqual": _elementwise(np.greater_equal),
    "Identity": lambda call: call[0],
    "IsInf": _isinf,
    "IsNaN": _elementwise(np.isnan),
    "Less": _elementwise(np.less),
    "LessOrEqual": _elementwise(np.less_equal),
    "Log": _elementwise(np.log),
    "MatMul": lambda call: _product(call[0], call[1]),
    "Max": _folded(np.maximum),
    "Min": _folded(np.minimum),
    "Mod": _mod,
    "Mul": _elementwise(np.multiply),
    "Neg": _elementwise(np.negative),
    "NonZero": lambda call: np.array(np.nonzero(call[0]), np.int64),
    "Not": _elementwise(np.logical_not),
    "OneHot": _one_hot,
    "Or": _elementwise(np.logical_or),
    "Pad": _pad,
    "Pow": _elementwise(_power),
    "Range": _range,
    "Reciprocal": _elementwise(np.reciprocal),
    "ReduceMax": _reduce(np.max),
    "ReduceMean": _reduce(np.mean),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Relu": _elementwise(lambda x: np.maximum(x, 0)),
    "Reshape": _reshape,
    "Round": _elementwise(np.round),
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Sign": _elementwise(np.sign),
    "Sin": _elementwise(np.sin),
    "Size": lambda call: np.array(call[0].size, np.int64),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _elementwise(np.sqrt),
    "Squeeze": _squeeze,
    "Sub": _elementwise(np.subtract),
    "Sum": _folded(np.add),
    "TensorScatter": _tensor_scatter,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": _elementwise(np.where),
    "Xor": _elementwise(np.logical_xor),
}


def _product(a: Array, b: Array) -> Array:
    bounded([*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2] if a.ndim > 1 else 1, b.shape[-1]])
    if a.size * b.shape[-1] > MAX_ELEMENTS:
        raise ValueError("a product of large constants")
    return a @ b
