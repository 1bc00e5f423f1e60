"""Operators that make, move and select elements."""

from __future__ import annotations

from math import ceil, prod
from typing import Any

import numpy as np
from tvm import relax, sym, te, tirx
from tvm.ir import Expr

from tvm_attn.onnx import require_onnx
from tvm_attn.onnx.converter import (
    Known,
    Node,
    Operator,
    Value,
    array_constant,
    constant,
    equal_sizes,
    is_size,
    known,
    shape_of,
)
from tvm_attn.storage import numpy_dtype

_op = relax.op
_FOLDED = 1 << 16
"""Most numbers that are made when the graph is converted."""
_ENDS = 1 << 31
"""Bounds of slices beyond this mean the end of a dimension."""


def _sizes(node: Node, index: int) -> list[Any]:
    """The elements of a vector of sizes."""
    return list(node.known(index).reshape(-1))


def _simplified(size: Any) -> Any:
    return known([size]).array[0] if not isinstance(size, int) else size


def _shape(node: Node) -> Value:
    shape = node.shape(0)
    return known(shape[node.attributes.get("start", 0) : node.attributes.get("end", len(shape))])


def _size(node: Node) -> Value:
    return known(prod(node.shape(0)), ())


def _constant(node: Node) -> Value:
    onnx = require_onnx()
    (name, value), *rest = node.attributes.items()
    if rest or name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise node.error("only the attributes value, value_float(s) and value_int(s) are supported")
    if name == "value":
        return Known(onnx.numpy_helper.to_array(value))
    return Known(np.array(value, np.float32 if "float" in name else np.int64))


def _constant_of_shape(node: Node) -> Value:
    tensor = node.attributes.get("value")
    value = np.zeros(1, np.float32) if tensor is None else require_onnx().numpy_helper.to_array(tensor)
    shape = _sizes(node, 0)
    if all(isinstance(size, int | np.integer) for size in shape) and prod(map(int, shape)) <= _FOLDED:
        return Known(np.full([int(size) for size in shape], value.reshape(())))
    return node.emit(_op.broadcast_to(array_constant(value.reshape(())), relax.ShapeExpr(_dims(shape))))


def _dims(shape: list[Any]) -> list[Any]:
    return [int(size) if isinstance(size, int | np.integer) else size for size in shape]


def _range(node: Node) -> Value:
    start, limit, step = (node.known(i).reshape(-1)[0] for i in range(3))
    dtype = node.dtype(0)
    if not any(isinstance(e, Expr) for e in (start, limit, step)):
        start, limit, step = (e.item() if isinstance(e, np.generic) else e for e in (start, limit, step))
        count = max(ceil((limit - start) / step), 0) if step else 0
        if not step:
            raise node.error("the step is 0")
        if count <= _FOLDED:
            return Known((start + np.arange(count) * step).astype(numpy_dtype(dtype)))
        return node.compute(
            lambda: te.compute((count,), lambda i: tirx.Cast(dtype, i) * _scalar(step, dtype) + _scalar(start, dtype))
        )
    if int(step) != 1:
        raise node.needs_shapes("a range of symbolic length needs the step 1")
    count = _simplified(limit - start)
    return node.compute(
        lambda first, n: te.compute((n,), lambda i: tirx.Cast("int64", i) + first, name="range"),
        _term(start),
        _term(count),
    )


def _scalar(number: Any, dtype: str) -> Any:
    return tirx.const(float(number) if "float" in dtype else int(number), dtype)


def _term(number: Any) -> Any:
    return tirx.IntImm("int64", int(number)) if isinstance(number, int | np.integer) else number


def _reshape(node: Node) -> Value:
    wanted, shape = _sizes(node, 1), node.shape(0)
    keep = not node.attributes.get("allowzero", 0)
    target: list[Any] = []
    for place, size in enumerate(wanted):
        zero = isinstance(size, int | np.integer) and size == 0
        if zero and keep and place >= len(shape):
            raise node.error(f"dimension {place} of the shape is 0, and the input has {len(shape)} dimensions")
        target.append(shape[place] if zero and keep else size)
    free = [place for place, size in enumerate(target) if isinstance(size, int | np.integer) and size == -1]
    if len(free) > 1:
        raise node.error("the shape has -1 twice")
    if free:
        rest = prod(size for place, size in enumerate(target) if place != free[0])
        target[free[0]] = _quotient(node, shape, target, free[0]) if not isinstance(rest, int) or rest else 0
    return _reshaped(node, target)


