"""Index arithmetic at the largest legal sizes: which 32-bit expressions of a kernel can overflow.

Interval arithmetic over a scheduled function, in the order of its statements. TVM's own analyzer does not bound
exclusive or, nor scalars that a kernel keeps in registers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm
from tvm import ir, tirx
from tvm_ffi.structural import WalkResult, structural_walk

Interval = tuple[int, int]
_INT32 = (-(2**31), 2**31 - 1)


def overflows(
    function: tirx.PrimFunc, largest: Mapping[str, int], elements: Mapping[str, Sequence[Interval]] | None = None
) -> list[str]:
    """The int32 sums and products that may overflow, as text.

    Args:
        function: a TIRx function with `tirx.is_scheduled`.
        largest: the largest value of each symbolic size, by its name; the smallest is 1.
        elements: the ranges of the elements of integer tensors, by the tensor's name: an interval for each column.
    """
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"})
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main").with_attr("target", target)})
    with target:
        main = tirx.transform.LowerTIRx()(module)["main"]
    intervals = _Intervals(largest, elements or {})
    structural_walk(main.body, ((object,), intervals.visit), order="pre")
    return intervals.found


class _Intervals:
    def __init__(self, largest: Mapping[str, int], elements: Mapping[str, Sequence[Interval]]) -> None:
        self.largest, self.elements = largest, elements
        self.variables: dict[Any, Interval] = {}
        self.scalars: dict[Any, Interval] = {}
        self.found: list[str] = []

    def visit(self, node: Any) -> WalkResult | None:
        """Records what a statement binds; checks an expression. Tensor shapes are not code."""
        if isinstance(node, tirx.BufferType):
            return WalkResult.SKIP
        if isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            self.variables[node.node.var] = (0, self.of(node.value)[1] - 1)
        elif isinstance(node, tirx.For):
            first, count = self.of(node.min), self.of(node.extent)
            self.variables[node.loop_var] = (first[0], first[1] + count[1] - 1)
        elif isinstance(node, tirx.Bind):
            self.variables[node.var] = self.of(node.value)
        elif isinstance(node, tirx.BufferStore) and self._is_scalar(node.buffer):
            known, value = self.scalars.get(node.buffer), self.of(node.value)
            self.scalars[node.buffer] = (min(known[0], value[0]), max(known[1], value[1])) if known else value
        elif isinstance(node, tirx.Add | tirx.Sub | tirx.Mul) and node.ty.dtype == "int32":
            least, most = self.of(node)
            if least < _INT32[0] or most > _INT32[1]:
                self.found.append(f"{node}: up to {most}")
        return None

    @staticmethod
    def _is_scalar(buffer: Any) -> bool:
        return buffer.dtype == "int32" and [getattr(extent, "value", 0) for extent in buffer.shape] == [1]

    @staticmethod
    def _last(index: Any) -> int:
        """The constant at the end of an index, which is the column."""
        constant = index.b if isinstance(index, tirx.Add) else index
        return int(constant.value) if isinstance(constant, tirx.IntImm) else 0

    def of(self, node: Any) -> Interval:
        """The interval of an integer expression; all of int32 if nothing is known."""
        if isinstance(node, tirx.IntImm):
            return int(node.value), int(node.value)
        if isinstance(node, tirx.Var):
            return self.variables.get(node, (1, self.largest[node.name]) if node.name in self.largest else _INT32)
        if isinstance(node, tirx.Cast):
            return self.of(node.value)
        if isinstance(node, ir.TensorLoad):
            if node.source in self.scalars:
                return self.scalars[node.source]
            columns = self.elements.get(node.source.name)
            return columns[self._last(node.indices[-1]) % len(columns)] if columns else _INT32
        if isinstance(node, tirx.Select):
            (a, b), (c, d) = self.of(node.true_value), self.of(node.false_value)
            return min(a, c), max(b, d)
        if isinstance(node, ir.Call):
            name, operands = node.op.name, list(node.args)
            if "tvm_warp_shuffle" in name:
                return self.of(operands[1])
        elif hasattr(node, "a") and hasattr(node, "b"):
            name, operands = type(node).__name__, [node.a, node.b]
        else:
            return _INT32
        if len(operands) != 2:
            return _INT32
        return _binary(name.rsplit(".", 1)[-1].lower(), self.of(operands[0]), self.of(operands[1]))


def _binary(name: str, x: Interval, y: Interval) -> Interval:
    if name == "add":
        return x[0] + y[0], x[1] + y[1]
    if name == "sub":
        return x[0] - y[1], x[1] - y[0]
    if name == "mul":
        corners = [a * b for a in x for b in y]
        return min(corners), max(corners)
    if name in ("min", "max"):
        pick = min if name == "min" else max
        return pick(x[0], y[0]), pick(x[1], y[1])
    if name in ("floordiv", "truncdiv", "div") and y[1] > 0:
        # No kernel divides by less than 1. For negative numbers, truncation is never below rounding down.
        quotients = [a // b for a in x for b in (max(y[0], 1), y[1])]
        return min(quotients), max(quotients)
    if name in ("floormod", "truncmod", "mod") and x[0] >= 0 and y[1] > 0:
        return 0, min(x[1], y[1] - 1)
    if name in ("bitwisexor", "bitwise_xor", "bitwiseor", "bitwise_or") and x[0] >= 0 and y[0] >= 0:
        return 0, 2 ** max(x[1], y[1]).bit_length() - 1
    if name in ("bitwiseand", "bitwise_and") and x[0] >= 0 and y[0] >= 0:
        return 0, min(x[1], y[1])
    return _INT32
