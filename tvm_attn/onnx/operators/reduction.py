"""Reductions. Sums of 16-bit floats are formed in float32."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from tvm_attn.onnx.converter import Known, Node, Operator, Value, cast, constant, known, shape_of

_op = relax.op
_NARROW = ("float16", "bfloat16")
_Pointwise = Callable[[relax.Expr], relax.Expr]


def _reduction(kind: str, before: _Pointwise | None = None, after: _Pointwise | None = None) -> Operator:
    """`after(reduce(before(x)))` over some axes; `kind` is a key of `_KINDS`."""

    def convert(node: Node) -> Value:
        value, attributes = node.inputs[0], node.attributes
        keep = bool(attributes.get("keepdims", 1))
        rank = len(node.shape(0))
        given = attributes["axes"] if "axes" in attributes else node.numbers(1) if node.has(1) else []
        axes = [node.normal(axis, rank) for axis in given]
        if isinstance(value, Known) and value.symbolic and kind == "prod" and rank == 1 and not keep:
            return known(prod(value.array), ())
        x = node.tensor(0)
        dtype = str(x.ty.dtype)
        wide = cast(node, x, {"bool": "int8"}.get(dtype, "float32")) if dtype in ("bool", *_NARROW) else x
        wide = wide if before is None else node.emit(before(wide))
        if rank and (given or not attributes.get("noop_with_empty_axes", 0)):
            wide = _reduced(node, wide, kind, axes or list(range(rank)), keep)
        return cast(node, wide if after is None else node.emit(after(wide)), dtype)

    return convert


def _reduced(node: Node, x: relax.Expr, kind: str, axes: list[int], keep: bool) -> relax.Expr:
    dtype, shape = str(x.ty.dtype), shape_of(x)
    least, most = _range_of("bool" if node.dtype(0) == "bool" else dtype)
    if any(isinstance(shape[axis], int) and shape[axis] == 0 for axis in axes):  # TVM leaves that undefined
        number = {"sum": 0, "mean": np.nan, "max": least, "min": most, "prod": 1}[kind]
        target = [1 if axis in axes else size for axis, size in enumerate(shape) if keep or axis not in axes]
        return node.emit(_op.broadcast_to(constant(number, dtype), relax.ShapeExpr(target)))
    if kind in ("max", "min"):
        return _extreme(node, x, axes, keep, tirx.max if kind == "max" else tirx.min, least if kind == "max" else most)
    return node.emit(_KINDS[kind](x, axes, keep))


def _extreme(
    node: Node, x: relax.Expr, axes: list[int], keep: bool, choose: Callable[[Any, Any], Any], start: float
) -> relax.Expr:
    """The largest or least element. TVM's own starts from a finite number, and finds no infinity of the other sign."""
    reducer = te.comm_reducer(lambda a, b: choose(a, b), lambda _: tirx.const(start, str(x.ty.dtype)), name="extreme")

    def extremes(t: Any) -> Any:
        reduced = {axis: te.reduce_axis((0, t.shape[axis]), f"r{axis}") for axis in axes}
        kept = [axis for axis in range(len(t.shape)) if keep or axis not in reduced]

        def element(*index: Any) -> Any:
            places = dict(zip(kept, index, strict=True)) | reduced
            return reducer(t(*(places[axis] for axis in range(len(t.shape)))), axis=list(reduced.values()))

        return te.compute([1 if axis in reduced else t.shape[axis] for axis in kept], element, name="extremes")

    return node.compute(extremes, x)


def _range_of(dtype: str) -> tuple[float, float]:
    """The least and the largest number of a dtype."""
    if dtype == "bool":
        return 0, 1
    if dtype.startswith(("int", "uint")):
        limits = np.iinfo(dtype)
        return int(limits.min), int(limits.max)
    return -np.inf, np.inf


_KINDS: dict[str, Callable[..., relax.Expr]] = {"sum": _op.sum, "mean": _op.mean, "prod": _op.prod}

OPERATORS: dict[str, Operator] = {
    "ReduceSum": _reduction("sum"),
    "ReduceMean": _reduction("mean"),
    "ReduceMax": _reduction("max"),
    "ReduceMin": _reduction("min"),
    "ReduceProd": _reduction("prod"),
    "ReduceL1": _reduction("sum", before=_op.abs),
    "ReduceL2": _reduction("sum", before=_op.square, after=_op.sqrt),
    "ReduceSumSquare": _reduction("sum", before=_op.square),
    "ReduceLogSum": _reduction("sum", after=_op.log),
}