def _quotient(node: Node, shape: list[Any], target: list[Any], free: int) -> Any:
    """The size that -1 stands for; sizes that occur on both sides cancel."""
    left, right = list(shape), [size for place, size in enumerate(target) if place != free]
    for size in list(right):
        for other in left:
            if not isinstance(size, int | np.integer) and not isinstance(other, int) and equal_sizes(size, other):
                left.remove(other)
                right.remove(size)
                break
    total, rest = prod(left), prod(right)
    if isinstance(total, int) and isinstance(rest, int | np.integer):
        if total % int(rest):
            raise node.error(f"{total} elements cannot be divided by {rest}")
        return total // int(rest)
    return _simplified(tirx.floordiv(_term(total), _term(rest)))


def _reshaped(node: Node, target: list[Any]) -> Value:
    target = _dims(target)
    value = node.inputs[0]
    if isinstance(value, Known) and all(isinstance(size, int) for size in target):
        return Known(value.array.reshape(target))
    total, wanted = (_term(prod(sizes)) for sizes in (node.shape(0), target))
    if not sym.Analyzer().can_prove_equal(total, wanted):
        raise node.needs_shapes(f"{total} elements cannot be shown to fit the shape {target}")
    if isinstance(wanted, tirx.IntImm) and wanted.value == 0:
        # Computed from the input, as TVM would fold zeros to a constant, and loads no empty constants.
        return node.compute(
            lambda t: te.compute(target, lambda *_: t(*[0] * len(t.shape)), name="empty"), node.tensor(0)
        )
    return node.emit(_op.reshape(node.tensor(0), relax.ShapeExpr(target)))


def _flatten(node: Node) -> Value:
    shape = node.shape(0)
    axis = node.attributes.get("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return _reshaped(node, [prod(shape[:axis]), prod(shape[axis:])])


def _transpose(node: Node) -> Value:
    rank = len(node.shape(0))
    order = list(node.attributes.get("perm", reversed(range(rank))))
    if sorted(order) != list(range(rank)):
        raise node.error(f"perm {order} does not order {rank} dimensions")
    value = node.inputs[0]
    if isinstance(value, Known):
        return Known(value.array.transpose(order))
    return node.emit(_op.permute_dims(value, order)) if rank > 1 else node.tensor(0)


def _axes(node: Node, rank: int) -> list[int] | None:
    """The axes of Squeeze and Unsqueeze, an input since opset 13."""
    return [node.normal(axis, rank) for axis in node.numbers(1)] if node.has(1) else None


def _squeeze(node: Node) -> Value:
    shape = node.shape(0)
    axes = _axes(node, len(shape))
    if axes is None:
        axes = [axis for axis, size in enumerate(shape) if isinstance(size, int) and size == 1]
    for axis in axes:
        if not (isinstance(shape[axis], int) and shape[axis] == 1):
            raise node.needs_shapes(f"dimension {axis} has size {shape[axis]}, not 1")
    return _reshaped(node, [size for axis, size in enumerate(shape) if axis not in axes])


def _unsqueeze(node: Node) -> Value:
    rest, count = node.shape(0), len(node.numbers(1))
    axes = _axes(node, len(rest) + count)
    if axes is None or len(set(axes)) < count:
        raise node.error("axes must be given, each once")
    sizes = iter(rest)
    return _reshaped(node, [1 if axis in axes else next(sizes) for axis in range(len(rest) + count)])


def _concat(node: Node) -> Value:
    rank = len(node.shape(0))
    axis = node.axis(rank)
    if all(isinstance(value, Known) for value in node.inputs):
        arrays = [value.array for value in node.inputs]  # type: ignore[union-attr]
        if any(array.dtype == object for array in arrays):
            return known(np.concatenate([array.astype(object) for array in arrays], axis))
        return Known(np.concatenate(arrays, axis))
    parts = [node.tensor(i) for i in range(len(node.inputs))]
    for part in parts[1:]:
        for place, (size, other) in enumerate(zip(shape_of(parts[0]), shape_of(part), strict=True)):
            if place != axis and not equal_sizes(size, other):
                raise node.needs_shapes(f"sizes {size} and {other} must be the same")
    # Empty parts, such as a first call's past, cost nothing at run time; a static one is left out.
    full = [p for p in parts if not (isinstance(shape_of(p)[axis], int) and shape_of(p)[axis] == 0)] or parts[:1]
    return node.emit(_op.concat(full, axis)) if len(full) > 1 else full[0]


def _split(node: Node) -> Any:
    shape = node.shape(0)
    axis = node.axis(len(shape))
    size, count = shape[axis], len(node.proto.output)
    if node.has(1):
        sizes = node.numbers(1)
    elif isinstance(size, int):
        count = node.attributes.get("num_outputs", count)
        part = ceil(size / count)
        sizes = [max(min(part, size - part * i), 0) for i in range(count)]
    else:
        raise node.needs_shapes(f"size {size} is to be split evenly")
    if isinstance(size, int) and sum(sizes) != size:
        raise node.error(f"the parts {sizes} do not make {size}")
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_sliced(node, {axis: (begin, part, 1)}) for begin, part in zip(begins, sizes, strict=True)]


def _slice(node: Node) -> Value:
    shape = node.shape(0)
    starts, ends = _sizes(node, 1), _sizes(node, 2)
    axes = [node.normal(axis, len(shape)) for axis in node.numbers(3)] if node.has(3) else list(range(len(starts)))
    steps = node.numbers(4) if node.has(4) else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise node.error("starts, ends, axes and steps must have the same length, and no step may be 0")
    parts = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        parts[axis] = _part(node, start, end, step, shape[axis])
    return _sliced(node, parts)


def _part(node: Node, start: Any, end: Any, step: int, size: Any) -> tuple[Any, Any, int]:
    """First index, length and step of a slice."""
    if all(isinstance(e, int | np.integer) for e in (start, end, size)):
        indices = range(size)[slice(int(start), int(end) if end >= -size - 1 else None, step)]
        if step < 0 and end < -size:  # before the first element
            indices = range(size)[slice(int(start), None, step)]
        return (indices.start if len(indices) else 0), len(indices), step
    if step != 1:
        raise node.needs_shapes(f"size {size} is sliced with step {step}")
    begin, stop = (_bound(node, bound, size) for bound in (start, end))
    return begin, _simplified(tirx.max(_term(stop) - _term(begin), tirx.IntImm("int64", 0))), 1


def _bound(node: Node, bound: Any, size: Any) -> Any:
    """A bound of a slice as an index from 0 to `size`."""
    if isinstance(bound, int | np.integer):
        if bound >= _ENDS:
            return size
        if bound == 0 or bound <= -_ENDS:
            return 0
        whole = size + int(bound) if bound < 0 else int(bound)
    else:
        if equal_sizes(bound, size):
            return size
        whole = bound  # an expression of sizes, which is not negative where its result is used
        if not sym.Analyzer().can_prove(whole >= 0) and not is_size(whole):
            raise node.needs_shapes(f"the bound {bound} of a slice may be negative")
    zero = tirx.IntImm("int64", 0)
    return _simplified(tirx.max(tirx.min(_term(whole), _term(size)), zero))


def _sliced(node: Node, parts: dict[int, tuple[Any, Any, int]]) -> Value:
    """The elements `begin + i * step` of axes: {axis: (begin, length, step)}."""
    value, shape = node.inputs[0], node.shape(0)
    if isinstance(value, Known) and all(isinstance(e, int) for part in parts.values() for e in part):
        selected = value.array
        for axis, (begin, length, step) in parts.items():
            selected = selected.take(begin + np.arange(length) * step, axis)
        return known(selected) if value.symbolic else Known(selected)
    target = [parts[axis][1] if axis in parts else size for axis, size in enumerate(shape)]
    symbols = {axis: part[0] for axis, part in parts.items()}
    lengths = [size for size in target if not isinstance(size, int)]

    def select(tensor: Any, *sizes: Any) -> Any:
        begins = dict(zip(symbols, sizes[: len(symbols)], strict=True))
        rest = iter(sizes[len(symbols) :])
        extents = [size if isinstance(size, int) else next(rest) for size in target]

        def element(*index: Any) -> Any:
            return tensor(*(i * parts[a][2] + begins[a] if a in parts else i for a, i in enumerate(index)))

        return te.compute(extents, element, name="slice")

    if all(isinstance(e, int) for e in (*symbols.values(), *target)):
        return node.compute(lambda tensor: select(tensor, *map(_term, symbols.values())), node.tensor(0))
    return node.compute(select, node.tensor(0), *map(_term, symbols.values()), *lengths)


def _gather(node: Node) -> Value:
    shape = node.shape(0)
    axis = node.axis(len(shape))
    value, indices = node.inputs[:2]
    if isinstance(indices, Known) and not indices.symbolic and isinstance(shape[axis], int):
        size = shape[axis]
        numbers = indices.array.astype(np.int64)
        if numbers.size and not -size <= numbers.min() <= numbers.max() < size:
            raise node.error(f"an index is outside of the {size} elements")
        numbers = np.where(numbers < 0, numbers + size, numbers)
        if isinstance(value, Known):
            taken = value.array.take(numbers, axis)
            return known(taken) if value.symbolic else Known(np.asarray(taken))
        return node.emit(_op.take(node.tensor(0), array_constant(numbers), axis, mode="clip"))
    at = node.tensor(1)
    size = (
        constant(shape[axis], str(at.ty.dtype))
        if isinstance(shape[axis], int)
        else node.converter.tensor(known(shape[axis], ()))
    )
    size = size if str(size.ty.dtype) == str(at.ty.dtype) else node.emit(_op.astype(size, str(at.ty.dtype)))
    negative = node.emit(_op.less(at, constant(0, str(at.ty.dtype))))
    at = node.emit(_op.where(negative, node.emit(_op.add(at, size)), at))
    # An index that is wrong reads the nearest element, not other memory.
    return node.emit(_op.take(node.tensor(0), at, axis, mode="clip"))


def _expand(node: Node) -> Value:
    wanted, shape = _dims(_sizes(node, 1)), node.shape(0)
    rank = max(len(wanted), len(shape))
    wanted, own = [1] * (rank - len(wanted)) + wanted, [1] * (rank - len(shape)) + shape
    target = []
    for size, other in zip(own, wanted, strict=True):
        if isinstance(size, int) and size == 1:
            target.append(other)
        elif (isinstance(other, int) and other == 1) or equal_sizes(size, other):
            target.append(size)
        else:
            raise node.needs_shapes(f"size {size} cannot be expanded to {other}")
    value = node.inputs[0]
    if isinstance(value, Known) and all(isinstance(size, int) for size in target) and prod(target) <= _FOLDED:
        return Known(np.ascontiguousarray(np.broadcast_to(value.array, target)))
    return node.emit(_op.broadcast_to(node.tensor(0), relax.ShapeExpr(target)))


def _tile(node: Node) -> Value:
    repeats, x = node.numbers(1), node.tensor(0)
    if len(repeats) != len(node.shape(0)):
        raise node.error("there must be a number of repeats for each dimension")

    def tile(t: Any) -> Any:
        extents = [size * count for size, count in zip(t.shape, repeats, strict=True)]
        return te.compute(
            extents, lambda *i: t(*(tirx.floormod(p, s) for p, s in zip(i, t.shape, strict=True))), name="tile"
        )

    return node.compute(tile, x)


def _trilu(node: Node) -> Value:
    offset = node.numbers(1)[0] if node.has(1) else 0
    upper, x = node.attributes.get("upper", 1), node.tensor(0)

    def element(t: Any, *index: Any) -> Any:
        row, column = index[-2:]
        kept = column - row >= offset if upper else column - row <= offset
        return tirx.if_then_else(kept, t(*index), tirx.const(0, t.dtype))

    offset = max(min(offset, _ENDS), -_ENDS)
    return node.compute(lambda t: te.compute(t.shape, lambda *i: element(t, *i), name="trilu"), x)


def _pad(node: Node) -> Value:
    """Padding with a constant."""
    shape, x = node.shape(0), node.tensor(0)
    if node.attributes.get("mode", b"constant") != b"constant":
        raise node.error("modes other than constant are not supported")
    pads = _sizes(node, 1)
    axes = [node.normal(axis, len(shape)) for axis in node.numbers(3)] if node.has(3) else list(range(len(shape)))
    if len(pads) != 2 * len(axes):
        raise node.error("there must be two pads for each axis")
    if not all(isinstance(pad, int | np.integer) for pad in pads):
        raise node.needs_shapes("a pad depends on a symbolic size")
    before, after = (
        dict(zip(axes, map(int, pads), strict=False)),
        dict(zip(axes, map(int, pads[len(axes) :]), strict=True)),
    )
    value = node.tensor(2) if node.has(2) else constant(0, node.dtype(0))

    def pad(t: Any, fill: Any) -> Any:
        def element(*index: Any) -> Any:
            places = [i - before.get(axis, 0) for axis, i in enumerate(index)]
            inside = [tirx.all(i >= 0, i < size) for i, size in zip(places, t.shape, strict=True)]
            return tirx.if_then_else(tirx.all(*inside), t(*places), fill(*[0] * len(fill.shape)))

        extents = [s + before.get(axis, 0) + after.get(axis, 0) for axis, s in enumerate(t.shape)]
        return te.compute(extents, element, name="pad")

    return node.compute(pad, x, value)


OPERATORS: dict[str, Operator] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
